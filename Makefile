# Each line is a command that one could type. `make` alone lists what there is.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
CONFIG ?= configs/lenet_digits.yaml
ARGS   ?=
JOBS   ?= 2

.DEFAULT_GOAL := help
.PHONY: help install install-dev train test test-slow test-long faults bench docs lint format clean

help:  ## list what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

install: $(VENV)/.installed  ## a virtual environment with what a user needs

install-dev: $(VENV)/.installed-dev  ## the same with what a developer needs

$(VENV)/.installed: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.installed-dev: requirements.txt requirements-extra.txt requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $(VENV)/.installed $@

train: install  ## train: make train CONFIG=configs/resnet18_cifar10.yaml ARGS="--train.optim.type Adam"
	$(BIN)/python main.py -c $(CONFIG) $(ARGS)

test: install-dev  ## the tests, in at most 15 minutes on two cores
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow and not long" $(ARGS)

test-slow: install-dev  ## what takes longer: real trainings, whole model lists
	$(BIN)/python -m pytest -n $(JOBS) -m slow $(ARGS) || test $$? -eq 5  # 5: there is none yet

test-long: install-dev  ## what takes longest, by hand: every architecture exported, every command of the documents
	$(BIN)/python -m pytest -n $(JOBS) -m long $(ARGS)

faults: install-dev  ## kill, interrupt and damage runs, and write what was survived; 10 minutes
	$(BIN)/python -m tests.faults > .faults.md
	mv .faults.md docs/measured/faults.md
	cat docs/measured/faults.md

bench: install-dev  ## measure the speed beside what others use, on an idle machine; 15 minutes
	$(BIN)/python tools/benchmark.py all --output docs/measured
	cat docs/measured/benchmark.md

docs: install-dev  ## write what documents derive from the code and from the figures in docs/measured
	$(BIN)/python tools/document.py

lint: install-dev  ## check the style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install-dev  ## mend the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove caches and the virtual environment; runs/ stays
	rm -rf $(VENV) .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
