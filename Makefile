# Every target sets up what it needs in .venv; nothing is installed again until pyproject.toml,
# constraints.txt or PYTHON's environment changes. `make PYTHON=python3.12 test` picks a Python.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
BENCHMARKS := $(filter-out benchmarks/_%,$(wildcard benchmarks/*.py))

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench docs clean

help: ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-7s %s\n", $$1, $$2}'

demo: $(VENV)/core.stamp ## fold the packaged adapters and measure what it costs (two minutes)
	$(BIN)/lorafold demo --overwrite

# Two processes, and a thread each: torch's threads for small tensors wait for one another.
test: lint ## lint, types and all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/test.stamp ## ruff (rules and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/bench.stamp ## every benchmark; results go to benchmarks/results/, by machine
	@for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python $$script --save || exit 1; done

docs: $(VENV)/docs.stamp ## the documentation as a site, with the API, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html"

clean: ## remove the environment, caches and build output
	rm -rf $(VENV) lorafold-demo build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch on its own and first: the pinned build stays, so that no later resolution can swap a CPU
# build for gigabytes of CUDA libraries.
$(VENV)/torch.stamp: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	@touch $@

$(VENV)/core.stamp: $(VENV)/torch.stamp pyproject.toml
	$(PIP) -e .
	@touch $@

$(VENV)/bench.stamp: $(VENV)/torch.stamp pyproject.toml
	$(PIP) -e '.[bench]'
	@touch $@

$(VENV)/docs.stamp: $(VENV)/torch.stamp pyproject.toml
	$(PIP) -e '.[docs]'
	@touch $@

$(VENV)/test.stamp: $(VENV)/torch.stamp pyproject.toml
	$(PIP) -e '.[test]'
	@touch $@
