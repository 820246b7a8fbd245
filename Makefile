# Every target sets up .venv by itself when it is missing or older than what it was made from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.installed
export FPS_REQUIRE_NATIVE ?= 1

.PHONY: demo test test-suite test-cuda test-torch test-oldest soak every-launch fuzz compare kernel-lab lint bench bench-full setup clean

setup: $(SETUP)

$(SETUP): pyproject.toml $(shell find csrc -type f)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch torchvision
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: $(SETUP)
	$(BIN)/fps-kernels demo

lint: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc -name '*.cpp' -o -name '*.h')

test: lint test-suite

# Triton decides when a kernel is decorated whether it is interpreted, hence a process of its own for that lane.
test-suite: $(SETUP)
	$(BIN)/pytest -q -n 2
	TRITON_INTERPRET=1 $(BIN)/pytest -q -n 2 tests/ops

# What takes a device, on the GPU alone, and the ops' compiled kernels.
test-cuda: $(SETUP)
	FPS_TEST_DEVICES=cuda $(BIN)/pytest -q -n 4 tests/tuning tests/choosing tests/deltas tests/memory tests/integrations -k cuda
	$(BIN)/pytest -q -n 4 tests/ops -k triton

# The suites whose inputs are random, N times with fresh seeds; a failure prints the seed that repeats it.
N ?= 1
SOAKED := tests/ops tests/weights tests/selection tests/choosing tests/tuning tests/deltas tests/integrations tests/cli/test_resume.py
soak: $(SETUP)
	@for i in $$(seq $(N)); do \
		echo "soak $$i of $(N)"; \
		FPS_TEST_SEED=fresh $(BIN)/pytest -q -n 2 $(SOAKED) || exit 1; \
		FPS_TEST_SEED=fresh TRITON_INTERPRET=1 $(BIN)/pytest -q -n 2 tests/ops || exit 1; \
	done

# The interpreter checks no types: every kind of launch that it was asked for, and hundreds of random ones, are compiled.
RANDOM ?= 300
every-launch: $(SETUP)
	rm -rf build/launches && mkdir -p build/launches
	TRITON_INTERPRET=1 FPS_LAUNCHES=$(CURDIR)/build/launches/noted $(BIN)/pytest -q -n 2 -p kernel_lab.noting tests/ops
	$(BIN)/python -m kernel_lab.every_launch build/launches/noted.* --random $(RANDOM) --seed $(shell date +%j)000

# Delta and selection files full of lies, by coverage. What was found interesting is kept for the next time.
SECONDS ?= 60
fuzz: $(SETUP)
	$(BIN)/python -m pip install --quiet atheris
	mkdir -p build/corpus
	$(BIN)/python tests/deltas/fuzz_delta.py -max_total_time=$(SECONDS) build/corpus

# The suite on another torch, `make test-torch TORCH=2.11`; torchvision and Triton follow, since each of theirs belongs to one of torch.
TORCH ?= $(error TORCH=<version> is missing)
OTHER = build/torch-$(TORCH)
# The interpreter of the Triton that comes with torch 2.10 and 2.11 takes arrays of one number for numbers, which NumPy 2.4 does not.
OTHER_NUMPY = $(if $(filter 2.10 2.11,$(TORCH)),'numpy<2.4',numpy)

test-torch:
	test -x $(OTHER)/bin/python || $(PYTHON) -m venv $(OTHER)
	$(OTHER)/bin/python -m pip install --quiet 'torch==$(TORCH).*' torchvision
	$(OTHER)/bin/python -m pip install --quiet --editable '.[dev]' 'torch==$(TORCH).*' $(OTHER_NUMPY)
	$(OTHER)/bin/pytest -q -n 2
	TRITON_INTERPRET=1 $(OTHER)/bin/pytest -q -n 2 tests/ops

# The oldest that pyproject.toml allows. It is read from there, so that what is promised is what is tried.
test-oldest:
	$(MAKE) test-torch TORCH=$(shell sed -n 's/^ *"torch>=\([0-9.]*\)".*/\1/p' pyproject.toml)

# Every Triton kernel, executed on the CPU as an A100 and an H100 would: results, faults, memory traffic. docs/kernel-lab.md.
kernel-lab: $(SETUP)
	$(BIN)/python -m kernel_lab.ptx $(OPTIONS)

# Fails where the working tree is slower or larger than BASE. OPTIONS="--benchmarks kernels" makes it shorter.
compare: $(SETUP)
	$(BIN)/python -m benchmarks.compare $(or $(BASE),$(error BASE=<commit> is missing)) $(OPTIONS)

# Small sizes, into results/*_quick.json; what README and docs show comes from the long ones.
bench: $(SETUP)
	$(BIN)/python -m benchmarks.kernels --quick
	$(BIN)/python -m benchmarks.selection_time --quick
	$(BIN)/python -m benchmarks.memory_vs_gps --quick
	$(BIN)/python -m benchmarks.training --quick
	$(BIN)/python -m benchmarks.scaling --quick
	$(BIN)/python -m benchmarks.deltas --quick

# Hours with DATA="DIR ..." (each with train/ and test/), CHECKPOINT=FILE and ANCHOR=DIR, less without.
bench-full: $(SETUP)
	$(BIN)/python -m benchmarks.kernels
	$(BIN)/python -m benchmarks.selection_time
	$(BIN)/python -m benchmarks.memory_vs_gps
	$(BIN)/python -m benchmarks.training
	$(BIN)/python -m benchmarks.scaling
	$(BIN)/python -m benchmarks.deltas
	$(BIN)/python -m benchmarks.triton_report
ifneq ($(and $(DATA),$(CHECKPOINT),$(ANCHOR)),)
	$(BIN)/python -m benchmarks.accuracy --data $(DATA) --checkpoint $(CHECKPOINT) --anchor $(ANCHOR)
else
	@echo 'accuracy is left out: it needs DATA="DIR ...", CHECKPOINT=FILE and ANCHOR=DIR'
endif
	$(BIN)/python -m benchmarks.render

clean:
	rm -rf $(VENV) build
