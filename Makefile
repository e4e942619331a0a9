# Two commands for a fresh machine: `make train` and `make test`. Everything is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help train test test-all lint bench clean

help:  ## list what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

train: .venv/installed-plot  ## train a small model on Python's own documentation, to see it work
	$(BIN)/python -m fastroberta.train

# One process per core, one thread each: tests on small tensors spend their time in Python, not in matrix products.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

test: .venv/installed-test  ## run the tests, a few minutes on two cores: before every commit
	$(PYTEST)

# `make test-all TESTS=tests/bench/test_resources.py` runs one part; each slow test says how long it takes.
test-all: .venv/installed-test  ## run the slow tests too: before a release, and when a kernel has changed
	$(PYTEST) -m "slow or not slow" $(TESTS)

lint: .venv/installed-dev  ## check style and types; changes no file
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --diff fastroberta kernels bench tests
	$(BIN)/mypy

bench: .venv/installed-bench  ## run the benchmark suite on this machine
	$(BIN)/python -m bench all --quick

clean:  ## remove the environment
	rm -rf .venv

# torch comes first and by its exact version: pip then takes a build that lies on the machine (a CPU build, say) where
# there is one, and the ordinary one elsewhere.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/installed-%: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$*]"
	touch $@
