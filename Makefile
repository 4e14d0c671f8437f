# `make demo` and `make test` are all a newcomer needs: either one creates .venv, installs
# everything pinned and builds the kernels first.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -euc
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SOURCES := $(wildcard csrc/*.cpp csrc/*.h) CMakeLists.txt pyproject.toml requirements/dev.txt

.PHONY: demo test lint docs native clean

demo: $(READY)
	$(BIN)/winnow demo

test: $(READY)
	$(BIN)/python -m pytest -q

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(READY)
	$(BIN)/python -m winnow.methods.pages docs/methods

# PyTorch goes first and by itself: an index that offers a CPU build is then not overruled by
# what another package asks for. The kernels build with the pinned tools of requirements/dev.txt.
$(READY): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements/dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	touch $@

# For work on the kernels: an incremental build straight into the source tree.
native:
	cmake -S . -B build/dev -G Ninja -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
	  -Dnanobind_DIR=$$($(BIN)/python -m nanobind --cmake_dir) -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(abspath src/winnow) > build-dev.log
	cmake --build build/dev -j 2

clean:
	rm -rf $(VENV) build dist src/winnow/_native*.so
