# `make` lists the targets. The environment is made once, by the first target that needs it.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
DATASET ?=
BUDGET ?= lite
SEEDS ?= 3
DATA ?=
GPUS ?=
LAUNCHER ?=
ARGS ?=

FFCV_NEEDS := libopencv-dev libturbojpeg0-dev pkg-config g++
READY := $(VENV)/.ready
KN := $(VENV)/bin/kalmannorm
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist worksteal
quoted = '$(subst ','\'',$(1))'
OVERRIDES = $(if $(DATASET),dataset=$(DATASET)) budget=$(BUDGET) $(if $(DATA),data=$(call quoted,$(DATA))) $(WHERE) $(ARGS)
WHERE = $(if $(LAUNCHER),launcher=$(LAUNCHER)) $(if $(GPUS),gpus=$(GPUS))
DEMO := dataset=digits budget=lite arch.width=0.25 rows=paper seeds=3 results=results/demo
EXPERIMENTS := $(basename $(notdir $(wildcard conf/experiment/*.yaml)))
DATASETS := cifar10 cifar100 svhn svhn_extra playback coco-tiny-maps
IMAGENET := table1 table4 table5 figure3 talk-resnet50 $(foreach n,3 4 5 6 7,v1-figure$(n))

.PHONY: help setup setup-ffcv demo test test-all lint bench zoo report notebooks clean $(EXPERIMENTS) $(DATASETS:%=data-%)

help: ## list the targets
	@echo "targets (variables: DATASET=$(DATASET) BUDGET=$(BUDGET) SEEDS=$(SEEDS) DATA=folder GPUS=n LAUNCHER=local|ray|slurm ARGS='overrides'):"
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16 | sed 's/^/  /'
	@for name in $(EXPERIMENTS); do printf '  %-16s%s\n' $$name "$$(sed -n 's/^title: *//p' conf/experiment/$$name.yaml | tr -d '"')"; done
	@printf '  %-16s%s\n' data-NAME "prepare a data set from its official archive: $(DATASETS)"
	@echo "of ImageNet (BUDGET=paper SEEDS=1 unless given): $(IMAGENET)"

# Where Python may not write bytecode (PYTHONDONTWRITEBYTECODE), every process would compile torch anew: seconds each.
setup: $(READY) ## make the environment in .venv (python >= 3.11 and the package registry)

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than 3.11: pass PYTHON=python3.11 or a newer one"; exit 2; }
	@echo "making the environment in $(VENV), once"
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check uv
	@$(VENV)/bin/uv pip install --compile-bytecode --python $(VENV)/bin/python -e '.[dev]'
	@touch $@

setup-ffcv: $(READY) ## FFCV for dataset.loader=ffcv: its Debian or Ubuntu packages (as root or by sudo), then into .venv
	@there=$$(dpkg-query -W -f '$${Status} $${Package}\n' $(FFCV_NEEDS) 2>/dev/null | grep -c '^install ok installed'); \
	  if [ "$$there" -ne $(words $(FFCV_NEEDS)) ]; then \
	    command -v apt-get >/dev/null || { echo "FFCV needs $(FFCV_NEEDS) or what your system calls them: install them, then make setup-ffcv"; exit 2; }; \
	    sudo=$$([ "$$(id -u)" -eq 0 ] || echo sudo); \
	    $$sudo apt-get update -qq && $$sudo apt-get install -y -qq --no-install-recommends $(FFCV_NEEDS); \
	  fi
	@$(VENV)/bin/uv pip install --python $(VENV)/bin/python -e '.[dev,ffcv]'
	@$(VENV)/bin/python -c 'import ffcv, sys; print("FFCV is installed:", ffcv.__file__, file=sys.stderr)'

demo: $(READY) ## Table 7 and Figure 5 on the bundled digits: 9 trainings, about 4 minutes on 2 cores
	@$(KN) sweep table7 $(DEMO)
	@$(KN) report figure5 $(DEMO)
	@$(KN) report table7 $(DEMO)

# On ImageNet the default is the papers' experiments, since a CPU cannot afford even a lite one.
$(IMAGENET): BUDGET = paper
$(IMAGENET): SEEDS = 1
# Experiments that record single steps.
death talk-conditioning: BUDGET = start
death talk-conditioning: SEEDS = 1

# Runs what is missing of an experiment, then writes its table or figure from all records; the exit code is the runs'.
$(EXPERIMENTS): $(READY)
	@$(KN) sweep $@ seeds=$(SEEDS) $(OVERRIDES); code=$$?; $(KN) report $@ $(OVERRIDES) || exit; exit $$code

report: $(READY) ## all tables and figures, the claims, results/report.html, docs/results.md; from the records alone
	@$(KN) report

$(DATASETS:%=data-%): data-%: $(READY)
	@$(KN) data prepare $* $(if $(DATA),--root $(call quoted,$(DATA)))

notebooks: $(READY) ## execute the notebooks on the records, in place
	@$(VENV)/bin/jupyter nbconvert --execute --inplace --ClearMetadataPreprocessor.enabled=True notebooks/*.ipynb

test: $(READY) ## the quick tests, about 4 minutes on 2 cores
	@$(PYTEST) -m "not slow"

test-all: $(READY) ## all the tests, within 40 minutes on 2 cores
	@$(PYTEST) --durations=15

lint: $(READY) ## ruff and mypy
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy

bench: $(READY) ## speed and memory, as ratios
	@$(VENV)/bin/python benchmarks/bench.py --results results

zoo: $(READY) ## convert, train a step, save, load and fold models of torchvision, timm and transformers: docs/zoo.md
	@$(VENV)/bin/python benchmarks/zoo.py

clean: ## remove the environment, runs/ and the demo's results; records stay
	@rm -rf $(VENV) runs results/demo
