# Every target sets up what it needs by itself: Python >= 3.11, pip and make are enough.
# Another interpreter: make PYTHON=python3.12 quickstart

PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadscope

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-all test-gpu lint format docs proofs bench clean

help:  ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## */|/' | awk -F'|' '{ printf "make %-12s %s\n", $$1, $$2 }'

setup: $(VENV)/.installed-dev  ## a virtual environment in .venv with everything for development

quickstart: $(VENV)/.installed  ## train a small video model from nothing and look at what it draws
	$(BIN)/python -m kinema.shapes.quickstart

test: lint  ## style, types and the tests that take seconds
	$(PYTEST) -m "not slow and not gpu"

test-all: lint  ## the slow tests too
	$(PYTEST) -m "not gpu"

test-gpu: setup  ## the tests that need a GPU
	$(BIN)/python -m pytest -m gpu

lint: setup  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup  ## mend the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup  ## write the pages that are made from the code
	$(BIN)/python -m kinema.config.reference docs/configuration.md
	$(BIN)/python -m kinema.families.sizes
	$(BIN)/python -m kinema.families.pages docs

proofs: setup  ## run the checks of every family and write their table into docs/families.md
	$(PYTEST) tests/families/test_zoo.py --families-table docs/families.md

bench: setup  ## measure what the README claims
	@set -e; for script in bench/[a-z]*.py; do echo "== $$script"; $(BIN)/python $$script; done

clean:  ## remove caches and build products; runs/ and .venv stay
	rm -rf build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache
	find src tests bench scripts -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "kinema needs Python 3.11 or newer and found none; name one: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "kinema needs Python 3.11 or newer; $(PYTHON) is not: $$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "$(PYTHON) -m venv failed; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }

# --no-compile: most modules are never imported; those that are get compiled then
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet --no-compile -c constraints.txt setuptools
	$(PIP) install --quiet --no-compile -c constraints.txt --no-build-isolation -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet --no-compile -c constraints.txt setuptools
	$(PIP) install --quiet --no-compile -c constraints.txt --no-build-isolation -e ".[dev]"
	@touch $(VENV)/.installed $@
