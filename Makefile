.DEFAULT_GOAL := help
.PHONY: help reproduce test long lab notebooks lint format bench

PYTHON ?= python3
BIN := .venv/bin
# the exact versions that the committed numbers were made with; the default is free, because a GPU machine has its own torch
PINS := $(if $(LOCKED),--constraint requirements.lock)
INSTALLED := .venv/installed$(LOCKED)

# glibc returns each large tensor to the kernel when it is freed, and page-faults it in again: twice the time of a step
export MALLOC_MMAP_THRESHOLD_ := 4000000000
export MALLOC_TRIM_THRESHOLD_ := 8000000000
export MALLOC_TOP_PAD_ := 500000000
# a thread that waits for the others sleeps: one that spins on a busy machine takes the core that they need
export OMP_WAIT_POLICY := PASSIVE

help:           ## list the targets
	@grep -E '^[a-z]+:.*##' Makefile | sed 's/:.*##/ -/'

$(INSTALLED): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' $(PINS)
	@touch $@

reproduce: $(INSTALLED)  ## train the prompts, evaluate, rewrite reports/ (4 to 15 minutes on two cores, after the install)
	$(BIN)/cfclip sweep notebooks/presets/paper-toonfaces.yaml --quick

test: $(INSTALLED)       ## unit tests, and the notebooks at the settings of presets/smoke.yaml; one thread per process; a notebook stays in one process
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

long: $(INSTALLED)       ## the tests that take half a minute each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -m long -n auto --dist loadfile

lab: $(INSTALLED)        ## JupyterLab on the notebooks, with the explorer open
	$(BIN)/jupyter lab notebooks/05_explorer.ipynb

notebooks: $(INSTALLED)  ## execute the committed notebooks (half an hour of one core); make notebooks NAMES="00_tour 02_training"
	$(BIN)/cfclip notebooks $(NAMES)

lint: $(INSTALLED)       ## style, and who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

format: $(INSTALLED)     ## mend the style, and the line numbers of links to code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/cfclip notebooks --links

bench: $(INSTALLED)      ## speed and memory against the published recipe's work, into reports/bench/MACHINE (an hour of a quiet machine)
	$(BIN)/cfclip bench
