# make demo       train and question a small InfiMM-HD, about ten minutes on two CPU cores
# make test       lint and all tests but the long ones
# make test-long  the long tests
# make reliability  kill, damage, starve and fuzz the trainer some hundred times: runs/reliability.json
# make emulate    every seeded bug of the CUDA kernels against their emulation: one JSON line
# make lint       ruff and clang-format
# make gpu        build, test and measure on the GPU at hand, in BUDGET_S=540 seconds: bench/results/

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CSRC := $(wildcard csrc/*.* csrc/common/* csrc/ptx/*)
CPP := $(CSRC) $(wildcard bench/*.cu tests/emulate/*.cpp tests/emulate/*.h tests/emulate/cuda_shim/*.h tests/emulate/cuda_shim/ptx/*)
BUILD_INPUTS := pyproject.toml setup.py constraints.txt $(CSRC)

.PHONY: demo test test-long reliability emulate lint gpu clean

demo: $(INSTALLED)
	$(BIN)/python -m train.demo

# A process for each core, of one thread each: most tests are one interpreter or one compiler at work.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile

test: $(INSTALLED) lint
	$(PYTEST) -m "not long"

# What compares times has the machine to itself.
SPEED := tests/kernels/test_cpu_speed.py

test-long: $(INSTALLED)
	$(PYTEST) -m long --ignore $(SPEED) --durations=30 --durations-min=30
	$(BIN)/python -m pytest -q -m long $(SPEED)

reliability: $(INSTALLED)
	$(BIN)/python -m bench.reliability

emulate: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.emulate

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
