# make demo: the main job on this machine.  make test: everything that .ci/run checks.
# Each target makes its own virtual environment. PYTHON picks the interpreter (3.10 or later), PIP_ARGS is handed to pip.
PYTHON ?= python3
PIP_ARGS ?=
VENV ?= .venv
WORKERS ?= 2
PY := $(VENV)/bin/python
RESULTS ?= benchmarks/results
BENCH = PYTHONPATH=src:.$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) benchmarks
INSTALL = $(PY) -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --constraint constraints.txt

.PHONY: help demo test lint test-gpu bench-gpu clean

help:
	@echo "make demo        the main job on this machine: embeddings, generation, speed, pictures"
	@echo "make test        ruff, mypy and all tests, WORKERS=2 at a time"
	@echo "make lint        ruff and mypy alone"
	@echo "make test-gpu    the tests that need an NVIDIA GPU, with PYTHON's torch and Triton"
	@echo "make bench-gpu   every figure of the attention kernels on a GPU, into RESULTS=$(RESULTS)"
	@echo "make clean       remove environments, caches and what the demo wrote"
	@echo "PYTHON=python3.12 picks the interpreter, PIP_ARGS=... is handed to pip"

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

# Every figure of the attention kernels on a GPU. RESULTS is where the files go, -i goes on after a step that fails, and
# FLASHLOOM_COMMIT=... on make's command line says which commit this is where there is no git.
bench-gpu:
	mkdir -p $(RESULTS)
	$(BENCH)/gpu_attention.py $(RESULTS)/gpu_attention.json
	$(BENCH)/gpu_prefill.py $(RESULTS)/gpu_prefill_h100.json
	$(BENCH)/hopper_fp8.py $(RESULTS)/hopper_fp8_h100.json
	$(BENCH)/dense_calls.py $(RESULTS)/dense_calls_cuda.json

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
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis flashloom-demo
