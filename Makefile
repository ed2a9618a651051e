# `make` lists the targets. Everything runs in .venv, made at first use and again when its requirements change.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
PRESET ?= tiny
STORE ?=
RUN ?=
ARGS ?=
HARVEST_ARGS ?= $(ARGS)
TRAIN_ARGS ?= $(ARGS)
REPORT_ARGS ?= $(ARGS)
# What pip is given for torch. On a host without a GPU its CPU build saves gigabytes:
#   make harvest TORCH="torch==2.13.0 --index-url URL"     with the URL of torch's index of CPU builds
TORCH ?= $(shell grep -m1 '^torch==' constraints.txt)
# Builds of torch for CUDA bring the Triton that fits them; without one, the tests take this and run in its interpreter.
TRITON ?= triton==3.9.0

CODE := harvest train shared tests
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed.stamp
DEV := $(VENV)/developing.stamp
# Tests use one thread each, and memory for a small LLM per worker.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4
# PRESET, unless the arguments say by themselves which settings to start from.
preset_unless = $(if $(filter --config% --like%,$(1)),,$(PRESET))
LAST_STORE := cache/$(PRESET).store
LAST_RUN := runs/$(PRESET).run

# One set of options for two commands is a mistake more often than not.
ifneq ($(and $(strip $(ARGS)),$(word 2,$(filter harvest train report,$(MAKECMDGOALS)))),)
$(error ARGS is ambiguous with several commands: pass HARVEST_ARGS=..., TRAIN_ARGS=... and REPORT_ARGS=...)
endif

.PHONY: help harvest train report test test-faults fuzz lint bench compare interop clean

help: ## List the targets and variables
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{ printf "  make %-12s %s\n", $$1, $$2 }'
	@echo
	@echo '  PRESET=NAME (tiny)   STORE=FOLDER   RUN=FOLDER   PYTHON=python3.12'
	@echo '  ARGS="--set seed=1" or HARVEST_ARGS=, TRAIN_ARGS=, REPORT_ARGS='

harvest: $(STAMP) ## Write the activation store of PRESET; prints its path last
	@mkdir -p cache
	@$(BIN)/python -m harvest run $(call preset_unless,$(HARVEST_ARGS)) $(HARVEST_ARGS) | tee $(LAST_STORE).part
	@tail -n 1 $(LAST_STORE).part > $(LAST_STORE).new
	@mv $(LAST_STORE).new $(LAST_STORE); rm -f $(LAST_STORE).part

train: $(STAMP) ## Train a transcoder from STORE, or from the last store of `make harvest`
	@store='$(STORE)'; \
	if [[ -z $$store && -s $(LAST_STORE) ]]; then store=$$(< $(LAST_STORE)); fi; \
	if [[ -z $$store ]]; then \
		echo 'error: no store for preset $(PRESET): run `make harvest` first or pass STORE=FOLDER' >&2; exit 2; \
	fi; \
	mkdir -p $(dir $(LAST_RUN)); rm -f $(LAST_RUN); \
	$(BIN)/python -m train run $(call preset_unless,$(TRAIN_ARGS)) --store "$$store" $(TRAIN_ARGS) | tee $(LAST_RUN).part
	@tail -n 1 $(LAST_RUN).part > $(LAST_RUN).new
	@mv $(LAST_RUN).new $(LAST_RUN); rm -f $(LAST_RUN).part

report: $(STAMP) ## Write report.html of RUN, or of the last run of `make train`
	@run='$(RUN)'; \
	if [[ -z $$run && -s $(LAST_RUN) ]]; then run=$$(< $(LAST_RUN)); fi; \
	if [[ -z $$run ]]; then \
		echo 'error: no run of preset $(PRESET): run `make train` first or pass RUN=FOLDER' >&2; exit 2; \
	fi; \
	$(BIN)/python -m train report "$$run" $(REPORT_ARGS)

# Named together they run in this order, also under -j and whichever is named first.
ifneq ($(filter harvest,$(MAKECMDGOALS)),)
train: harvest
endif
ifneq ($(filter train,$(MAKECMDGOALS)),)
report: train
endif

bench: $(DEV) ## Measure kernels, a step and reading; rewrites docs/benchmarks.md (docs/code.md names the longer benches)
	@$(BIN)/python -m tests.bench.kernels
	@$(BIN)/python -m tests.bench.step S M
	@$(BIN)/python -m tests.bench.step threads S M
	@$(BIN)/python -m tests.bench.reader 256

compare: $(DEV) ## Harvest, train and compare every arm of the diversity loss; an hour and a half on two cores
	@$(BIN)/python -m tests.bench.diversity $(ARGS)

interop: $(DEV) ## Load exports in SAELens, sparsify, circuit-tracer, delphi and SAEDashboard, each in an environment of its own
	@$(BIN)/python -m tests.interop $(ARGS)

test: $(DEV) ## Lint, type check and run the tests, the fast ones first
	@$(BIN)/python -m tests.compile_loops & loops=$$!; $(MAKE) --no-print-directory lint || { kill $$loops; exit 1; }; wait $$loops || true  # tests say what is wrong
	@$(PYTEST) -m "not exhaustive" $(ARGS)

test-faults: $(DEV) ## The tests of faults (kills, full disks, damage), with those at many more places that `test` leaves out
	@$(PYTEST) -m "fault or exhaustive" $(ARGS)

fuzz: $(DEV) ## Fuzz what opens stores and reads records, guided by coverage, ARGS="--seconds 60"
	@$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt --editable '.[harvest,dev,fuzz]'
	@$(BIN)/python -m tests.faults.fuzz $(ARGS)

lint: $(DEV) ## Lint, format check and type check
	@$(BIN)/ruff check $(CODE)
	@$(BIN)/ruff format --check $(CODE)
	@$(BIN)/mypy --num-workers 2

clean: ## Remove .venv and the tools' caches; stores and runs stay
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build *.egg-info

# torch goes first and alone: resolving its range among the others can download several builds of it.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo 'error: Python 3.11 or newer is needed, and "$(PYTHON)" is not: pass PYTHON=python3.12, for example' >&2; \
		exit 1; }
	@echo 'installing into $(VENV): torch first, then everything else (once; minutes)'
	@$(PYTHON) -m venv $(VENV)
	@grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	@$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt $(TORCH)
	@$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt --editable '.[harvest]'
	@touch $@

# What tests and benches need beside that.
$(DEV): $(STAMP)
	@echo 'installing what the tests need into $(VENV) (once; a minute)'
	@$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt --editable '.[harvest,dev]'
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/python -m pip install --quiet $(TRITON) || \
		echo 'no $(TRITON) for this platform: tests of its kernels will be skipped' >&2
	@touch $@
