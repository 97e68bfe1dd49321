# Every target sets itself up: it needs Python >= 3.11, git and make, and builds .venv on first use.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# The versions that were tested together; `make CONSTRAINTS=/dev/null` takes the newest of everything.
CONSTRAINTS ?= constraints.txt
# Tests that run at a time. Many start processes of their own and wait for them.
WORKERS ?= 2
# One thread per process: ranks share the cores, and results do not depend on how many there are.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false

SGLANG_VENV  := .venv-sglang
SGLANG_READY := $(SGLANG_VENV)/.ready

.PHONY: help setup kernels demo test test-sglang check format soak clean api dist test-gpu bench-algorithms bench-replay bench-dispatch bench-transfer bench-stall bench-gpu bench-sglang bench-sglang-dispatch

help:  ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 22

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Python 3.11 or newer is needed, {sys.executable} is {v[0]}.{v[1]}; try: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable '.[dev]'
	$(BIN)/python -m equipoise.manager.warm_up
	$(BIN)/python -m equipoise.dispatch.warm_up
	@touch $@

setup: $(READY)  ## the virtual environment, with everything pinned

kernels: $(READY)  ## compile numba's kernels again; needed after editing one that others call
	find python -name '*.nb[ci]' -delete
	$(BIN)/python -m equipoise.manager.warm_up
	$(BIN)/python -m equipoise.dispatch.warm_up

demo: $(READY)  ## serve a small MoE on 4 ranks, shift its load, rebalance it while it answers
	$(BIN)/python scripts/demo.py $(ARGS)

test: $(READY)  ## all tests (needs no GPU)
	$(BIN)/pytest -m 'not soak and not sglang' --numprocesses $(WORKERS) --dist worksteal $(PYTEST_ARGS)

$(SGLANG_READY): test/hosts/sglang/requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v[:2] == (3, 11) else f"SGLang is tested with Python 3.11, {sys.executable} is {v[0]}.{v[1]}; try: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(SGLANG_VENV)
	$(SGLANG_VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --requirement test/hosts/sglang/requirements.txt
	$(SGLANG_VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

test-sglang: $(READY) $(SGLANG_READY)  ## the plugin in the real SGLang server, on this CPU; installs 2.6 GB in .venv-sglang
	$(BIN)/pytest -m sglang test/hosts $(PYTEST_ARGS)

test-gpu: $(READY)  ## what only a GPU can settle, with a report; without one, the part that needs none
	$(BIN)/python scripts/test_gpu.py $(ARGS)

check: $(READY)  ## lint, format, types, and that docs/api.md is what the docstrings say
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python scripts/make_api_page.py --check
	$(BIN)/mypy

format: $(READY)  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-algorithms: $(READY)  ## placement algorithms against the neighbours' own (downloads their wheels)
	$(BIN)/python benchmark/algorithms.py $(ARGS)

bench-dispatch: $(READY)  ## what dispatch costs a step, by kind and batch size
	$(BIN)/python benchmark/dispatch.py $(ARGS)

bench-replay: $(READY)  ## time and memory of a replay, up to 512 ranks, 1024 experts, 64 layers, 1000 steps
	$(BIN)/python benchmark/replay_scale.py $(ARGS)

bench-transfer: $(READY)  ## moving experts, against SGLang's and vLLM's own code (downloads their wheels)
	$(BIN)/python benchmark/transfer.py $(ARGS)

bench-stall: $(READY)  ## how long forward passes wait for a rebalance, in each transfer mode
	$(BIN)/python benchmark/engine_stall.py $(ARGS)

bench-gpu: $(READY)  ## what dispatch, commits, checksums and transfers cost on a GPU
	$(BIN)/python benchmark/gpu.py $(ARGS)

bench-sglang: $(READY) $(SGLANG_READY)  ## what a rebalance costs a real SGLang server's answers: its own balancer and ours
	PYTHONPATH=test $(BIN)/python benchmark/sglang_stall.py $(ARGS)

bench-sglang-dispatch: $(SGLANG_READY)  ## what a layer's choice of replicas costs inside SGLang, on this CPU
	PYTHONPATH=test/hosts/sglang/shims SGLANG_USE_CPU_ENGINE=1 $(SGLANG_VENV)/bin/python benchmark/sglang_dispatch.py $(ARGS)

soak: $(READY) $(SGLANG_READY)  ## the long tests: randomised ones at length, every document's command, SGLang's server
	$(BIN)/pytest -m 'soak or sglang' $(PYTEST_ARGS)

api: $(READY)  ## write docs/api.md again from the public names
	$(BIN)/python scripts/make_api_page.py

dist: $(READY)  ## build the sdist and the wheel, and try the wheel
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/python scripts/check_release.py

clean:  ## remove the virtual environment and everything that was made
	rm -rf $(VENV) $(SGLANG_VENV) out build dist .mypy_cache .ruff_cache .hypothesis
