# `make demo` and `make test` set up everything themselves, in .venv, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
MODELS_VENV := .venv-models
MODELS_BIN := $(MODELS_VENV)/bin
MODELS_INSTALLED := $(MODELS_VENV)/.installed
# Without an NVIDIA GPU, keep torch on its CPU build (see constraints.txt).
CONSTRAINTS ?= $(if $(shell command -v nvidia-smi),,--constraint constraints.txt)

.PHONY: demo test test-models test-versions format lint types docs notebooks check bench clean

demo: $(INSTALLED)  ## the whole way once: Flax, torch, 4 bits; MODEL=folder and TEXT=path are optional
	$(BIN)/python examples/demo/demo.py $(if $(MODEL),--model $(MODEL)) $(if $(TEXT),--text $(TEXT))

# Most of the time of JAX's tests goes into compiling what runs once; the exhaustive cases are compiled as for users.
# XLA refuses flags that it does not know: they are those of the jax in constraints.txt.
QUICK_XLA := --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1
QUICK := JAX_DISABLE_MOST_OPTIMIZATIONS=1 $(if $(CONSTRAINTS),XLA_FLAGS="$(QUICK_XLA)")
test: $(INSTALLED)  ## the test suite; ARGS="-m slow" for the exhaustive cases
	$(if $(ARGS),,$(QUICK)) $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

test-models: $(MODELS_INSTALLED)  ## third parties' JAX models, in an environment of their own; ARGS as above
	$(MODELS_BIN)/python -m pytest tests/models $(ARGS)

test-versions:  ## tests/jax with the oldest and the newest versions that pyproject.toml admits; PYTHON=python3.13 as well
	for versions in oldest newest; do \
		$(PYTHON) -m venv --clear .venv-$$versions && \
		.venv-$$versions/bin/python -m pip install --quiet --editable ".[jax,orbax,qwix]" \
			$$(test $$versions = newest || echo --constraint tests/jax/oldest.txt) \
			beartype chex hypothesis pytest pytest-xdist safetensors && \
		.venv-$$versions/bin/python -m pytest tests/jax --numprocesses auto --maxprocesses 4 --dist loadfile $(ARGS) \
		|| exit 1; \
	done

format: $(INSTALLED)  ## write what lint would complain about
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(INSTALLED)
	$(BIN)/mypy

docs: $(INSTALLED)  ## the site, in docs/_build/html; any warning fails
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going --nitpicky docs docs/_build/html

NOTEBOOKS := 01_first_adapter_flax 02_first_adapter_torch
notebooks: $(INSTALLED)  ## made from the examples of the same names, without output
	for name in $(NOTEBOOKS); do $(BIN)/jupytext --quiet --from py:percent --to ipynb --set-kernel python3 \
		--output examples/notebooks/$$name.ipynb examples/$$name.py || exit 1; done

check: lint types test docs  ## what CI runs

BENCHMARKS := summary model_step layer_step accumulation jax_step memory bases checkpoint convert
bench: $(INSTALLED)  ## measure what the README claims, into benchmarks/results, all of it even if a claim fails
	failed=; for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py || failed="$$failed $$name"; done; \
		test -z "$$failed" || { echo "claims failed:$$failed"; exit 1; }

clean:
	rm -rf $(VENV) $(MODELS_VENV) .venv-oldest .venv-newest build dist *.egg-info

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile $(CONSTRAINTS) --editable ".[dev]"
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib >/dev/null || true  # pip would use one core; some files are templates
	touch $@

$(MODELS_INSTALLED): pyproject.toml tests/models/requirements.txt tests/models/constraints.txt
	test -x $(MODELS_BIN)/python || $(PYTHON) -m venv $(MODELS_VENV)
	$(MODELS_BIN)/python -m pip install --quiet --constraint tests/models/constraints.txt \
		--requirement tests/models/requirements.txt --editable ".[jax,peft]"
	touch $@
