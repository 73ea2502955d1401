# make demo    see BFPO work, in minutes, on two CPU cores
# make test    the tests
#
# Each target makes .venv itself, with the tested versions of constraints.txt; all it needs is Python >= 3.11 with venv.
#
#   PYTHON=python3.12 make test                                           another interpreter
#   TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu make test        another build of torch: here the small one
#                                                                         without CUDA
#   make test ARGS="-k labeling -x"                                       arguments for the command that is run
#   make test WORKERS=8                                                   tests at a time; two by default

PYTHON ?= python3
TORCH_INDEX_URL ?=
ARGS ?=
WORKERS ?= 2

ONE_THREAD := OMP_NUM_THREADS=1
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed.stamp
DEV_INSTALLED := $(VENV)/installed-dev.stamp
TORCH := $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help demo test test-one test-distributed test-long lint format type clean
.DELETE_ON_ERROR:

help:  ## Lists the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(INSTALLED)  ## Fine-tunes and aligns a tiny model; prints the table of helpful and safe answers
	$(BIN)/bfpo demo $(ARGS)

test: test-one test-distributed  ## Runs the tests, without those that take minutes each

# pytest's exit code 5 says that ARGS leaves no test of this kind.
test-one: $(INSTALLED)  ## Runs those on one process, WORKERS at a time
	$(ONE_THREAD) $(BIN)/python -m pytest -m "not long and not distributed" -n $(WORKERS) --dist loadfile $(ARGS) || [ $$? -eq 5 ]

test-distributed: $(INSTALLED)  ## Runs those that start several processes
	$(ONE_THREAD) $(BIN)/python -m pytest -m "not long and distributed" $(ARGS) || [ $$? -eq 5 ]

test-long: $(INSTALLED)  ## Runs those that take minutes each: kills, loading a large model, results of the microworld
	$(BIN)/python -m pytest -m long $(ARGS)

lint: $(DEV_INSTALLED)  ## Checks style and spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

format: $(DEV_INSTALLED)  ## Rewrites the code in the agreed style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: $(DEV_INSTALLED)  ## Checks types
	$(BIN)/mypy

clean:  ## Removes the environment and all caches (not runs/)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# torch first and by itself, so that its build is chosen here. By default that is PyPI's, unless pip is told otherwise
# (TORCH_INDEX_URL above, or pip's own PIP_EXTRA_INDEX_URL); what is installed later finds it there.
$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) "$(TORCH)"
	$(BIN)/python -m pip install -c constraints.txt -e ".[test]"
	touch $@

$(DEV_INSTALLED): $(INSTALLED)
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	touch $@
