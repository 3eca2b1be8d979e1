# `make demo` and `make test` set up everything themselves, in .venv, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Without an NVIDIA GPU, keep torch on its CPU build (see constraints.txt).
CONSTRAINTS ?= $(if $(shell command -v nvidia-smi),,--constraint constraints.txt)

.PHONY: demo test lint check bench clean

demo: $(INSTALLED)  ## the whole way once: Flax, torch, 4 bits; MODEL=folder and TEXT=path are optional
	$(BIN)/python examples/demo.py $(if $(MODEL),--model $(MODEL)) $(if $(TEXT),--text $(TEXT))

test: $(INSTALLED)  ## the test suite; ARGS="-m slow" for the exhaustive cases
	$(BIN)/python -m pytest $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

check: lint test  ## what CI runs

bench: $(INSTALLED)  ## measure what the README claims, into benchmarks/results
	$(BIN)/python benchmarks/bases.py
	$(BIN)/python benchmarks/checkpoint.py

clean:
	rm -rf $(VENV) build dist *.egg-info

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) --editable ".[dev]"
	touch $@
