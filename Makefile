# Every target works on a machine with nothing but Python 3.11+ and make.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test check format mutants bench clean

help: ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "expunge needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY) ## cache, delete, unlearn, measure and report on handwritten digits (under 2 minutes)
	$(BIN)/expunge demo

test: $(READY) ## the whole test suite (under 4 minutes)
	$(BIN)/python -m pytest -n 2 --dist worksteal -q

check: $(READY) ## format, lint, types, layers, docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/check_docs.py

format: $(READY) ## rewrite the code in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

mutants: $(READY) ## plant bugs one at a time; every one must be caught by the tests
	$(BIN)/python tools/mutants.py

bench: $(READY) ## speed and memory as ratios, written to benchmarks/results.md
	$(BIN)/python benchmarks/run.py

clean: ## remove the environment, runs and caches
	rm -rf .venv runs .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
