PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
WORKERS ?= 2
unexport PYTHONDONTWRITEBYTECODE  # the tests start Python a hundred times, and would read all sources anew each time

# Below every page: the version, and where the sources are, if git knows an address that a browser can open.
SITE_FOOTER = lora_flow $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml), MIT licence.$(and $(REPOSITORY), <a href='$(REPOSITORY)'>Repository</a>.)
REPOSITORY ?= $(filter https://%,$(shell git config --get remote.origin.url 2>/dev/null))

.PHONY: help figure1 figures theory vision test test-long test-package test-interop test-browser lint format docs bench bench-quick bench-gpu clean

help:  ## what each target does
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

figure1: .venv/report  ## run the main job: sweep, store and draw Figure 1 of the paper
	$(BIN)/lora-flow figure 1 --out runs/figure1 --overwrite

figures: figure1  ## run and draw all the experiments
	for name in $$($(BIN)/python -c "from lora_flow.experiments.table import EXPERIMENTS; print(*EXPERIMENTS)"); do \
		case $$name in 1) continue;; [0-9]*) out=figure$$name;; *) out=$$name;; esac; \
		$(BIN)/lora-flow figure $$name --out runs/$$out --overwrite || exit 1; done

theory: .venv/core  ## hold every claim of the theory against runs, about five minutes on two cores
	$(BIN)/lora-flow theory --out runs/theory

vision: .venv/vision  ## check the theory on images: a Vision Transformer on the digits, about five minutes on two cores
	$(BIN)/lora-flow vision --out runs/vision --overwrite

test: .venv/dev .venv/vision  ## run the tests
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test-long: .venv/dev .venv/vision  ## run the tests that take longest, which `make test` leaves out
	$(BIN)/python -m pytest -n $(WORKERS) --dist load -m long

test-package: .venv/dev  ## build the wheel, and run it installed: newest and lowest versions, every Python found
	$(BIN)/python -m pytest -m package tests/test_package.py

test-interop: .venv/dev .venv/vision .venv/interop  ## run the tests against PyTorch's transformers and peft
	$(BIN)/python -m pytest tests/initialization/test_initialization_interop.py tests/dynamics/test_descend_interop.py \
		tests/vision/test_interop.py tests/bridge/test_bridge_interop.py

test-browser: .venv/dev docs  ## run the tests of report.html and of the documentation in Chromium, where the machine has one
	$(BIN)/python -m pytest -m long tests/pages

lint: .venv/dev .venv/vision  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/dev  ## put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/docs  ## build the documentation into site/
	SITE_FOOTER="$(SITE_FOOTER)" $(BIN)/zensical build --clean --strict
	mkdir -p site/mathjax
	cp $$($(BIN)/python -c "import mathjax; print(*mathjax.__path__)")/static/mathjax/es5/tex-svg.js site/mathjax/  # formulas need no network

bench: .venv/bench  ## measure lora_flow beside its peers, and write docs/benchmarks.md
	$(BIN)/python -m benchmarks.run
	$(BIN)/python -m benchmarks.report benchmarks/results/cpu.json

bench-quick: .venv/bench  ## small versions of the benchmarks, to see that they run
	$(BIN)/python -m benchmarks.run --quick

bench-gpu: .venv/bench  ## the benchmarks on a GPU, where there is one
	$(BIN)/python -m benchmarks.run --gpu

clean:  ## remove everything that these targets make
	rm -rf .venv site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -rf runs/figure1 runs/figure3 runs/figure4 runs/phase runs/beyond runs/theory runs/vision
	rm -rf runs/inits runs/kappa runs/lora-one runs/preconditioner runs/scaling runs/symmetric runs/stable-lora runs/attention
	rm -rf runs/imbalance runs/width runs/adaptive-step runs/growing-step runs/pretraining runs/continual runs/muon runs/learned runs/elasticities

# One virtual environment; each extra is installed when a target first needs it.
.venv/core: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lora_flow needs Python 3.11 or newer")'
	@echo "installing into .venv, which takes some minutes"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install -c constraints.txt -e .
	@touch $@

.venv/dev .venv/docs .venv/notebooks .venv/vision .venv/interop .venv/report: .venv/core
	@echo "installing what $(@F) needs into .venv, which takes some minutes"
	$(PIP) install -c constraints.txt -e '.[$(@F)]'
	@touch $@

# torchode's torchtyping asks for an older typeguard than tyro does; it works with either
.venv/bench: .venv/core
	$(PIP) install -c constraints.txt -e '.[bench]'
	$(PIP) install -c constraints.txt --no-deps torchode torchtyping
	@touch $@
