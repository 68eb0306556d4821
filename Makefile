# One command for each thing; everything lives in .venv, which `make clean` removes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
OUT ?= runs

.PHONY: help demo test check bench bench-gpu docs clean

help:
	@echo "make demo   train real models under three policies, side by side, and write a page"
	@echo "make test   run every test"
	@echo "make check  ruff, mypy --strict, docs build with warnings as errors"
	@echo "make bench  the benchmarks against the peers"
	@echo "make bench-gpu  the same on a GPU, in 8 minutes; needs nothing but torch and this folder"
	@echo "make docs   build the documentation into docs/_build/html"
	@echo "make clean  remove the environment and everything built"

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("halfstep needs Python 3.11 or newer, this is " + sys.version) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)

# The stamps reinstall when the dependencies change, and only then.
$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install -q -c constraints.txt -e '.[demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.demo

demo: $(VENV)/.demo
	$(BIN)/halfstep doctor
	$(BIN)/halfstep compare digits-conv pydoc-gpt --threads 1 --json $(OUT)/demo.json --html $(OUT)/demo.html

test: $(VENV)/.dev
	$(BIN)/python -m pytest -q -n 2
	KERAS_BACKEND=jax $(BIN)/python -m pytest -q -n 2 tests/keras
	KERAS_BACKEND=tensorflow $(BIN)/python -m pytest -q -n 2 tests/keras

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MAKE) --no-print-directory docs

docs: $(VENV)/.dev
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks

# No environment of its own: the torch that the machine has, with its CUDA, is what counts.
# (Beside it NumPy and ml_dtypes must be there: halfstep's only dependencies.)
bench-gpu:
	PYTHONPATH=src $(PYTHON) -m benchmarks.gpu

clean:
	rm -rf $(VENV) build dist docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
