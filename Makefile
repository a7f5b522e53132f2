# Every target sets up what it needs: .venv, hash-locked packages, jars and weights. Nothing is installed outside this folder.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

# A Python 3.11 or 3.12 to build .venv with; empty: the first that works.
PYTHON ?=
# Seed of benchmarks; empty: their own.
SEED ?=
# Seconds until `make demo` ends by itself; empty: at Ctrl-C.
SECONDS ?=
UV ?= uv
LOCK_FLAGS ?=

BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --no-input --require-hashes --only-binary=:all:
PYTHONS := $(or $(PYTHON),python3.11 python3.12 python3 /usr/bin/python3.11 /usr/bin/python3.12 $(wildcard $(HOME)/.pyenv/versions/3.1[12].*/bin/python3))

.PHONY: help setup demo test lint bench-drift bench-throughput bench-recovery bench-latency bench-novelty bench-student soak chaos student student-hf lock clean

help:
	@echo 'make demo [SECONDS=120]   the whole system on this machine, with simulated viewers'
	@echo 'make test                 lint, types and every test, on real Kafka, Cassandra and Triton'
	@echo 'make lint                 ruff and mypy alone'
	@echo 'make bench-drift [SEED=1] the refresh rule beside others, on simulated viewers'
	@echo 'make bench-throughput     events a second, beside Faust, quixstreams, bytewax and loops without state (15 minutes)'
	@echo 'make bench-recovery       a million viewers back from the changelog, and from a store on disk'
	@echo 'make bench-latency        from a watch event to its refresh request'
	@echo 'make bench-novelty        whether viewers take up the topics proposed to them'
	@echo 'make bench-student        personas a second, beside llama.cpp, which it builds (cmake, g++; 20 to 40 minutes)'
	@echo 'make chaos [SEED=1]       kills, pauses and refusals, compared with a plain count of the log (half an hour)'
	@echo 'make soak                 30 minutes at 20,000 events a second, with kills'
	@echo 'make setup                what the others need: .venv, jars, weights (PYTHON=... chooses the Python)'
	@echo 'make student              the student alone: the adapter merged into the base model, and its checksum'
	@echo 'make student-hf           the student as a Hugging Face folder in .personas/student-hf, for TensorRT-LLM'
	@echo 'make lock                 rewrite the locks of requirements/ (needs uv)'
	@echo 'make clean                stop the local stack; remove .venv, downloads and data'

setup: .venv/.stamp-runtime
	@$(BIN)/python -m agents.localstack.assets

demo: setup
	@exec $(BIN)/personas demo $(if $(SECONDS),--seconds $(SECONDS))

test: lint setup
	$(BIN)/python -m pytest

lint: .venv/.stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench-drift: .venv/.stamp-dev
	@exec $(BIN)/python -m benchmarks.drift $(if $(SEED),--seed $(SEED))

bench-throughput: setup .venv/.stamp-dev
	@exec $(BIN)/python -m benchmarks.throughput $(if $(SEED),--seed $(SEED))

bench-recovery: setup .venv/.stamp-dev
	@exec $(BIN)/python -m benchmarks.recovery

bench-latency: setup .venv/.stamp-dev
	@exec $(BIN)/python -m benchmarks.latency

bench-novelty: setup .venv/.stamp-dev
	@exec $(BIN)/python -m benchmarks.novelty $(if $(SEED),--first-seed $(SEED))

bench-student: setup .venv/.stamp-dev
	@exec $(BIN)/python -m benchmarks.student

soak: setup .venv/.stamp-dev
	@exec $(BIN)/python -m benchmarks.soak $(if $(SEED),--seed $(SEED))

chaos: setup .venv/.stamp-dev
	@exec $(BIN)/python -m tests.chaos $(if $(SEED),--seed $(SEED))

student: .venv/.stamp-runtime
	@exec $(BIN)/python -m agents.localstack.assets student

student-hf: .venv/.stamp-runtime
	@exec $(BIN)/python -m agents.localstack.assets student --student-hf .personas/student-hf

# A stamp is newer than what its step was made from.
.venv/.stamp-python:
	@for python in $(PYTHONS); do \
	  if "$$python" requirements/check_python.py 2>/dev/null; then \
	    echo "building .venv with $$("$$python" --version), $$(command -v "$$python")"; \
	    "$$python" -m venv --clear .venv; touch $@; exit 0; \
	  fi; \
	done; \
	echo 'error: no Python here can run this project. Tried:' >&2; \
	for python in $(PYTHONS); do "$$python" requirements/check_python.py 2>&1 | tail -n 1 | sed 's/^/  /' >&2 || true; done; \
	echo 'Install what is missing, or name another: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11' >&2; exit 1

.venv/.stamp-runtime: .venv/.stamp-python requirements/build.lock requirements/runtime.lock pyproject.toml
	$(INSTALL) -r requirements/build.lock -r requirements/runtime.lock
	$(BIN)/python -m pip install --disable-pip-version-check --no-input --no-deps --no-build-isolation --quiet --editable .
	@touch $@

.venv/.stamp-dev: .venv/.stamp-runtime requirements/dev.lock
	$(INSTALL) -r requirements/dev.lock
	@touch $@

lock:
	cd requirements && for list in build runtime dev; do \
	  $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes $(LOCK_FLAGS) \
	    --custom-compile-command 'make lock' $$list.in -o $$list.lock; \
	done
	cd requirements && $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes $(LOCK_FLAGS) \
	  --custom-compile-command 'make lock' -c runtime.lock ../pyproject.toml -o worker.lock
	cd requirements && $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-deps $(LOCK_FLAGS) \
	  --custom-compile-command 'make lock' -c runtime.lock student.in -o student.lock
	cd requirements && $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-deps $(LOCK_FLAGS) \
	  --custom-compile-command 'make lock' weights.in -o ../agents/localstack/weights.txt

clean:
	@if [ -x $(BIN)/personas ]; then $(BIN)/personas down || true; fi
	rm -rf .venv .personas build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
