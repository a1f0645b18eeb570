# Everything runs in .venv, which the first target that needs it creates.
#   DEVICE=cpu|cuda   build of torch and fbgemm (default: what .venv holds, else cpu)
#   TORCH_INDEX=URL   package index for torch alone (empty: pip's own)
#   PYTHON=...        interpreter for .venv (default: the first one from 3.10 to 3.14 found)
#   ARGS="..."        further words for quickstart, serve, test, fuzz, soak and bench, e.g. make test ARGS="-k packing"
#   MINUTES=60        how long make fuzz draws new examples, and make soak loads a server
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
DEVICE ?= $(or $(strip $(shell cat $(VENV)/device 2>/dev/null)),cpu)
TORCH_INDEX ?=
JOBS ?= 2
MINUTES ?= 60
LOCK := requirements/$(DEVICE).txt
$(if $(wildcard $(LOCK)),,$(error DEVICE is '$(DEVICE)'; expected cpu or cuda))
# The quickstart's pipeline: that of MovieLens-1M, or of the simulator.
SERVED = $(firstword $(patsubst runs/%/rank-din-both-s0/result.json,%,$(wildcard runs/quickstart-*/rank-din-both-s0/result.json)))
STAMP := $(VENV)/installed-$(DEVICE)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
# An index of torch builds alone may lack the exact versions of what torch needs; the lock has them all (CPU build).
TORCH_FLAGS = $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX) --no-deps,--constraint $(LOCK))

.PHONY: help setup quickstart serve test fuzz soak lint format bench docs wheel clean

help: ## this list
	@grep -hE '^[a-z]+:.*##' Makefile | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 22
	@echo "  variables: DEVICE=cpu|cuda  TORCH_INDEX=URL  PYTHON=...  ARGS=\"...\"  MINUTES=60  (see the Makefile)"

setup: $(STAMP) ## create .venv with the pinned versions (DEVICE=cuda for the CUDA build)

$(STAMP): $(LOCK) pyproject.toml requirements/create_venv.sh
	@requirements/create_venv.sh $(VENV) $(DEVICE) $(PYTHON)
	@$(PIP) install $(TORCH_FLAGS) "$$(grep -E '^torch==' $(LOCK))"
	@$(PIP) install --no-deps --requirement $(LOCK)
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@$(BIN)/python -m lumrec.launch.environment
	@touch $@

quickstart: $(STAMP) ## prepare, pre-train, query, rank without and with LUM, report; under 10 minutes on 2 cores
	@PATH="$$PWD/$(BIN):$$PATH" $(BIN)/torchx --log_level WARNING run apps/pipeline.py --config configs/quickstart.yaml $(ARGS)

serve: $(STAMP) ## the quickstart's DIN with knowledge, exported and served at http://127.0.0.1:8000 (after make quickstart)
	@test -n "$(SERVED)" || { echo "there is no finished quickstart in runs/: run make quickstart first" >&2; exit 2; }
	@$(BIN)/lumrec export --config quickstart run=$(SERVED)/rank-din-both-s0
	@$(BIN)/lumrec user_state --config quickstart run=$(SERVED)/rank-din-both-s0
	@exec $(BIN)/lumrec serve --config quickstart run=$(SERVED)/rank-din-both-s0 inputs.knowledge=$(SERVED)/query $(ARGS)

test: $(STAMP) ## the whole test suite, two processes, one thread each
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --quiet $(ARGS)

fuzz: $(STAMP) ## MINUTES=60 of examples that make test does not draw; every find with what reproduces it
	@OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py $(MINUTES) --numprocesses $(JOBS) $(ARGS)

soak: $(STAMP) ## MINUTES=60 of load on a server whose workers, Redis and disk fail meanwhile; needs redis-server
	@OMP_NUM_THREADS=1 $(BIN)/python -W ignore tests/soak.py $(MINUTES) $(ARGS)

lint: $(STAMP) ## ruff check, ruff format --check, mypy, import-linter
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache

format: $(STAMP) ## ruff format and the fixes ruff can make
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(STAMP) ## speed on this machine, beside plain baselines in the same run (ARGS="pretrain shares": these alone)
	@$(BIN)/python -m benchmarks $(ARGS)

$(VENV)/installed-docs: $(STAMP) requirements/docs.txt
	@$(PIP) install --no-deps --requirement requirements/docs.txt
	@touch $@

docs: $(VENV)/installed-docs ## build the site of the documentation into site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

wheel: $(STAMP) ## the sdist and the wheel, into dist/ (offline)
	@rm -rf build dist
	@$(BIN)/python -c "from setuptools import build_meta as b; b.build_sdist('dist'); b.build_wheel('dist')" >/dev/null
	@ls dist/*

clean: ## remove .venv and tool caches (runs/ stays)
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist site *.egg-info
