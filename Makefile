# `make bench` and `make test` each do everything: they make .venv, install into it once, and run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: bench test test-rest lint format clean

bench: $(INSTALLED)
	$(BIN)/fewstep bench

# The quick part has every test but the slow ones, and a spread of the cases of each; the rest is what it leaves out.
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test: $(INSTALLED)
	$(PYTEST) --part quick --cov --cov-report=term --cov-fail-under=95

test-rest: $(INSTALLED)
	$(PYTEST) --part rest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Constraints pin what the committed results were made with. Torch goes first, alone: a later resolution must not replace a CPU build.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fewstep needs Python 3.10 or newer, got " + sys.version.split()[0] + "; give another one: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .coverage
