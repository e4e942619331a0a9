# Two commands for a fresh machine: `make train` and `make test`. Everything is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test lint bench clean

train: .venv/installed
	$(BIN)/python -m fastroberta.train

# A process a core, each with one thread: tests of small tensors spend their time in Python, not in matrix products.
test: .venv/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

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
