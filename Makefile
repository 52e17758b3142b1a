# The doors of the house: `make` alone lists them. Each one sets up what it needs first.
SHELL := bash
.DEFAULT_GOAL := help
.PHONY: help setup demo test lint types docs bench clean

BIN := .venv/bin
ARGS ?=

help:  ## List these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-7s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "  Further arguments go into ARGS:  make demo ARGS=--null    make test ARGS='-k recipe'"

setup:  ## Make .venv and install everything into it (a few minutes, once)
	@.ci/setup dev $(if $(filter setup,$(MAKECMDGOALS)),say)

demo: setup  ## The whole way on synthetic exams, CPU only; a report in runs/demo
	@$(BIN)/umbif demo $(ARGS)

test: setup  ## Run the tests, CPU only, without network
	@$(BIN)/python -m pytest $(ARGS)

lint: setup  ## Look for mistakes and untidy code (ruff)
	@$(BIN)/ruff check $(ARGS)

types: setup  ## Check the types (mypy)
	@$(BIN)/mypy $(ARGS)

docs: setup  ## Build the documentation into build/docs
	@.ci/setup docs
	@$(BIN)/python -m sphinx -q -W --keep-going docs build/docs $(ARGS)
	@echo "Open build/docs/index.html"

bench: setup  ## Run the benchmarks in their short form
	@.ci/setup bench
	@for file in $$(grep -l -e '"--quick"' benchmarks/[!_]*.py); do \
	  echo "$$file"; $(BIN)/python "$$file" --quick $(ARGS) || exit; done

clean:  ## Remove what was built; .venv, runs/ and data stay
	@rm -rf build dist .mypy_cache .ruff_cache .pytest_cache *.egg-info
	@find umbif tests benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} +
