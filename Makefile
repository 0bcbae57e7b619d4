# make demo and make test are all that a fresh machine needs: both set up .venv by themselves, once.

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
# Test files run side by side; most tests keep one thread busy.
WORKERS ?= auto --maxprocesses 4
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
SOURCES := pissa_hub tests benchmarks
RESULTS := benchmarks/results

export TMPDIR := $(CURDIR)/.cache/tmp

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint check bench fuzz clean

help:
	@echo "make demo       decompose a real model, train it, convert and merge the result, compare outputs"
	@echo "make test       the tests"
	@echo "make test-slow  the tests that take minutes"
	@echo "make lint       format, lint and types"
	@echo "make check      lint and test"
	@echo "make bench      speed, memory and accuracy beside PEFT's own way; writes $(RESULTS)/"
	@echo "make fuzz       a million hostile inputs for the parsers; writes $(RESULTS)/fuzz.json"
	@echo "make clean      remove everything that was generated"

demo: $(STAMP)
	@$(BIN)/pissa-hub demo

test: $(STAMP)
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

test-slow: $(STAMP)
	@$(BIN)/python -m pytest -m "slow and not gpu" $(ARGS)

lint: $(STAMP)
	@$(BIN)/ruff format --check $(SOURCES)
	@$(BIN)/ruff check $(SOURCES)
	@$(BIN)/mypy -p pissa_hub -p benchmarks

check: lint test

bench: $(STAMP)
	@$(BIN)/python -m benchmarks.compare --json $(RESULTS)/compare.json
	@$(BIN)/python -m benchmarks.compare --memory --json $(RESULTS)/memory.json
	@$(BIN)/python -m benchmarks.breakdown --json $(RESULTS)/breakdown.json
	@$(BIN)/python -m benchmarks.svd_table --json $(RESULTS)/svd.json
	@$(BIN)/python -m benchmarks.conversion --json $(RESULTS)/conversion.json

# Where there is no atheris, the extra is empty and the mutator works by itself.
fuzz: $(STAMP)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c $(CONSTRAINTS) -e '.[fuzz]'
	@$(BIN)/python -m tests.fuzz --json $(RESULTS)/fuzz.json $(ARGS)

# One pip command, so that the constraints hold for every package it resolves.
$(STAMP): pyproject.toml $(CONSTRAINTS) | .cache/tmp
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing into $(VENV) (once; takes a few minutes)" >&2
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c $(CONSTRAINTS) -e '.[dev,demo,plot]'
	@touch $@

.cache/tmp:
	@mkdir -p $@

clean:
	rm -rf $(VENV) .cache build dist demo *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
