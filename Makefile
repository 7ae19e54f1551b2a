# Every target does its own set-up; what exists is reused.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= $(shell for p in python3.12 python3.11 python3.13 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
# Relative, as the path of the checkout may have spaces, quotes and parentheses.
RUN := ./$(VENV)/bin
READY := $(VENV)/.ready
# What builds the documentation, in an environment of its own.
DOCS := mkdocs-material==9.8.2 "mkdocstrings[python]==1.0.8" mkdocstrings-python==2.0.11
# What builds and checks the package, in an environment of its own.
DIST := build==1.6.1 twine==7.0.0
# Torch processes that share cores slow each other many times over unless each keeps to one thread.
PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(RUN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
# What another processor rounds: AVX2 where this one has AVX-512, else loops without vector instructions.
OTHER_ROUNDING := $(shell grep -qs avx512f /proc/cpuinfo \
	&& echo ATEN_CPU_CAPABILITY=avx2 DNNL_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 || echo ATEN_CPU_CAPABILITY=default)

# Switch off telemetry.
export DVC_NO_ANALYTICS := 1
export DO_NOT_TRACK := 1
export MLFLOW_DISABLE_TELEMETRY := true
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export HF_HUB_DISABLE_TELEMETRY := 1
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: help setup repro test test-long test-numerics test-gpu audit lint docs engines ui pipeline dist bench bench-prepare bench-failures clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: $(READY) ## make .venv with the versions in requirements.lock (the other targets call this)

$(READY): requirements.lock requirements.hashes
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 to 3.13 with venv found; install one, or: make PYTHON=/path/to/python $(MAKECMDGOALS)"; exit 1; }
	@test -x $(RUN)/python || { echo "making $(VENV) with $(PYTHON)"; "$(PYTHON)" -m venv $(VENV); }
	@echo "installing requirements.lock into $(VENV) (about a minute the first time; log: $(VENV)/setup.log)"
	@$(RUN)/python .ci/install.py $(EXTRAS) > $(VENV)/setup.log 2>&1 \
		|| { grep -i error $(VENV)/setup.log | tail -n 5; echo "error: set-up failed; see $(VENV)/setup.log, fix it and type the command again"; exit 1; }
	@$(RUN)/python -m pip install --quiet --no-deps --no-build-isolation --editable . >> $(VENV)/setup.log 2>&1 \
		|| echo "note: the command sft was not installed (see $(VENV)/setup.log); \`$(VENV)/bin/python -m stages\` is the same"
	@$(RUN)/python -m stages schema > params.schema.json || true
	@touch $@

repro: $(READY) ## run the pipeline: what is up to date is not run again; SET="train.lora_r=8 ..." writes values first
	@$(RUN)/python -m stages repro $(foreach assignment,$(SET),--set '$(assignment)')

test: $(READY) ## style, types, imports and tests
	@$(RUN)/ruff check .
	@$(RUN)/ruff format --check .
	@$(RUN)/mypy
	@$(RUN)/lint-imports --no-cache
	@$(PYTEST)

test-long: $(READY) ## the slow tests too
	@$(PYTEST) -m ""

test-numerics: $(READY) ## the tests of computations once more, rounded as another processor does
	@$(OTHER_ROUNDING) $(PYTEST) -m "numerics and not slow"

test-gpu: ## each way to compute on this machine's GPU against the CPU's float32, by PYTHON3 (default: python3), without set-up
	@$(or $(PYTHON3),python3) -m benchmarks.gpu numerics

audit: $(READY) ## known vulnerabilities of the locked versions, where pip-audit's database can be reached
	@$(RUN)/python .ci/audit.py

lint: $(READY) ## fix what ruff can fix
	@$(RUN)/ruff check --fix .
	@$(RUN)/ruff format .

docs: $(READY) .venv-docs/bin/mkdocs ## the documentation site, in site/index.html
	@$(RUN)/python .ci/docs.py .docs
	@NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --quiet
	@echo "site/index.html"

.venv-docs/bin/mkdocs:
	@"$(PYTHON)" -m venv .venv-docs && .venv-docs/bin/pip install --quiet $(DOCS)

engines: $(READY) ## vLLM and llama.cpp in .engines, outside .venv; ENGINES=vllm for one (docs/engines.md)
	@$(RUN)/python .ci/engines.py $(ENGINES)

pipeline: $(READY) ## the same pipeline as a Prefect flow, in this terminal
	@$(RUN)/python -m flows.pipeline

ui: $(READY) ## Prefect and MLflow pages on loopback, with the pipeline ready to start
	@$(RUN)/python -m flows.ui

dist: .venv-dist/bin/twine ## the wheel and the source archive in dist/, checked by twine
	@rm -rf dist && .venv-dist/bin/python -m build --outdir dist . > .venv-dist/build.log 2>&1 \
		|| { tail -n 20 .venv-dist/build.log; exit 1; }
	@.venv-dist/bin/twine check --strict dist/*

.venv-dist/bin/twine:
	@"$(PYTHON)" -m venv .venv-dist && .venv-dist/bin/pip install --quiet $(DIST)

bench: $(READY) benchmarks/.venv-trl/bin/python ## training speed and memory side by side with trl (some 20 minutes)
	@$(RUN)/python benchmarks/train_speed.py

bench-prepare: $(READY) benchmarks/.venv-trl/bin/python ## preparation speed side by side with trl (some 5 minutes)
	@$(RUN)/python benchmarks/prepare_speed.py

bench-failures: $(READY) benchmarks/.venv-trl/bin/python benchmarks/.venv-unsloth/bin/python ## silent failures of this library, trl and unsloth (some 3 minutes)
	@for library in sft trl unsloth; do $(RUN)/python -m benchmarks.silent_failures run $$library; done
	@$(RUN)/python -m benchmarks.silent_failures table

# A peer and what it pins, on top of the packages of .venv, which so remains without them
PEER = @$(RUN)/python -m venv $(@D)/.. && $(RUN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
	> $$($@ -c "import sysconfig; print(sysconfig.get_path('purelib'))")/shared.pth && $(@D)/pip install --quiet --no-deps

benchmarks/.venv-trl/bin/python:
	$(PEER) trl==1.16.0

benchmarks/.venv-unsloth/bin/python:
	$(PEER) unsloth==2026.10.9 unsloth_zoo==2026.10.9 transformers==5.17.0 trl==1.15.0 datasets==4.8.5 huggingface_hub==1.33.0 \
		cut_cross_entropy==25.1.1 hf_transfer==0.1.9 tyro==1.0.17 msgspec==0.22.0 json5==0.17.3 nest-asyncio==1.6.0

clean: ## remove results and checkpoints (not the DVC cache, not MLflow's record)
	rm -rf outs reports/evaluation.html reports/report.html reports/data.html reports/timings reports/engines .state
