# One verb per target; continuous integration calls nothing else.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PEERS := .venv-bench
SOURCES := shared services cli models tests deploy k8s docs $(wildcard benchmarks)

.PHONY: help install format lint types imports manifests test test-long bench chaos e2e-s3 e2e-hosts e2e-compose check docs demo reproduce reproduce-full up down clean

help: ## This list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | sort | expand -t 16

$(STAMP): requirements-dev.txt constraints.txt shared/pyproject.toml services/generator/pyproject.toml services/trainer/pyproject.toml cli/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "SynthRep needs Python 3.11 or newer; found $$($(PYTHON) --version). Try: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): two to six minutes, about 7.5 GB"
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-dev.txt
	touch $@

install: $(STAMP) ## Make .venv and install everything into it

format: $(STAMP) ## Rewrite the code in the project's format
	$(BIN)/ruff check --fix --quiet $(SOURCES) || true
	$(BIN)/ruff format $(SOURCES)

lint: $(STAMP) ## Style and bug patterns
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

types: $(STAMP) ## mypy, strict
	$(BIN)/mypy shared/synthrep_shared services/generator/synthrep_generator services/trainer/synthrep_trainer cli/synthrep_cli models/training docs/builder $(wildcard benchmarks)

imports: $(STAMP) ## Who may import whom
	$(BIN)/lint-imports

manifests: $(STAMP) ## Images, compose file, Kubernetes manifests and alarms, without an engine or a cluster
	$(BIN)/python -m pytest -q tests/deployment

test: $(STAMP) ## The tests, small doses of the campaigns
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not long" --ignore=tests/deployment

test-long: $(STAMP) ## The full counts of every campaign, a line a measure
	OMP_NUM_THREADS=1 FUZZ_CASES=20000 PROPERTY_CASES=200 $(BIN)/python -m pytest -q --timeout=3000

chaos: $(STAMP) ## The fault campaign: CHAOS_FAULTS=200 CHAOS_SEED=1
	@CHAOS_FAULTS=$(CHAOS_FAULTS) CHAOS_SEED=$(CHAOS_SEED) $(BIN)/python -m tests.chaos

e2e-s3: $(STAMP) ## Data sets in an object store: moto stands for S3
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m s3

e2e-hosts: $(STAMP) ## Training over two hosts that fail; hosts are network namespaces, so as root on Linux
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.hosts

e2e-compose: $(STAMP) ## The compose file on a Docker engine, which is started if there is none
	$(BIN)/python -m tests.compose

$(PEERS)/.installed: benchmarks/requirements.txt $(STAMP)
	$(BIN)/python -m venv $(PEERS)
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
		> $$($(PEERS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/synthrep.pth
	@grep -v '^#' benchmarks/requirements.txt | while read -r peer; do \
		$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "$$peer" \
			|| echo "peer $$peer does not install here"; done
	touch $@

bench: $(PEERS)/.installed ## Ours against named peers, at most 45 minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks

check: lint types imports manifests test ## Everything that must hold before a change lands

docs: $(STAMP) ## The documentation as a site in site/, links checked; needs no network
	$(BIN)/python -m docs.builder

demo: $(STAMP) ## The whole loop on this machine, in about ten minutes
	$(BIN)/synthrep demo

reproduce: $(STAMP) ## The paper's comparison at CPU size, resumable; half an hour: CONFIG=experiments/pilot.toml
	$(BIN)/synthrep compare --config $(or $(CONFIG),experiments/reproduce.toml)

reproduce-full: $(STAMP) ## The same with the ablations
	$(BIN)/synthrep compare --config $(or $(CONFIG),experiments/reproduce.toml) --ablations

up: $(STAMP) ## All services in this terminal
	$(BIN)/synthrep up

down: ## Stop what `make up` started
	@flock -n runs/up true 2>/dev/null && echo "nothing runs in runs/up" || kill -INT $$(cat runs/up/stack.pid)

clean: ## Remove the environment and the runs
	rm -rf $(VENV) $(PEERS) runs site
