# Two commands for a fresh machine: `make train` and `make test`. Everything is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test test-all lint bench clean

train: .venv/installed
	$(BIN)/python -m fastroberta.train

# One process per core, one thread each: tests on small tensors spend their time in Python, not in matrix products.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

# A few minutes on two cores: before every commit.
test: .venv/installed-test
	$(PYTEST)

# Also the tests marked `slow`: before a release and after changing a kernel.
# `make test-all TESTS=tests/bench/test_resources.py` runs one piece; each marked test says how long it takes.
test-all: .venv/installed-test
	$(PYTEST) -m "slow or not slow" $(TESTS)

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --diff fastroberta kernels bench tests
	$(BIN)/mypy

bench: .venv/installed-bench
	$(BIN)/python -m bench all --quick

clean:
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
