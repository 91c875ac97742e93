# One word per chore. Everything runs in .venv, which `make install` makes.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PIP    := $(BIN)/pip --disable-pip-version-check -q
# Where torch's default wheel brings gigabytes of CUDA libraries, point this at a CPU index.
TORCH_INDEX ?=
# Tests share two cores with the servers that they start.
JOBS ?= 2
# Which benchmarks to run: `make bench BENCH=loss`. `python -m bench COMMAND --help` lists what each takes.
BENCH ?= flops rouge loss step generate curriculum

.PHONY: help install demo serve bench test test-slow test-all check fix clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

install: $(STAMP) ## Make the environment

$(STAMP): pyproject.toml constraints.txt $(wildcard requirements/*.txt)
	@echo "Installing into $(VENV) (a few minutes the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	@$(PIP) install --no-deps --require-hashes -r requirements/embedded.txt
	@$(PIP) install -c constraints.txt -e '.[engine,dev]'
	@touch $@

demo: $(STAMP) ## Distil a real model over HTTP, and check that it learned
	@$(BIN)/python examples/demo.py

serve: $(STAMP) ## Start the service on 127.0.0.1:8000 and stay
	@$(BIN)/python -m worker serve

bench: $(STAMP) ## Time it side by side with others (about 20 minutes; figures in runs/bench)
	@$(BIN)/python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("trl") is None)' \
	  || $(PIP) install -c constraints.txt -e '.[bench]'
	@for command in $(BENCH); do $(BIN)/python -m bench $$command --json runs/bench/$$command.json || exit 1; echo; done

test: check ## Lint, types, import contracts and the test suite
	@OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal

test-slow: $(STAMP) ## The cases that `make test` leaves out for their length
	@OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal -m slow

test-all: test test-slow ## Both

check: $(STAMP) ## Lint, types, import contracts
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

fix: $(STAMP) ## Format, and correct what the linter can
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

clean: ## Remove the environment; .pocl (jobs, models) stays
	rm -rf $(VENV) *.egg-info
