# make demo: the main job on this machine.  make test: everything that .ci/run checks.
# Each target makes its own virtual environment. PYTHON picks the interpreter (3.10 or later), PIP_ARGS is handed to pip.
PYTHON ?= python3
PIP_ARGS ?=
VENV ?= .venv
WORKERS ?= 2
PY := $(VENV)/bin/python
INSTALL = $(PY) -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --constraint constraints.txt

.PHONY: demo test lint test-gpu bench-gpu clean

demo: $(VENV)/demo.stamp
	$(PY) -m flashloom demo

test: lint
	$(PY) -m pytest -q -n $(WORKERS)

lint: $(VENV)/dev.stamp
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# a machine with a GPU brings its own torch and Triton: these run with its PYTHON
test-gpu:
	PYTHONPATH=src$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) -m pytest -q -m gpu

bench-gpu:
	PYTHONPATH=src:.$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) benchmarks/gpu_attention.py benchmarks/results/gpu_attention.json
	PYTHONPATH=src:.$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) benchmarks/gpu_prefill.py benchmarks/results/gpu_prefill_h100.json

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "flashloom needs Python 3.10 or later; this is `$(PYTHON) --version`. Give another one: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.stamp: $(PY) pyproject.toml constraints.txt
	$(INSTALL) --editable '.[demo]'
	touch $@

$(VENV)/dev.stamp: $(PY) pyproject.toml constraints.txt
	$(INSTALL) --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
