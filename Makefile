# Every target does its own set-up. PIP_ARGS passes options to pip, e.g. PIP_ARGS="--index-url ... --extra-index-url ...".
PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
# One thread per process: on a busy machine two are slower than one.
export OMP_NUM_THREADS ?= 1

.PHONY: help install install-dev demo test coverage test-slow check format docs build clean

help:
	@echo "make demo       train a backdoored network, cut the backdoor out, prove it (about a minute)"
	@echo "make test       the test suite          make test-slow  fuzzing, real checkpoints, browser"
	@echo "make coverage   the same, with the lines and branches it leaves out"
	@echo "make check      format, lint, types, spelling, docs"
	@echo "make install    set up .venv only       make format     let ruff tidy the code"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt --no-deps torchattacks # it pins a requests of 2021
	@touch $@ $(VENV)/.installed

install: $(VENV)/.installed

install-dev: $(VENV)/.installed-dev

demo: $(VENV)/.installed
	@$(BIN)/secateur demo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(TEST_ARGS)

# Never takes its probes out again: the fuzz tests watch for new code objects.
coverage: $(VENV)/.installed-dev
	$(BIN)/python -m slipcover --branch --source src/secateur --threshold 2000000000 --skip-covered --missing-width 60 \
		--fail-under 90 -m pytest $(TEST_ARGS)

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow $(TEST_ARGS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/codespell
	$(BIN)/python scripts/generate_docs.py --check

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-dev
	$(BIN)/python scripts/generate_docs.py

build: $(VENV)/.installed-dev
	$(BIN)/python -m build

clean:
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis
