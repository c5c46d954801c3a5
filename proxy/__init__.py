"""Tallygate: a metering reverse proxy before LiteLLM, with a prepaid ledger that adds up."""
