# Two commands matter: `make demo` and `make test`. Each sets everything up first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV_VERSION := 0.12.24

.PHONY: setup demo test slow check bench gpu lock clean
setup: $(VENV)/.ready

# uv installs the pinned stack in under a minute; it lives in the environment it fills. Byte-compiling once
# halves every later start of `detr` (import mlflow: 4.6 s of CPU without .pyc files, 1.8 s with).
$(VENV)/.ready: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "uv==$(UV_VERSION)"
	$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode --requirements requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	touch $@

demo: setup
	$(BIN)/detr demo

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Two processes take one module after the other, in the order of tests/conftest.py.
PYTEST := $(BIN)/pytest -n 2 --dist loadscope --no-loadscope-reorder --durations 40

# At its end it lists what it leaves out.
test: check
	$(PYTEST) -m "not slow" tests

# What `make test` leaves out: clusters that lose nodes, many kills, minutes of training.
slow: setup
	$(PYTEST) -m slow tests

# Beside the original's code where PEER_DETR names a checkout of it; BENCHMARKS.md keeps the figures.
bench: setup
	$(BIN)/python -m tests.bench

# All that only a GPU can show, within nine minutes; the tables go into BENCHMARKS.md unless ARGS says otherwise.
ARGS ?= --write BENCHMARKS.md
gpu: setup
	$(BIN)/python -m tests.gpu $(ARGS)

# After changing the dependencies in pyproject.toml. The lock holds exact pins and no addresses.
lock: setup
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --all-extras --no-header --no-annotate \
		--no-emit-index-url pyproject.toml --output-file requirements.lock

clean:
	rm -rf $(VENV) runs mlflow.db mlartifacts
