# `make` alone lists the targets. PYTHON chooses the interpreter: make test PYTHON=python3.12
PYTHON ?= python3
BIN := .venv/bin
NEWEST := .venv-newest/bin
# --no-compile halves the time; Python compiles modules when it imports them.
PIP_INSTALL := -m pip install -q --disable-pip-version-check --no-compile
# If set, every process compiles all its imports again: 3.3 s instead of 1.3 s, for hundreds of processes in the tests.
unexport PYTHONDONTWRITEBYTECODE
# All cores. Each worker starts with a contiguous part of the tests, so that most fixtures and compilations of a module
# happen in one worker; idle workers then take over tests from the end of another one's part.
PARALLEL := -n auto --maxprocesses 8 --dist worksteal

# Finds a Python for test-newest, newest first: on PATH, or installed by pyenv. Checking that the program exists is not
# enough, because pyenv has shims for inactive versions, which fail when started.
FIND_NEWEST = for v in 3.13 3.12; do \
  for p in python$$v $$(ls -d "$$(pyenv root 2>/dev/null)"/versions/$$v.*/bin/python 2>/dev/null | sort -rV); do \
    "$$p" -c 'import ensurepip, venv' >/dev/null 2>&1 && { echo "$$p"; exit; }; \
  done; done

.DEFAULT_GOAL := help
.PHONY: help demo demo-train real test test-long test-topologies test-newest fuzz lint clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*##/\1:/p' $(MAKEFILE_LIST) | awk -F': *' '{ printf "make %-15s %s\n", $$1, $$2 }'

demo: .venv/.runtime  ## scan the base model in the package, grow it, prove it, and compare five methods (under 3 minutes)
	rm -rf out/demo
	@echo "What each layer of the base is worth, and the best six to run twice:"
	@$(BIN)/python -m tli_jax.scan --config configs/scan_demo.yaml
	$(BIN)/python -m tli_jax.upscale --config configs/demo.yaml
	@echo; echo "Five methods at the same size, before any training:"
	@$(BIN)/python -m tli_jax.compare --config configs/compare_demo.yaml --steps 0 --seeds 1 --no-baselines --output out/demo/compare

demo-train: .venv/.runtime  ## grow that model and train its injected layers on new text (about 2 minutes)
	rm -rf out/demo_train
	$(BIN)/python -m tli_jax.upscale --config configs/demo_train.yaml
	@$(BIN)/python -m tli_jax.report out/demo_train/run

real: .venv/.runtime  ## fetch a converged Llama of 30 layers, grow it, prove it and scan it (TEXT=FILE; 98 MB, about 10 minutes)
	$(BIN)/python benchmarks/real_base.py $(if $(TEXT),--text $(TEXT))

test: .venv/.test  ## run the tests, except the long ones
	$(BIN)/python -m pytest $(PARALLEL) -m "not long and not topologies"

test-long: .venv/.test  ## run the long tests only
	$(BIN)/python -m pytest -m long

test-topologies: .venv/.test .venv/.tpu  ## compile the shipped configurations for TPU slices (30 minutes)
	$(BIN)/python -m pytest -m topologies

test-newest:  ## run the tests on Python 3.13 or 3.12 with the newest JAX, without torch
	@python=$$($(FIND_NEWEST)); \
	if [ -z "$$python" ]; then echo "test-newest: skipped, found no Python 3.13 or 3.12"; exit 0; fi; \
	$(MAKE) --no-print-directory .venv-newest/.test NEWEST_PYTHON="$$python" && \
	$(NEWEST)/python -m pytest $(PARALLEL) -m "not long and not topologies"

FUZZ_SECONDS ?= 600
FUZZ_TARGETS ?= headers config growth yaml tokenizer text tasks run

fuzz: .venv/.test  ## run the commands on damaged inputs (FUZZ_SECONDS=600 for each of FUZZ_TARGETS)
	$(BIN)/python benchmarks/fuzz $(FUZZ_TARGETS) --seconds $(FUZZ_SECONDS) --jobs 2

lint: .venv/.lint  ## check style, types and imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-logo

clean:  ## remove environments and caches
	rm -rf .venv .venv-newest build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamp files: packages are installed again only after pyproject.toml changes.
.venv/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "tli_jax needs Python 3.11 or newer, which '$(PYTHON)' is not: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/.runtime: .venv/.made pyproject.toml
	$(BIN)/python $(PIP_INSTALL) -e ".[plot,gguf]"
	@touch $@

.venv/.test: .venv/.made pyproject.toml
	$(BIN)/python $(PIP_INSTALL) -e '.[test]'
	@touch $@

# The TPU compiler, 0.7 GB. With it, `make test` also compiles for small slices.
.venv/.tpu: .venv/.made pyproject.toml
	$(BIN)/python $(PIP_INSTALL) -e '.[tpu]'
	@touch $@

# Includes the package, because pyright and lint-imports follow its imports.
.venv/.lint: .venv/.made pyproject.toml
	$(BIN)/python $(PIP_INSTALL) -e '.[lint]'
	@touch $@

.venv-newest/.test: pyproject.toml
	$(NEWEST_PYTHON) -m venv --clear .venv-newest
	$(NEWEST)/python $(PIP_INSTALL) -e '.[test-newest]'
	@touch $@
