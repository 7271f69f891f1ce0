# make test | lint | demo | bench | table     Needs Python 3.11 or newer with pip; everything goes into .venv.

PYTHON ?= python3
# torch comes first and pinned: pip takes the CPU build (2.13.0+cpu) where the configured index offers it, and a looser
# spec could pull gigabytes of CUDA libraries. On a GPU machine: make test TORCH=torch
TORCH ?= torch==2.13.0
WORKERS ?= 2
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: test lint demo bench table clean

test: $(VENV)/.dev
	$(BIN)/pytest -n $(WORKERS) --dist loadfile $(ARGS)

# mypy reads the package as it is installed: passes/ at its place, simba_fx/passes.
lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typed && mkdir -p build/typed
	cp -R simba_fx build/typed/simba_fx
	cp -R passes build/typed/simba_fx/passes
	cd build/typed && ../../$(BIN)/mypy --config-file ../../pyproject.toml

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py $(ARGS)

bench: $(VENV)/.dev
	set -e; for script in benchmarks/*.py; do $(BIN)/python $$script $(ARGS); done

# What each family of models can do, as the tests just showed it.
table: $(VENV)/.dev
	$(BIN)/pytest -n $(WORKERS) -q --capabilities $(ARGS)

clean:
	rm -rf $(VENV) build

# Stamps: setup is redone only when pyproject.toml changes.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("simba_fx needs Python 3.11 or newer, found " + sys.version.split()[0] + "; name one: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)"
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.demo

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) -e '.[hf,plot]'
	@touch $@
