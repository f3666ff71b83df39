# make demo   set up .venv, run the quick suite, print its leaderboard and the report's path
# make test   the same set-up with the test tools, then lint, types and tests
# make test-all   the same, the tests under every instruction set and number of threads of CPUS
# make lock   write the lock files anew from what .venv holds
# make readme write the README's tables, tree and picture anew
#
# PYTHON chooses the interpreter (3.11 or later), VENV the environment's folder, ROOT the demo's run directory.
# PARETUNE_TEST_CPU=avx2/2 tests with torch's AVX2 kernels on two threads; any of CPUS, unset is native/1.

PYTHON ?= python3
VENV ?= .venv
ROOT ?= paretune-runs/quick
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# What rounds differently: the instruction set (native: the best that the processor has) and the number of threads.
CPUS := default/1 default/2 avx2/1 avx2/2 native/1 native/2
PARETUNE_TEST_CPU := $(or $(PARETUNE_TEST_CPU),native/1)
$(if $(filter $(CPUS),$(PARETUNE_TEST_CPU)),,$(error PARETUNE_TEST_CPU is one of $(CPUS); found: $(PARETUNE_TEST_CPU)))
on = env $(if $(filter native/%,$1),-u ATEN_CPU_CAPABILITY,ATEN_CPU_CAPABILITY=$(firstword $(subst /, ,$1))) OMP_NUM_THREADS=$(notdir $1)
pytest = $(call on,$1) $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: demo test test-all cpus lint types lock readme clean
.DELETE_ON_ERROR:

demo: $(VENV)/.ready
	$(BIN)/paretune demo --root $(ROOT)

test: lint types
	$(call pytest,$(PARETUNE_TEST_CPU))

test-all: lint types
	@failed=; $(foreach cpu,$(CPUS),echo "== $(cpu)"; $(call pytest,$(cpu)) || failed="$$failed $(cpu)";) \
	if [ -n "$$failed" ]; then echo "failed under:$$failed" >&2; exit 1; fi

cpus:
	@echo $(CPUS)

lint: $(VENV)/.ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.ready-test
	$(BIN)/mypy

lock: $(VENV)/.ready-test
	$(BIN)/python tools/lock.py

readme: $(VENV)/.ready
	$(BIN)/python tools/readme.py

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
