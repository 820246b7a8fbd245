# Every target sets up .venv by itself when it is missing or older than what it was made from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.installed
export FPS_REQUIRE_NATIVE ?= 1

.PHONY: demo test lint bench setup clean

setup: $(SETUP)

$(SETUP): pyproject.toml $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch torchvision
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: $(SETUP)
	$(BIN)/fps-kernels demo

lint: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Triton decides when a kernel is decorated whether it is interpreted, hence a process of its own for that lane.
test: lint
	$(BIN)/pytest -q -n 2
	TRITON_INTERPRET=1 $(BIN)/pytest -q -n 2 tests/ops

bench: $(SETUP)
	$(BIN)/python -m benchmarks.kernels
	$(BIN)/python -m benchmarks.triton_report
	$(BIN)/python -m benchmarks.selection_time
	$(BIN)/python -m benchmarks.memory_vs_gps --quick

clean:
	rm -rf $(VENV) build
