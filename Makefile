# Needs Python 3.10 or later (with venv) and make; everything else is installed into $(VENV).
PYTHON ?= python3
VENV ?= .venv
# Pinned versions; empty: the newest that pyproject.toml allows.
CONSTRAINTS ?= constraints.txt
# Another torch than the pinned one, for instance a CUDA build: make demo TORCH=2.11.0+cu128 PIP_FLAGS="--extra-index-url ..."
TORCH ?=
PIP_FLAGS ?=
PYTEST_FLAGS ?=
# Processes among which `make test` shares the tests out by files, each with up to 3 GiB; 0: one, as without pytest-xdist.
TEST_PROCESSES ?= 2

# Those that start the actors, or plan for them: what `make test-memory-saver` runs.
ACTOR_TESTS ?= tests/e2e tests/cli tests/session tests/test_llm.py tests/test_memory_saver.py

DEMO_MODEL ?= pipo_ray/bundled
DEMO_WEIGHT_MEMORY ?= 3MiB
DEMO_INT4_WEIGHT_MEMORY ?= 1500KiB
DEMO_PROMPT ?= It was a fine morning, and Mrs. Bennet
DEMO_FLAGS ?= --repetition-penalty 1.2

# A script for each claim that --quick can look at on two cores: five minutes together. disk_to_compute.py needs fio.
BENCHMARKS ?= $(addprefix benchmarks/,disk_to_compute.py overhead.py staging_modes.py cpu_compute.py cpu_threads.py \
	footprint.py scaling.py soak.py fault_campaign.py)

BIN := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --no-compile --constraint $(VENV)/constraints.txt $(PIP_FLAGS)
# Instead of pip, which compiles all of it, on one core: what a run imports, on all cores. The rest is compiled when it is
# imported. Like pip it says nothing of the few files that are templates and not Python.
COMPILE = $(BIN)/python -m compileall -qq -j 0 -x '/($(NOT_COMPILED))/' \
	$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') || true
NOT_COMPILED = transformers/models/(?!auto|llama)[^/]+|ray/(rllib|data|serve|tune|train|llm|dashboard)|$(strip \
	)torch/(testing|_inductor)|sympy|networkx|mypyc?|fontTools|pip|pygments/lexers|tests?

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup demo test test-slow test-memory-saver test-gpu lint format typecheck bench clean distclean FORCE

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/installed ## generate text from the bundled model, with less weight memory than it has: at 16 bits, and at 4
	HF_HUB_OFFLINE=1 $(BIN)/pipo run $(DEMO_MODEL) --weight-memory $(DEMO_WEIGHT_MEMORY) -p "$(DEMO_PROMPT)" $(DEMO_FLAGS)
	HF_HUB_OFFLINE=1 $(BIN)/pipo run $(DEMO_MODEL) --precision int4 --weight-memory $(DEMO_INT4_WEIGHT_MEMORY) -p "$(DEMO_PROMPT)" $(DEMO_FLAGS)

setup: $(VENV)/installed-dev ## create the virtual environment with the development tools

test: $(VENV)/installed-dev ## the tests that need no GPU and take seconds
	$(BIN)/pytest -n $(TEST_PROCESSES) -m "not gpu and not slow" $(PYTEST_FLAGS)

test-slow: $(VENV)/installed-dev ## the tests that take minutes
	$(BIN)/pytest -m "slow and not gpu" $(PYTEST_FLAGS)

test-memory-saver: $(VENV)/installed-dev ## the tests that start the actors, slow ones too, all in memory-saver
	PIPO_TEST_MODE=memory-saver $(BIN)/pytest -n $(TEST_PROCESSES) -m "not gpu" $(ACTOR_TESTS) $(PYTEST_FLAGS)

test-gpu: $(VENV)/installed-dev ## the tests that need a CUDA device
	$(BIN)/pytest -m gpu $(PYTEST_FLAGS)

lint: $(VENV)/installed-dev ## ruff: rules and format, changes nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(VENV)/installed-dev ## ruff: mend what can be mended, and format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

typecheck: $(VENV)/installed-dev ## mypy, strict
	MYPY_NUM_WORKERS=2 $(BIN)/mypy

bench: $(VENV)/installed ## the quick scripts under benchmarks/, five minutes on two cores
	@failed=; for script in $(BENCHMARKS); do \
		echo "== $$script"; $(BIN)/python $$script --quick || failed="$$failed $$script"; \
	done; test -z "$$failed" || { echo "failed:$$failed" >&2; exit 1; }

clean: ## remove caches and build products
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## clean, and remove .venv
	rm -rf .venv

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("needs Python 3.10 or later, not %d.%d: make PYTHON=python3.12" % sys.version_info[:2] if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	@# Before 23.3 it takes a quarter of a minute longer to compare each wheel there is with each tag there is.
	$(BIN)/python -m pip install --quiet --no-compile $(PIP_FLAGS) 'pip>=23.3'

# What is really asked for; replaced only when it changes, so that a change of CONSTRAINTS or TORCH installs again.
$(VENV)/constraints.txt: FORCE | $(BIN)/python
	@sed $(if $(TORCH),-e 's/^torch==.*/torch==$(TORCH)/') -e '' $(or $(CONSTRAINTS),/dev/null) > $@.new
	@cmp -s $@.new $@ && rm $@.new || mv $@.new $@

$(VENV)/installed: pyproject.toml $(VENV)/constraints.txt
	@echo "installing into $(VENV), a minute or two the first time"
	$(INSTALL) --editable .
	@$(COMPILE)
	@touch $@

$(VENV)/installed-dev: pyproject.toml $(VENV)/constraints.txt
	@echo "installing into $(VENV), a minute or two the first time"
	$(INSTALL) --editable '.[dev]'
	@$(COMPILE)
	@touch $(VENV)/installed $@
