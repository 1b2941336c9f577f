# make help lists the targets. Each sets up what it needs on a fresh Debian machine.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
TRAIN := .venv/.train

# Tests take their ports from the system and their folders from pytest, so two processes do not meet. Each takes whole files.
JOBS ?= 2
export EDGE_RUNTIME_TESTS ?= ci
PYTEST = $(BIN)/python -m pytest -n $(JOBS) --dist loadfile
TRAINING := tests/tools/test_training.py

.PHONY: help demo test test-fast test-train guards soak soak-minute fuzz check format bench models perf clean broker tflite litert

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; run: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv .venv || { echo "Python's venv module is missing; run: sudo apt-get install python3-venv"; exit 1; }
	@echo "installing into .venv (a minute or two)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

$(TRAIN): $(READY)
	@echo "installing what training needs (a minute or two)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,train]'
	@touch $@

broker: ## install the MQTT broker if it is missing and may be installed
	@./tools/install_broker.sh

demo: $(READY) broker ## broker, cloud worker and daemon answer commands, with and without the cloud
	@$(BIN)/python -m examples.demo

check: $(READY) ## lint, formatting, strict types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

# What tests of TFLite models need besides a runtime for them.
TFLITE_TESTS := --editable . onnx flatbuffers pytest hypothesis

.venv-litert/.ready: pyproject.toml
	@echo "installing into .venv-litert (half a minute)"
	@$(PYTHON) -m venv .venv-litert
	@.venv-litert/bin/python -m pip install --quiet --no-compile --disable-pip-version-check 'ai-edge-litert>=2.0' $(TFLITE_TESTS)
	@touch $@

.venv-tflite/.ready: pyproject.toml
	@echo "installing into .venv-tflite (half a minute)"
	@$(PYTHON) -m venv .venv-tflite
	@.venv-tflite/bin/python -m pip install --quiet --no-compile --disable-pip-version-check 'tflite-runtime>=2.14' 'numpy<2' $(TFLITE_TESTS)
	@touch $@

litert: .venv-litert/.ready
	@EDGE_RUNTIME_TFLITE=litert .venv-litert/bin/python -m pytest tests/engines/test_litert.py
	@EDGE_RUNTIME_TFLITE=litert .venv-litert/bin/python -m pytest tests/loading/test_hostile_models.py -k broken_tflite

# tflite-runtime, for 32-bit Arm, has no wheels for a Python newer than 3.11.
PYTHON_MINOR := $(shell $(PYTHON) -c 'import sys; print(sys.version_info[1])' 2>/dev/null)
ifeq ($(PYTHON_MINOR),11)
tflite: litert .venv-tflite/.ready ## TFLite models, under LiteRT and under tflite-runtime
	@EDGE_RUNTIME_TFLITE=tflite_runtime .venv-tflite/bin/python -m pytest tests/engines/test_litert.py
else
tflite: litert
	@echo "skipped: tflite-runtime needs Python 3.11, and $(PYTHON) is 3.$(PYTHON_MINOR)"
endif

test: check test-fast tflite test-train ## everything that must hold: all tests, nine of the guards
	@$(PYTEST) --dist load tests/guards

test-fast: $(READY) broker ## core and shells, without training and torch (a minute)
	@$(PYTEST) -m "not train" --ignore tests/guards --ignore $(TRAINING)

test-train: $(TRAIN) ## tests of what makes bundles; needs torch
	@$(PYTEST) -m train --ignore tests/guards

guards: $(READY) broker ## break each line that guards an invariant, and see a test fail (some minutes)
	@EDGE_RUNTIME_GUARDS=all $(PYTEST) --dist load tests/guards

soak: $(READY) broker ## property tests of the core fifty times as long as in test, then ten minutes of overload and faults
	@EDGE_RUNTIME_TESTS=soak $(BIN)/python -m pytest tests/core
	@$(BIN)/python -m tools.soak

soak-minute: $(READY) broker ## a minute of overload and faults against both tiers
	@$(BIN)/python -m tools.soak --duration 60

fuzz: $(READY) .venv-litert/.ready ## 10,000 broken model files per format, every byte of a bundle flipped (half an hour)
	@EDGE_RUNTIME_FUZZ=10000 EDGE_RUNTIME_TFLITE=litert .venv-litert/bin/python -m pytest tests/loading/test_hostile_models.py -k broken_tflite
	@EDGE_RUNTIME_FUZZ=10000 $(BIN)/python -m pytest tests/loading/test_hostile_models.py tests/bundles/test_flipped_bytes.py

format: $(READY) ## put the code into shape
	@$(BIN)/ruff check --fix-only --quiet . ; $(BIN)/ruff format --quiet .

bench: $(READY) ## requests per second of the daemon under wrk, each text different
	@$(BIN)/python -m tools.bench_daemon

perf: $(READY) ## NVIDIA's perf_analyzer against the daemon
	@./tools/perf_analyzer.sh

models: $(TRAIN) ## remake the shipped bundles (two hours): make models DATA=data_full.json
	@DATA="$(DATA)" ./tools/make_models.sh

clean: ## remove what the other targets made
	rm -rf .venv .venv-litert .venv-tflite .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
