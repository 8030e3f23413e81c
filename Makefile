# Two commands for a fresh machine: `make demo` and `make test`. Both set up all they need.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
HF := $(VENV)-hf
HF_STAMP := $(HF)/.installed

.PHONY: demo test lint unit test-long test-ceph test-hf bench experiments report proto setup clean

demo: setup
	$(BIN)/kvferry demo

test: lint unit

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Tests that run the model in their own process need OpenBLAS from its start.
PRELOAD = $(shell $(BIN)/python -c 'from kvferry.codec.mlx.openblas import model_environment as e; \
	print(*(f"{k}={v}" for k, v in e().items()))')

# What takes longest is told at the end: this has to stay below 25 minutes on two cores.
SLOWEST = --durations=20 --durations-min=8

unit: setup
	env $(PRELOAD) $(BIN)/python -m pytest $(SLOWEST) $(PYTEST_ARGS)

# What takes long, or goes wrong seldom.
test-long: setup
	env $(PRELOAD) $(BIN)/python -m pytest -m "long or faults" $(SLOWEST) $(PYTEST_ARGS)

# Needs root, and Debian's packages of Ceph, which it installs.
test-ceph: setup
	$(BIN)/python -m pytest -m ceph tests/cluster

# torch and transformers, in an environment laid over the other one: whatever loads mlx-lm
# would load torch too, had it been installed beside it.
test-hf: $(HF_STAMP)
	env $(PRELOAD) $(HF)/bin/python -m pytest -m hf tests/hf $(PYTEST_ARGS)

bench: setup
	$(BIN)/python -m benchmarks

# What benchmarks/runbook.md calls the default set: 36 minutes on two quiet cores.
EXPERIMENTS = codecs lengths calibrations onoff merging cost needles instructions

experiments: setup
	$(BIN)/kvferry experiment $(EXPERIMENTS:%=benchmarks/experiments/%.toml) \
		--report benchmarks/report.md

report: setup
	$(BIN)/kvferry experiment --report benchmarks/report.md

proto: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python scripts/generate_proto.py

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt scripts/setup.sh
	PYTHON="$(PYTHON)" VENV="$(VENV)" sh scripts/setup.sh
	touch $@

$(HF_STAMP): $(STAMP) scripts/setup_hf.sh
	VENV="$(VENV)" HF="$(HF)" sh scripts/setup_hf.sh
	touch $@

clean:
	rm -rf $(VENV) $(HF) build dist *.egg-info
