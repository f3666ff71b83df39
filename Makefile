# make demo   set up .venv, run the quick suite, print its leaderboard and the report's path
# make test   the same set-up with the test tools, then lint, types and tests
# make lock   write the lock files anew from what .venv holds
# make docs   write the generated parts of README.md and docs/ anew
#
# PYTHON chooses the interpreter (3.11 or later), VENV the environment's folder, ROOT the demo's run directory.

PYTHON ?= python3
VENV ?= .venv
ROOT ?= paretune-runs/quick
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test lint types lock docs clean
.DELETE_ON_ERROR:

demo: $(VENV)/.ready
	$(BIN)/paretune demo --root $(ROOT)

test: lint types
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/.ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.ready-test
	$(BIN)/mypy

lock: $(VENV)/.ready-test
	$(BIN)/python tools/lock.py

docs: $(VENV)/.ready
	$(BIN)/python tools/docs.py

# A stamp is newer than what it was made from, so that nothing is installed twice.

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Paretune needs Python 3.11 or later; found: `$(PYTHON) --version 2>&1`. Choose one with make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.ready: requirements.lock pyproject.toml | $(BIN)/python
	$(PIP) -r requirements.lock
	$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.ready-test: requirements-test.lock $(VENV)/.ready
	$(PIP) -r requirements-test.lock
	@touch $@

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
