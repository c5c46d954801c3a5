# Every target makes its own .venv from a bare python3 (3.11 or later) and needs nothing else.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
WORKERS ?= 2

export PIP_DISABLE_PIP_VERSION_CHECK = 1
# Trust the authorities that the machine trusts, as pip does.
export UV_SYSTEM_CERTS = 1

.PHONY: up test check bench lock clean
.DEFAULT_GOAL := check

# PostgreSQL, LiteLLM and Tallygate in one command; TALLYGATE_* variables reach it as they are.
up: $(STAMP)
	@exec $(BIN)/tallygate up

test: $(STAMP)
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -n $(WORKERS) $(PYTEST_ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report
	@echo "Money code is covered whole:"
	$(BIN)/coverage report --include='pricing/*,proxy/ledger.py,proxy/settlement.py' --fail-under=100

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/sqlfluff lint --processes 1 --disable-progress-bar $(wildcard schema.sql proxy/migrations)
	$(BIN)/codespell
	$(BIN)/vulture

bench: $(STAMP)
	$(BIN)/python -m tests.bench

# The locks hold hashes and no address, so that they are right for any registry. PIP_FIND_LINKS
# and its kin would leak local files into them.
lock: $(STAMP)
	env -u PIP_FIND_LINKS -u UV_FIND_LINKS $(BIN)/uv pip compile pyproject.toml $(LOCK_FLAGS) \
		--extra embedded --group dev --output-file requirements.lock
	env -u PIP_FIND_LINKS -u UV_FIND_LINKS $(BIN)/uv pip compile pyproject.toml $(LOCK_FLAGS) \
		--constraint requirements.lock --output-file requirements-proxy.lock

LOCK_FLAGS := --quiet --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-emit-find-links --no-header

# uv installs the lock in seconds where pip takes a minute; it comes from the lock too. Where uv
# can't reach the registry that only pip is set up for, pip does it.
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Tallygate needs Python 3.11 or later: make PYTHON=/path/to/python3"; exit 1; }
	@echo "Making $(VENV) from requirements.lock …"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ echo "python3 has no venv module (Debian: apt install python3-venv)"; exit 1; }
	@awk '/^[^ ]/ {uv = /^uv==/} uv' requirements.lock > $(VENV)/uv.lock
	@$(BIN)/python -m pip install --quiet --no-deps --require-hashes -r $(VENV)/uv.lock
	@$(BIN)/uv pip sync --quiet --require-hashes --python $(BIN)/python requirements.lock || \
		{ echo "uv could not, pip tries (a minute or two) …"; \
		$(BIN)/python -m pip install --quiet --no-deps --require-hashes -r requirements.lock; }
	@$(BIN)/uv pip install --quiet --no-deps --no-build-isolation --offline \
		--python $(BIN)/python --editable .
	@touch $@
	@echo "$(VENV) is ready"

clean:
	rm -rf $(VENV) .coverage .coverage.* htmlcov dist .pytest_cache .ruff_cache .hypothesis \
		.import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
