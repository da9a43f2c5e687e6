# Everything from Python alone: each target makes the virtual environment first if it isn't there.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUTPUT ?= $(HOME)/.raycompress/quickstart
export OMP_NUM_THREADS ?= 1
export RAY_USAGE_STATS_ENABLED ?= 0

.PHONY: demo test test-slow lint zoo

$(VENV)/.installed: pyproject.toml tests/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c tests/constraints.txt -e '.[dev]'
	touch $@

$(VENV)/.zoo: $(VENV)/.installed tests/requirements-zoo.txt
	$(BIN)/pip install -q --no-deps -r tests/requirements-zoo.txt
	touch $@

zoo: $(VENV)/.zoo

demo: $(VENV)/.installed
	$(BIN)/python -m raycompress run jobs/quickstart.yaml --output $(OUTPUT)

test: $(VENV)/.installed
	$(BIN)/python -m pytest tests

test-slow: $(VENV)/.zoo
	$(BIN)/python -m pytest tests -m 'slow'

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
