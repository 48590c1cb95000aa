# Needs Python 3.10 or newer and make; everything else goes into .venv. `make` alone lists what there is.

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check install -qq --constraint constraints.txt

# One thread for each process: on two busy cores the demo took 80 s with one thread, and over ten minutes with two.
export OMP_NUM_THREADS ?= 1
# Empty means that bytecode is stored: tests start many processes, and each would compile all modules again.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help demo test faults docs lint size format ci clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-8s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/.train  ## trains a teacher on the embedded digits and distils it three ways; shows table and report
	$(RUN) -m jacmatch distill $(ARGS)

test: $(VENV)/.dev  ## the tests, on two processes of one thread; a file stays on one, for what its tests share
	$(RUN) -m pytest -q -n 2 --dist loadfile $(ARGS)

faults: $(VENV)/.dev  ## plants faults, one at a time, and demands that the tests notice each
	$(RUN) tests/planted_faults.py

lint: $(VENV)/.dev  ## style, types and the import contract
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports --no-logo

size: $(VENV)/.dev  ## lines, files and bytes of the wheel that users install; long files and functions
	$(RUN) tests/architecture/sizes.py

docs: $(VENV)/.docs  ## builds the documentation site into site/ and checks it; needs no network
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet
	$(RUN) -m pytest -q tests/test_site.py

format: $(VENV)/.dev  ## mends what ruff can mend
	$(RUN) -m ruff check --fix
	$(RUN) -m ruff format

ci: ## all that must hold before a change lands
	bash .ci/run

clean:  ## removes .venv and what the tools keep
	rm -rf $(VENV) build site .mypy_cache .ruff_cache .pytest_cache .import_linter_cache src/*.egg-info research/src/*.egg-info

# The stamps: a step is done again only when what it read has changed.

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "$(PYTHON) must be Python 3.10 or newer. Set another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ echo "The module venv is missing. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@$(RUN) -m pip --disable-pip-version-check install -qq --upgrade pip
	@touch $@

$(VENV)/.torch: $(VENV)/.made constraints.txt
	@echo "Installing torch into $(VENV), which takes a minute or two ..."
	@$(PIP) torch
	@touch $@

$(VENV)/.train: $(VENV)/.torch pyproject.toml research/pyproject.toml
	@echo "Installing jacmatch and what training needs ..."
	@$(PIP) --editable '.[train]' --editable research
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml research/pyproject.toml
	@echo "Installing jacmatch and what its tests need ..."
	@$(PIP) --editable '.[dev]' --editable research
	@touch $@ $(VENV)/.train

$(VENV)/.docs: $(VENV)/.dev
	@echo "Installing what builds the documentation ..."
	@$(PIP) --editable '.[docs]'
	@touch $@
