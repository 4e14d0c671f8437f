# `make demo` and `make test` are all a newcomer needs; either one creates .venv and builds the kernels.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -euc
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint native clean

# For work on the kernels: an incremental build straight into the source tree.
native:
	cmake -S . -B build/dev -G Ninja -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
	  -Dnanobind_DIR=$$($(BIN)/python -m nanobind --cmake_dir) -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(abspath src/winnow) > build-dev.log
	cmake --build build/dev -j 2
