# The verbs that people and CI use. Everything runs in .venv; nothing outside the checkout is touched.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: help setup demo test lint types fmt golden bench bench-record bench-calibrate bench-serve bench-peers bench-pacing bench-travel kills stall frames size integrity scale soak long-run clients bounds cov docs build clean
.DEFAULT_GOAL := help

help: ## list the verbs
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## create .venv and install arbl2 with its tools (again only if their list changed)

# constraints.txt is the whole list, so pip resolves nothing and every machine gets the same versions.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "arbl2 needs Python 3.11 or newer; '$(PYTHON)' is older or missing."; \
	  echo "Name another one, for example: make setup PYTHON=python3.12"; exit 1; } >&2
	@echo "setting up .venv (a minute or two, once)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r constraints.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: setup ## record a synthetic market, replay and calibrate it, without network
	$(BIN)/arbl2 demo

test: setup ## run the tests on two processes
	$(BIN)/python -m pytest -n 2

lint: setup ## check style and formatting
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

types: setup ## check types (strict)
	$(BIN)/python -m mypy

fmt: setup ## format, and mend what can be mended by itself
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

golden: setup ## make the golden expectations anew (read the difference before you commit it)
	$(BIN)/python tests/golden/regenerate.py

bench: setup ## what a message costs in replay, beside a plain Python loop
	$(BIN)/python -m benchmarks

bench-record: setup ## the recorder beside a client that only stamps (6 minutes)
	$(BIN)/python -m benchmarks.record

bench-calibrate: setup ## sums of zones in DuckDB beside polars (2 minutes)
	$(BIN)/python -m benchmarks.calibrate

bench-peers: setup ## arbl2 beside hftbacktest and nautilus_trader on the same messages (10 minutes, Python 3.11; installs them apart)
	$(BIN)/python -m benchmarks.peers

bench-serve: setup ## a recording served flat out beside a server that only pushes bytes (5 minutes)
	$(BIN)/python -m benchmarks.serve

bench-travel: setup ## 10,000 instants compared with a linear replay; p99 of a query in a day and in deep books (5 minutes)
	$(BIN)/python -m benchmarks.travel

bench-pacing: setup ## how late paced frames are, beside bare pacers, with and without load (5 minutes; the first time 2 more)
	$(BIN)/python -m benchmarks.pacing

kills: setup ## kill recorders at random moments and compare what is left with what was sent (3 minutes)
	$(BIN)/python -m benchmarks.kills

stall: setup ## stall the disk for 10 s at 5,000 messages a second: nothing is lost, no stamp moves
	$(BIN)/python -m benchmarks.record --stall 10

frames: setup ## a million frames of every kind: recorded bytes = sent bytes
	$(BIN)/python -m benchmarks.record --frames 1000000

size: setup ## sealed bytes a message beside gzip -6, on real captures
	$(BIN)/python -m benchmarks.record --size

integrity: setup ## no false entry in the gap ledger: an hour of synthetic market, and the real captures
	$(BIN)/python -m benchmarks.integrity

scale: setup ## replay 24 hours of ten coins, 20 million messages: memory and time per message stay flat (15 minutes the first time)
	$(BIN)/python -m benchmarks.scale

MINUTES ?= 30
soak: setup ## MINUTES of random faults: sent = recorded, every fault in the ledger, memory flat
	$(BIN)/python -m benchmarks.soak --minutes $(MINUTES)

long-run: MINUTES = 20
long-run: setup ## MINUTES of paper trading on a live local market, verified by replay: same bytes, decisions, fills and money
	$(BIN)/python -m benchmarks.live --minutes $(MINUTES)

CLIENTS := $(patsubst tests/clients/requirements-%.txt,.venv/clients/%/.ready,$(wildcard tests/clients/requirements-*.txt))
clients: setup $(CLIENTS) ## other people's clients, each in its own environment, against our exchange server (5 minutes)
	$(BIN)/python -m pytest tests/clients -n 2 -rP

.venv/clients/%/.ready: tests/clients/requirements-%.txt | $(READY)
	@echo "setting up $(@D)"
	@rm -rf $(@D)
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	@touch $@

cov: export COVERAGE_FILE := .venv/.coverage
cov: export NUMBA_DISABLE_JIT := 1
cov: setup ## run the tests in Python without compiled kernels and report the lines not reached (slow)
	$(BIN)/python -m coverage run --source=arbl2,arbl2_recorder,arbl2_replay,arbl2_calibration -m pytest --timeout=0
	$(BIN)/python -m coverage report --show-missing --skip-covered

bounds: export NUMBA_BOUNDSCHECK := 1
bounds: export NUMBA_CACHE_DIR := $(CURDIR)/.venv/bounds
bounds: export ARBL2_EFFORT := 5
bounds: setup ## run what feeds the kernels wild and forged input, with every index into an array checked (2 minutes)
	$(BIN)/python -m pytest -q -n 2 tests/core tests/properties tests/golden tests/replay/test_store.py

docs: setup ## write docs/cli.md from the command line's own help
	$(BIN)/python -m typer arbl2.cli utils docs --name arbl2 --title "The command line" --output docs/cli.md
	$(BIN)/python docs/picture.py

build: setup ## build the wheel into dist/
	$(BIN)/python -m hatchling build --target wheel

clean: ## remove what tools left behind (not .venv, not tapes)
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -prune -exec rm -rf {} +
