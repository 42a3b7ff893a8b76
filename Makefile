.DEFAULT_GOAL := help
.PHONY: help reproduce test lab lint bench

PYTHON ?= python3
BIN := .venv/bin

# glibc gives every big tensor back to the kernel at each free, and faults it in again: twice the time of a step
export MALLOC_MMAP_THRESHOLD_ := 4000000000
export MALLOC_TRIM_THRESHOLD_ := 8000000000
export MALLOC_TOP_PAD_ := 500000000

help:           ## what there is
	@grep -E '^[a-z]+:.*##' Makefile | sed 's/:.*##/ -/'

.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

reproduce: .venv/installed  ## train the prompts, evaluate, rewrite reports/ (4 to 15 minutes on two cores, after the install)
	$(BIN)/cfclip sweep notebooks/presets/paper-toonfaces.yaml --quick

test: .venv/installed       ## unit tests, and the notebooks at their smoke defaults
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest

lab: .venv/installed        ## JupyterLab on the notebooks, with the explorer open
	$(BIN)/jupyter lab notebooks/05_explorer.ipynb

lint: .venv/installed       ## style
	$(BIN)/ruff check .

bench: .venv/installed      ## speed and memory against the published recipe's work, into reports/bench/MACHINE (an hour of a quiet machine)
	$(BIN)/cfclip bench
