# One vocabulary for people, hooks and CI. `make help` lists it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := demo-output
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format bench clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-9s %s\n", $$1, $$2}'

install: $(STAMP) ## make .venv with everything, at the versions of constraints.txt

# torch first: with 2.13.0 present nothing later asks for a CUDA build.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: install ## checkpoint -> package -> a text 100 times the budget -> what the cache kept
	$(BIN)/python examples/demo.py --output $(DEMO)

test: install lint ## linters, types and all tests
	$(BIN)/pytest --numprocesses $(WORKERS) --dist worksteal

lint: install ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install ## export cost and constant cost; needs 30 GB of disk and some minutes
	$(BIN)/python benchmarks/constant_cost.py
	$(BIN)/python benchmarks/export_cost.py

clean: ## remove everything that make made
	rm -rf $(VENV) $(DEMO) bench-output .mypy_cache .pytest_cache .ruff_cache
