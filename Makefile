# Each line is a command that one could type. `make` alone lists what there is.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
CONFIG ?= configs/lenet_digits.yaml
ARGS   ?=
PICTURED := configs/resnet18_shapes.yaml
JOBS   ?= 2

.DEFAULT_GOAL := help
.PHONY: help install install-dev train test test-slow docs-test faults accuracies bench pictures docs lint format clean

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
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow" $(ARGS)

test-slow: install-dev  ## what takes longer: real trainings, whole model lists
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m slow $(ARGS)

docs-test: install-dev  ## follow README and docs/, command by command
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile tests/test_documents.py tests/test_plugin_page.py tests/test_readme.py $(ARGS)

faults: install-dev  ## kill, interrupt and damage runs, and write what was survived; 10 minutes
	$(BIN)/python -m tests.faults > .faults.md
	mv .faults.md docs/measured/faults.md
	cat docs/measured/faults.md

accuracies: install-dev  ## train on the sets that need no download, with three seeds, and write what was reached; 20 minutes
	$(BIN)/python tools/compare.py --train configs/lenet_digits.yaml configs/lenet_shapes.yaml configs/resnet18_shapes.yaml \
		--seeds 1,2,3 --jobs $(JOBS) -o runs/accuracies --markdown .accuracies.md
	(echo "$$(nproc) cores (CPU), $$(date +%F):"; echo; cat .accuracies.md) > docs/measured/accuracies.md
	rm .accuracies.md

pictures: install-dev  ## train two small runs, and draw the pictures of README and docs/tools.md
	$(BIN)/python main.py -c $(PICTURED) -e runs/pictures -r auto --data.n_train 6000 --data.n_test 600 --data.difficulty 0.2 --train.n_epochs 6
	$(BIN)/python main.py -c configs/segmentation_resnet18_shapes.yaml -e runs/pictures-masks -r auto
	mkdir -p docs/pictures
	$(BIN)/python tools/visualize.py predictions runs/pictures-masks --n 8 -o docs/pictures/masks.png
	$(BIN)/python tools/visualize.py data -c $(PICTURED) --augment.mixup 0.4 --augment.cutmix 1 -o docs/pictures/data.png
	$(BIN)/python tools/visualize.py schedule -c $(PICTURED) -o docs/pictures/schedule.png
	$(BIN)/python tools/visualize.py predictions runs/pictures --wrong --n 16 -o docs/pictures/mistakes.png
	$(BIN)/python tools/visualize.py gradcam runs/pictures --n 8 -o docs/pictures/gradcam.png
	for what in curves features embeddings confusion calibration model; do \
		$(BIN)/python tools/visualize.py $$what runs/pictures -o docs/pictures/$$what.png || exit 1; done

bench: install-dev  ## measure the speed beside what others use, on an idle machine; 20 minutes
	$(BIN)/python tools/benchmark.py all --output docs/measured
	cat docs/measured/benchmark.md

docs: install-dev  ## write what documents derive from the code and from the figures in docs/measured
	$(BIN)/python tools/document.py

lint: install-dev  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install-dev  ## mend the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove caches and the virtual environment; runs/ stays
	rm -rf $(VENV) .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
