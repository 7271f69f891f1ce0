# make test | quick | lint | demo | bench | speed | table | fuzz     Needs Python 3.11 or newer with pip; everything goes into .venv.
# make test-oldest | test-newest | canary-oldest | canary-newest     The same on the ends of what is supported, each in an
# environment of its own; from another Python: make test-newest PYTHON=python3.13

PYTHON ?= python3
# torch comes first and pinned: pip takes the CPU build (2.13.0+cpu) where the configured index offers it, and a looser
# spec could pull gigabytes of CUDA libraries. On a GPU machine: make test TORCH=torch
TORCH ?= torch==2.13.0
TRANSFORMERS ?= transformers
TRITON ?= triton==3.9.0
NUMPY ?= numpy
WORKERS ?= 2
ARGS ?=

VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# torch 2.11 reads what Triton 3.6 compiles to, whose interpreter knows no newer NumPy.
OLDEST := VENV=.venv-oldest TORCH=torch==2.11.0 TRANSFORMERS=transformers==5.17.0 TRITON=triton==3.6.0 NUMPY='numpy<2.4'
NEWEST := VENV=.venv-newest TORCH=torch TRANSFORMERS=transformers

.PHONY: test quick test-oldest test-newest canary canary-oldest canary-newest lint demo bench speed table fuzz clean

test: $(VENV)/.dev $(VENV)/.triton $(VENV)/.mamba-ssm $(VENV)/.torchao $(VENV)/.lm-eval
	$(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

# In about two minutes, while something is written: style, types, units, passes on the graphs of small models, three families end
# to end.
quick: lint
	$(BIN)/pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder -k "not (zamba or falcon-h1 or jamba)" $(ARGS) \
		tests/passes $(addprefix tests/unit/test_,canary.py ops_operands.py schedule.py)

# On both ends: all tests, or in a minute whether what the library takes from torch and transformers is there and works.
test-oldest canary-oldest:
	$(MAKE) $(@:-oldest=) $(OLDEST)

test-newest canary-newest:
	$(MAKE) $(@:-newest=) $(NEWEST)

canary: $(VENV)/.dev
	$(BIN)/pytest -q $(ARGS) tests/unit/test_canary.py

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

bench: $(VENV)/.dev $(VENV)/.triton
	set -e; for script in benchmarks/*.py; do $(BIN)/python $$script $(ARGS); done

# How fast this machine runs models dense, sparse and as their peers: see `simba-fx bench --help` for ARGS.
speed: $(VENV)/.dev
	$(BIN)/simba-fx bench $(ARGS)

# What each family of models can do, as the tests just showed it.
table: $(VENV)/.dev $(VENV)/.triton $(VENV)/.mamba-ssm
	$(BIN)/pytest -n $(WORKERS) -q --capabilities $(ARGS)

# Drawn models, options and calls against references, for hours if need be: make fuzz SIMBA_FX_FUZZ=100000
fuzz: export SIMBA_FX_FUZZ ?= 10000
fuzz: $(VENV)/.dev $(VENV)/.triton $(VENV)/.mamba-ssm
	$(BIN)/pytest -n $(WORKERS) -q $(ARGS) tests/models/test_fuzz_*.py

clean:
	rm -rf .venv .venv-oldest .venv-newest build

# Stamps: setup is redone only when pyproject.toml changes.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("simba_fx needs Python 3.11 or newer, found " + sys.version.split()[0] + "; name one: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)"
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) -e '.[dev]' '$(TRANSFORMERS)' '$(NUMPY)'
	@touch $@ $(VENV)/.demo

# Triton in a folder that is not on sys.path: it serves the tests of the kernels (interpreted, and compiled for GPUs that
# are not there), and where Inductor finds it every process takes longer to start.
$(VENV)/.triton: $(VENV)/.torch
	rm -rf $(VENV)/triton
	$(PIP) --no-deps --target $(VENV)/triton '$(TRITON)'
	@touch $@

# mamba_ssm as pure Python (its CUDA extensions are stubbed in the one process that imports it), in a folder that is not
# on sys.path: transformers runs its own Mamba through mamba_ssm wherever that can be imported, which fails on a CPU.
$(VENV)/.mamba-ssm: $(VENV)/.torch
	$(PIP) wheel setuptools packaging
	rm -rf $(VENV)/mamba-ssm
	$(PIP) --no-deps --target $(VENV)/mamba-ssm einops==0.8.2
	MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE \
		$(PIP) --no-deps --no-build-isolation --target $(VENV)/mamba-ssm mamba-ssm==2.3.2.post1 causal-conv1d==1.7.0
	@touch $@

# torchao likewise: wherever it can be imported, transformers imports it, which takes seconds in every process.
$(VENV)/.torchao: $(VENV)/.torch
	rm -rf $(VENV)/torchao
	$(PIP) --no-deps --target $(VENV)/torchao torchao==0.18.0
	@touch $@

# lm-eval likewise, with what it needs to run a task whose data are a local file.
$(VENV)/.lm-eval: $(VENV)/.torch
	rm -rf $(VENV)/lm-eval
	$(PIP) --no-deps --target $(VENV)/lm-eval lm_eval==0.4.13 requests==2.34.2 urllib3==2.8.0 certifi charset-normalizer \
		datasets==5.2.0 pyarrow==26.0.1 pandas dill multiprocess xxhash python-dateutil pytz six sacrebleu portalocker tabulate \
		colorama lxml zstandard pytablewriter dataproperty mbstrdecoder pathvalidate tabledata tcolorpy typepy chardet
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) -e '.[hf,plot]' '$(TRANSFORMERS)'
	@touch $@
