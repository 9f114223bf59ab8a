# Two commands do everything on a fresh machine: `make demo` and `make test`. Both create .venv themselves.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.treadle-setup
BENCH  ?= routing-exactness --quick

.PHONY: help setup models demo test fmt check docs bench

help:
	@echo 'make setup   create $(VENV) with everything, at the pinned versions'
	@echo 'make demo    plan, train, bank, route and evaluate on SmolLM2-135M; names the HTML report (DEMO=--quick for less)'
	@echo "make test    all tests, with coverage; TESTS='FILE FOLDER …': those alone, without"
	@echo 'make check   formatting, lint, types, import contracts'
	@echo 'make fmt     format the code'
	@echo 'make docs    build the site into site/, warnings are errors'
	@echo "make bench   one benchmark: BENCH='NAME [--quick]', JSON on standard output"

setup: $(STAMP)

# torch is pinned by constraints.txt: left to itself, pip takes the newest build and gigabytes of CUDA with it.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo '$(PYTHON) is older than Python 3.11; name another: make PYTHON=python3.12 $(MAKECMDGOALS)' >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[all]'
	@touch $@

models: $(STAMP)
	$(BIN)/treadle models fetch smollm2-135m
	$(BIN)/treadle models fetch minilm-l6

demo: $(STAMP)
	$(BIN)/treadle demo $(DEMO)

# The slowest files stand alone: in order of their names they do not come last, when one worker waits for the other.
# Fetching is the last step that may use a network.
test: models
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(if $(TESTS),--no-cov $(TESTS),--cov)

fmt: $(STAMP)
	$(BIN)/ruff format src tests
	$(BIN)/ruff check --fix src tests

check: $(STAMP)
	$(BIN)/ruff format --check src tests
	$(BIN)/ruff check src tests
	$(BIN)/lint-imports
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(STAMP)
	$(BIN)/treadle bench $(BENCH) --json
