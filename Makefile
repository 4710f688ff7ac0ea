# make demo    train a small Llama at ZeRO stage 3 on two processes (STEPS=200, RANKS=2)
# make test    the tests (TESTS="tests/test_config.py -k batch" for some of them, JOBS=2 at a time)
# make lint    ruff and mypy
# make bench   the benchmarks: planning time, one step beside DDP and fully_shard, lengths, precision, kernels
# make clean   remove what these made, the virtual environment included
#
# Each makes a virtual environment in .venv first, unless it is there and up to date. Another
# interpreter: make PYTHON=python3.12 ...

PYTHON ?= python3
STEPS ?= 200
RANKS ?= 2
TESTS ?=
JOBS ?= 2

.DEFAULT_GOAL := help
SHELL := /bin/sh
PY := .venv/bin/python

# The environment is for one folder, one interpreter and one set of requirements.
KEY := $(shell { pwd; $(PYTHON) -VV; cat pyproject.toml constraints.txt; } 2>&1 | cksum | cut -d ' ' -f 1)
INSTALLED := .venv/installed-$(KEY)

export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help install demo test lint bench clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

install: $(INSTALLED)

$(INSTALLED):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "zerograph needs Python 3.10 or later; say which: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "installing into .venv (a few minutes the first time) ..."
	@$(PYTHON) -m venv --clear .venv || \
		{ echo "$(PYTHON) cannot make virtual environments; install its venv module" >&2; exit 1; }
	@$(PY) -m pip install -qq -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(INSTALLED)
	@OMP_NUM_THREADS=1 $(PY) -m torch.distributed.run --standalone --nproc-per-node $(RANKS) \
		examples/demo.py --steps $(STEPS)

test: $(INSTALLED)
	$(PY) -m pytest -n $(JOBS) --dist worksteal --durations 40 --durations-min 5 $(or $(TESTS),--strict-goldens)

lint: $(INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: $(INSTALLED)
	$(PY) benchmarks/plan_llama70b.py
	$(PY) benchmarks/step.py
	$(PY) benchmarks/varying_lengths.py
	$(PY) benchmarks/precision.py
	$(PY) benchmarks/kernels.py

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis dist build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
