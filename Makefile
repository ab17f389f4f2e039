# make demo       train and question a small InfiMM-HD, about ten minutes on two CPU cores
# make test       lint and all tests but the long ones
# make test-long  the long tests
# make lint       ruff and clang-format
# make gpu        build, test and measure on the GPU at hand, in BUDGET_S=540 seconds: bench/results/

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CPP := $(wildcard csrc/*.* csrc/common/* tests/emulate/*.cpp tests/emulate/cuda_shim/*)
BUILD_INPUTS := pyproject.toml setup.py constraints.txt $(wildcard csrc/*.* csrc/common/*)

.PHONY: demo test test-long lint gpu clean

demo: $(INSTALLED)
	$(BIN)/python -m train.demo

test: $(INSTALLED) lint
	$(BIN)/python -m pytest -q -m "not long"

test-long: $(INSTALLED)
	$(BIN)/python -m pytest -q -m long

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)

# Without the virtual environment: such a machine has its own torch, and may have no network.
gpu:
	$(PYTHON) -m bench.gpu

$(INSTALLED): $(BUILD_INPUTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[triton,demo,bench,test]"
	$(BIN)/python -m infimm_kernels
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info runs
