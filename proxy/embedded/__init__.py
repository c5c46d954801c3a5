"""PostgreSQL and LiteLLM as supervised children, for `tallygate up` and the tests."""
