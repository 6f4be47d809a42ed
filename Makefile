# `make demo` and `make test` need nothing but Python 3.11+ on the PATH: they make the project's own environment first.
# `make check` is what CI runs: the daily tests, and those of the long ones that a change owes (scripts/proven.py).

PYTHON ?= python3
VENV ?= .venv
# Test processes at most. Each is one torch process of about 1 GB with one thread.
JOBS ?= 4
# Passed on: `make demo ARGS="--model my-model"`, `make test ARGS="-k losses"`.
ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# A second environment, with the oldest releases of the neighbours that are tested.
OLDEST ?= .venv-oldest
OLDEST_STAMP := $(OLDEST)/.installed
# Releases of TRL between the oldest and the newest that are tested, those that ms-swift and Axolotl have pinned, and
# the tests for any release.
RELEASES ?= 0.29.1 1.8.0
ANY_RELEASE := tests/trainer/test_any_release.py tests/test_measure.py tests/model/test_calls.py \
	tests/pairs/test_batch.py tests/theory/test_conditions.py tests/loading/test_trainer_tokens.py tests/loading/test_odd_rows.py
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses $(JOBS) --dist worksteal
EXAMPLES := $(filter-out examples/cures.py,$(wildcard examples/*.py))
# Single-threaded things of `make check` that run side by side.
BESIDE := $(MAKE) --no-print-directory -j2

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-all test-everything test-docs test-trainer test-tokens test-fast test-oldest test-releases test-release budgets zoo-fingerprints golden mutants lint types docs examples $(EXAMPLES) check format pins clean clean-venv

help: ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(STAMP) ## Make the environment (.venv), pinned by constraints.txt.

# The build backend comes first and the package is then built with it: an isolated build would fetch an unpinned one.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v >= (3, 11) or sys.exit(f"constraints.txt needs Python 3.11 or newer, and $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt hatchling editables
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@

demo: $(STAMP) ## The paper's sentiment experiment in miniature; writes gradent-demo/.
	$(BIN)/gradent demo $(ARGS)

test: $(STAMP) ## Run the daily tests: at most 10 minutes on 2 cores.
	$(PYTEST) -m "not nightly" $(ARGS)

test-all: $(STAMP) $(OLDEST_STAMP) ## Run every test there is, docs and examples and the oldest neighbours too.
	$(BESIDE) examples docs
	$(MAKE) --no-print-directory test-oldest
	$(BIN)/python -m scripts.proven record all oldest docs tokens trainer -- $(MAKE) --no-print-directory test-everything

test-everything: $(STAMP)
	$(PYTEST) $(ARGS)

test-docs: $(STAMP) ## Run what docs, examples and README have: every example, the site, their nightly tests.
	$(BESIDE) examples docs
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.proven record docs -- \
		$(BIN)/python -m pytest -n auto --maxprocesses $(JOBS) -m nightly tests/test_docs.py tests/examples

test-trainer: $(STAMP) ## Run the nightly tests of the trainers: torch.compile, all ways at once.
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.proven record trainer -- \
		$(BIN)/python -m pytest -n auto --maxprocesses $(JOBS) -m nightly tests/trainer tests/hooks tests/attribution

test-tokens: $(STAMP) ## Run the nightly tests of the token level, and the paper's claims on the demo's model.
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.proven record tokens -- \
		$(BIN)/python -m pytest -n auto --maxprocesses $(JOBS) -m nightly tests/tokens tests/demo

test-oldest: $(OLDEST_STAMP) ## Run a part of the tests with TRL 0.24 and transformers 4.57.
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.proven record oldest -- $(OLDEST)/bin/python -m pytest -n auto --maxprocesses $(JOBS) \
		-p no:cacheprovider $(ANY_RELEASE)

# Each release lies in a folder of its own, in front of the environment's TRL.
test-releases: $(STAMP) ## Run the same with TRL 0.29.1 and 1.8.
	for release in $(RELEASES); do \
		$(PIP) install --quiet --no-deps --upgrade --target $(abspath $(VENV))-trl-$$release trl==$$release && \
		PYTHONPATH=$(abspath $(VENV))-trl-$$release $(PYTEST) -p no:cacheprovider $(ANY_RELEASE) || exit 1; \
	done

# TRL 0.29 and newer over the environment that tests the newest, older ones over the oldest: their transformers fit.
test-release: $(STAMP) $(OLDEST_STAMP) ## Compare token ids with those of another release of TRL: make test-release TRL=0.29.1
	test -n "$(TRL)" || { echo 'Say which: make test-release TRL=0.29.1' >&2; exit 1; }
	$(PIP) install --quiet --no-deps --upgrade --target .cache/trl-$(TRL) trl==$(TRL)
	python=$$(case "$(TRL)" in 0.2[4-8]*) echo $(OLDEST);; *) echo $(VENV);; esac)/bin/python; \
		PYTHONPATH=.cache/trl-$(TRL) OMP_NUM_THREADS=1 $$python -m pytest -q -p no:cacheprovider tests/loading/test_trainer_tokens.py tests/loading/test_odd_rows.py

$(OLDEST_STAMP): pyproject.toml constraints-oldest.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints-oldest.txt hatchling editables
	$(OLDEST)/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints-oldest.txt \
		--no-build-isolation --editable '.[audit]' hypothesis pytest pytest-xdist psutil
	@touch $@

test-fast: $(STAMP) ## Run the daily tests that are not marked slow.
	$(PYTEST) -m 'not slow and not nightly' $(ARGS)

zoo-fingerprints: $(STAMP) ## Renew tests/zoo_fingerprints.json; families with a new graph are tested in full.
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.zoo_fingerprints

golden: $(STAMP) ## Renew tests/golden/: records of today's schema, and what their page says.
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.golden_records

mutants: $(STAMP) ## Change the decisions, losses, conditions and coefficients: does a test notice? (ARGS="losses")
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.mutants $(ARGS)

lint: $(STAMP) ## Check style and formatting.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## Check types, strictly.
	$(BIN)/mypy

examples: $(EXAMPLES) ## Run every example.

$(EXAMPLES): $(STAMP)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python $@

docs: $(STAMP) ## Build the documentation (site/); a warning is an error.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The tests come last: their closing line is what a reader of a log looks for. What is owed, see scripts/proven.py.
check: $(STAMP) ## Everything that CI runs; `make test-all` instead of `make test` where a pin, a rule or a kernel changed.
	$(BESIDE) types lint
	for target in $$($(BIN)/python -m scripts.proven owed); do $(MAKE) --no-print-directory $$target || exit 1; done

budgets: $(STAMP) ## Write tests/budgets.json: how long each test file takes.
	BUDGETS=write $(MAKE) --no-print-directory test

format: $(STAMP) ## Reformat, and mend what can be mended.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

pins: $(STAMP) ## Write the environment's versions into constraints.txt.
	@{ sed -n '/^#/p' constraints.txt; $(PIP) freeze --all --exclude-editable --exclude pip | sed 's/+cpu$$//'; } > constraints.new
	mv constraints.new constraints.txt
	@touch $(STAMP)

clean: ## Remove caches, builds and what the commands wrote.
	rm -rf build dist gradent-demo site .cache .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

clean-venv: ## Remove the environment.
	rm -rf $(VENV) $(VENV)-trl-* $(OLDEST)
