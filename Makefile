# Each line is a command that can be typed by hand. `make` without a target lists the targets.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
CONFIG ?= configs/lenet_digits.yaml
ARGS   ?=
PICTURED := configs/resnet18_shapes.yaml
JOBS   ?= 2

.DEFAULT_GOAL := help
.PHONY: help install install-dev train test test-slow docs-test faults exam trajectories planted duplicates verdicts results bench pictures \
        docs lint format clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

install: $(VENV)/.installed  ## create .venv with the dependencies of training and tools

install-dev: $(VENV)/.installed-dev  ## the same, with the dependencies of tests and linters

$(VENV)/.installed: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.installed-dev: requirements.txt requirements-extra.txt requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $(VENV)/.installed $@

train: install  ## train a config: make train CONFIG=configs/resnet18_cifar10.yaml ARGS="--train.optim.type Adam"
	$(BIN)/python main.py -c $(CONFIG) $(ARGS)

test: install-dev  ## run the tests; at most 10 minutes on two cores
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not slow" $(ARGS)

test-slow: install-dev  ## run the slow tests: real trainings, every model
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m slow $(ARGS)

docs-test: install-dev  ## run the commands of README and docs/
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile tests/test_documents.py tests/test_plugin_page.py tests/test_readme.py $(ARGS)

faults: install-dev  ## kill, interrupt and damage runs; update the tables of docs/reliability.md; half an hour
	$(BIN)/python -m tests.faults > .faults.md
	mv .faults.md docs/measured/faults.md
	cat docs/measured/faults.md

exam: install-dev  ## kill, damage and resume trainings of this and other frameworks; ten minutes: make exam ARGS="--frameworks ours timm"
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-rivals.txt
	$(BIN)/python -m tests.exam --output docs/measured $(ARGS)

trajectories: install-dev  ## record the curves of tests/trajectories anew and show the difference; outside of the band give WHY="line of CHANGELOG.md"
	$(BIN)/python -m tests.trajectories record --why "$(WHY)" $(ARGS)

planted: install-dev  ## plant bugs that tests/trajectories must find; update the tables of docs/reliability.md; ten minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.trajectories measure > .planted.md
	mv .planted.md docs/measured/trajectories.md
	cat docs/measured/trajectories.md

duplicates: install-dev  ## measure the search for duplicates: make duplicates PHOTOS=folder CIFAR=folder; 15 minutes
	$(BIN)/python -m tests.measured_duplicates $(PHOTOS) $(CIFAR) > .duplicates.md
	mv .duplicates.md docs/measured/duplicates.md
	cat docs/measured/duplicates.md

verdicts: install-dev  ## measure how often verdicts are right: make verdicts MNIST=folder; four minutes
	$(BIN)/python -m tests.verdicts $(if $(MNIST),--data $(MNIST))

results: install-dev  ## train the rows of docs/results.yaml that aren't measured yet: make results ARGS="--data MNIST=~/data/MNIST"
	$(BIN)/python tools/results.py $(ARGS)
	$(BIN)/python tools/results.py --picture docs/pictures/results.png

pictures: install-dev  ## train two small runs and draw the pictures of README and docs/
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

bench: install-dev  ## compare the speed with other projects, on an idle machine; 30 minutes
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-rivals.txt
	$(BIN)/python tools/benchmark.py all --output docs/measured
	cat docs/measured/benchmark.md

docs: install-dev  ## update the generated parts of README, docs/ and configs/schema.json
	$(BIN)/python tools/document.py

lint: install-dev  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install-dev  ## fix the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove caches and .venv; keep runs/
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
