# One door in: every target first sets up the locked environment, and only when the lock has changed.
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
UV := $(shell command -v uv 2>/dev/null || echo .uv/bin/uv)
LOCK := requirements.lock

export HF_HUB_OFFLINE = 1
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: setup demo test test-all lint types corpus lock clean help

help:            ## this list
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

setup: $(VENV)/.ready   ## the locked environment in .venv

# Debian's python3 comes without venv's pip, and other machines without pip outside of a venv: either will do.
.uv/bin/uv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "Python 3.11 is needed: make PYTHON=/path/to/python3.11")'
	($(PYTHON) -m venv .uv && .uv/bin/pip install --quiet --disable-pip-version-check uv) \
	    || $(PYTHON) -m pip install --quiet --disable-pip-version-check --target .uv uv

$(VENV)/.ready: $(LOCK) pyproject.toml | $(if $(findstring .uv,$(UV)),.uv/bin/uv)
	$(UV) venv --quiet --allow-existing --python $(PYTHON) $(VENV)
	VIRTUAL_ENV=$(VENV) $(UV) pip sync --quiet --require-hashes $(LOCK)
	VIRTUAL_ENV=$(VENV) $(UV) pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

demo: setup      ## the whole main job on real speech and real photographs, under 10 minutes on 2 cores
	$(BIN)/tessera demo

test: setup lint types   ## lint, types and the fast tests
	$(BIN)/python -m pytest -m "not slow" tests

test-all: setup lint types   ## everything, the slow tests too
	$(BIN)/python -m pytest tests

lint: setup      ## ruff
	$(BIN)/ruff check .

types: setup     ## mypy on pipeline, recipes, data_prep and launch
	$(BIN)/mypy

corpus: setup    ## hours of real speech and hundreds of photographs from Debian packages, into corpus/
	$(BIN)/python -m tests.benchmarks.corpus --out corpus

lock:            ## resolve pyproject.toml anew into requirements.lock
	$(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	    --no-annotate --custom-compile-command "make lock" --group dev pyproject.toml --output-file $(LOCK)

clean:           ## what setup and the demo made
	rm -rf $(VENV) .uv demo .pytest_cache .mypy_cache .ruff_cache
