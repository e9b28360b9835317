# Needs Python 3.11 or newer, pip and make; everything else is set up here.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/quickstart
PARITY ?= .venv-parity
CLIENTS ?= .venv-clients
# make test-torch: a release of PyTorch, and the tests to run
TORCH ?= 2.11.0
TESTS ?= tests
TRIED := .venv-torch-$(TORCH)

# pip leaves compiling to the first import (a minute saved), so imports must be allowed to keep what they compile
export PYTHONDONTWRITEBYTECODE :=
export PIP_DISABLE_PIP_VERSION_CHECK := 1
PIP := -m pip install --quiet --no-compile --constraint constraints.txt
INSTALL := $(BIN)/python $(PIP)

.PHONY: quickstart test test-torch clients wheels soak parity parity-data lint format docs docs-tables constraints clean help

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

quickstart: $(VENV)/.installed ## set up, train on real digits, predict, evaluate (about 3 minutes, 1.2 once set up)
	$(BIN)/conv2former train --recipe quickstart --out $(RUN) --overwrite
	$(BIN)/conv2former predict $(RUN) $(RUN)/samples --out $(RUN)/predictions --top-k 3
	@$(BIN)/conv2former evaluate $(RUN)

test: $(VENV)/.installed-dev lint ## set up, check style and types, run the tests
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

test-torch: $(TRIED)/.installed ## the tests under another release of PyTorch: make test-torch TORCH=2.11.0
	$(TRIED)/bin/python -c 'import torch; print("PyTorch", torch.__version__)'
	$(TRIED)/bin/python -m pytest --numprocesses 2 --dist worksteal $(TESTS)

clients: $(CLIENTS)/.installed ## try the libraries that people put around timm models, write docs/clients.md (4 minutes)
	$(CLIENTS)/bin/python tests/clients/run.py

wheels: $(VENV)/.installed-dev ## both wheels with compiled kernels, into dist/ (2 minutes)
	rm -rf build src/conv2former_runtime/build
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist . src/conv2former_runtime
	rm -rf build src/conv2former_runtime/build src/conv2former_runtime/*.egg-info
	@ls dist/*.whl

soak: $(VENV)/.installed-dev ## 200 faults at random moments, runs that end equal (hours; goes on where it was stopped)
	$(BIN)/python tests/soak.py --folder soak --summary docs/results/soak.md

parity: parity-data $(PARITY)/.installed ## compare with mmdet and mmseg: make parity COCO=DIR CAMVID=DIR (docs/parity.md)
	$(PARITY)/bin/python tests/parity/detection.py --coco $(COCO)
	$(PARITY)/bin/python tests/parity/segmentation.py --camvid $(CAMVID)

parity-data:
	@test -d "$(COCO)" -a -d "$(CAMVID)" || \
	  { echo 'name the folders of COCO and of CamVid: make parity COCO=DIR CAMVID=DIR' >&2; exit 2; }

lint: $(VENV)/.installed-dev ## style, types, and what may import what
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev ## put the code into the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-dev ## build the site into build/site, warnings being errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs-tables: $(VENV)/.installed ## write the tables that commands make
	$(BIN)/python docs/tables.py

constraints: $(VENV)/.installed-dev ## write constraints.txt from what is installed
	{ sed -n '/^#/p' constraints.txt; $(BIN)/python -m pip freeze --all --exclude pip --exclude-editable; } > constraints.new
	mv constraints.new constraints.txt

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(INSTALL) --editable '.[dev]'
	touch $@

# What mmengine, mmdet and mmseg say they require excludes today's PyTorch: the list is complete without asking them.
$(PARITY)/.installed: pyproject.toml constraints.txt tests/parity/requirements.txt
	test -x $(PARITY)/bin/python || $(PYTHON) -m venv $(PARITY)
	$(PARITY)/bin/python $(PIP) --editable .
	$(PARITY)/bin/python -m pip install --quiet --no-deps --requirement tests/parity/requirements.txt
	touch $@

# What PyTorch brings or pins itself is left to its release, and torchvision names the one that it belongs to.
$(TRIED)/.installed: pyproject.toml constraints.txt
	test -x $(TRIED)/bin/python || $(PYTHON) -m venv $(TRIED)
	grep -vE '^(torch|torchvision|triton|setuptools|nvidia-.*|cuda-.*)==' constraints.txt > $(TRIED)/constraints.txt
	$(TRIED)/bin/python -m pip install --quiet --no-compile --constraint $(TRIED)/constraints.txt \
	  'torch==$(TORCH)' torchvision --editable '.[dev]'
	touch $@

$(CLIENTS)/.installed: pyproject.toml constraints.txt tests/clients/requirements.txt
	test -x $(CLIENTS)/bin/python || $(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python $(PIP) --editable .
	DS_BUILD_OPS=0 $(CLIENTS)/bin/python $(PIP) --requirement tests/clients/requirements.txt
	touch $@

clean: ## remove the virtual environment and what tools left
	rm -rf $(VENV) $(PARITY) $(CLIENTS) .venv-torch-* build dist .pytest_cache .ruff_cache .mypy_cache src/*.egg-info
