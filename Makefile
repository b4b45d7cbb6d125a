# `make demo` and `make test` each do the whole set-up on a fresh machine.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.mmcompress-installed
SOURCES := setup.py $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/* csrc/cuda/*)

.PHONY: help setup build demo test lint clean
.DEFAULT_GOAL := help

help:             ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

setup: $(STAMP)   ## virtual environment, pinned stack, editable build (again only when something changed)

$(STAMP): pyproject.toml constraints.txt $(SOURCES)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt "setuptools>=77" wheel ninja torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[dev]"
	@touch $@

build: setup      ## the same; the compiled operators are built where a compiler is found

demo: setup       ## questions about real pictures, uncompressed and compressed; writes demo/index.html
	$(BIN)/mmcompress demo --out demo

test: setup       ## the whole test suite
	$(BIN)/python -m pytest -q -n 2

lint: setup       ## ruff, mypy, clang-format
	$(BIN)/pre-commit run --all-files

clean:            ## what was built, not the virtual environment
	rm -rf build demo *.egg-info mmcompress/*.so
