# `make demo` and `make test` each do the whole set-up on a fresh machine.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.mmcompress-installed
SOURCES := setup.py $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/* csrc/cuda/*)

.PHONY: help setup build build-cuda sanitize demo test test-versions test-families fuzz lint sdist wheel clean
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

build-cuda: setup ## the CUDA operators for sm_80 and sm_90; needs a toolkit, no GPU
	MMCOMPRESS_BUILD=cuda TORCH_CUDA_ARCH_LIST="8.0;9.0" $(BIN)/python setup.py -q build_ext --inplace

# A copy of the tree, so that the installed library stays; AVX-512 code runs emulated where the processor lacks it.
SANITIZED := build/sanitize
sanitize: setup   ## the CPU operators' tests under the address and undefined-behaviour sanitizers
	@rm -rf $(SANITIZED) && mkdir -p $(SANITIZED)/mmcompress $(SANITIZED)/tests
	@cp -r csrc setup.py pyproject.toml $(SANITIZED) && cp -r mmcompress/ops $(SANITIZED)/mmcompress && cp -r tests/ops $(SANITIZED)/tests
	@touch $(SANITIZED)/mmcompress/__init__.py $(SANITIZED)/README.md $(SANITIZED)/LICENSE
	cd $(SANITIZED) && MMCOMPRESS_BUILD=cpu MMCOMPRESS_SANITIZE=1 MMCOMPRESS_EMULATE_AVX512=1 $(abspath $(BIN))/python setup.py -q build_ext --inplace
	cd $(SANITIZED) && LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=2 $(abspath $(BIN))/python -m pytest -q -p no:cacheprovider \
	  tests/ops/test_hand_examples.py tests/ops/test_ops_decisions.py tests/ops/test_ops_errors.py tests/ops/test_ops_properties.py \
	  tests/ops/test_ops_screening.py

demo: setup       ## questions about pictures, clips and recordings, uncompressed and compressed; writes demo/index.html
	$(BIN)/mmcompress demo --out demo

test: setup       ## the whole test suite
	$(BIN)/python -m pytest -q -n 2

test-versions: setup ## the models' tests on every supported transformers, under an hour; ARGS="--help" tells more
	$(BIN)/python benchmarks/versions.py $(ARGS)

test-families: setup ## the contract of every family; WITH="--with DIR" adds other versions of transformers; goes on where it stopped
	$(BIN)/python benchmarks/families.py $(WITH)

fuzz: setup       ## 10,000 random uses of everything, against the oracle; goes on where it was stopped
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --cases 10000 --seed 0 --jobs 2 --state build/fuzz

lint: setup       ## ruff, mypy, clang-format
	$(BIN)/pre-commit run --all-files

# Stamps of 1980 (the least that a zip holds) and a build from the source distribution: the same tree gives the same wheel.
# torch brings its own libraries, so the wheel holds none of them; auditwheel gives it the oldest C library's tag that is true.
sdist: setup      ## the source distribution, dist/*.tar.gz
	@rm -rf dist/*.tar.gz *.egg-info
	MMCOMPRESS_BUILD=0 $(BIN)/python -m build -n -s

wheel: sdist      ## the wheel with the CPU operators, made from the source distribution, dist/*.whl
	@rm -rf build/wheel dist/*.whl
	MMCOMPRESS_BUILD=cpu SOURCE_DATE_EPOCH=315532800 $(BIN)/python -m pip wheel -q --no-deps --no-build-isolation -w build/wheel dist/*.tar.gz
	PATH=$(abspath $(BIN)):$$PATH SOURCE_DATE_EPOCH=315532800 $(BIN)/python -m auditwheel repair --exclude 'libtorch*.so' \
	  --exclude 'libc10*.so' -w dist build/wheel/*.whl

clean:            ## what was built, not the virtual environment
	rm -rf build dist demo *.egg-info mmcompress/*.so
