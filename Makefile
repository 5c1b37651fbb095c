# Everything from a fresh clone: needs Python >= 3.11 with venv and headers, a C++ compiler for the native kernels (without one the
# portable implementations are tested alone, and the run says so), and nothing else.
# All tools live in .venv; only the outside judges (test-llama-cpp, test-kt-kernel, test-gptqmodel) have environments of their own.

PYTHON ?= python3
JOBS ?= 2
BACKEND ?= cuda

BIN := .venv/bin
READY := .venv/.ready
NATIVE := .venv/.native
NATIVE_SOURCES := $(shell find glm5_port/backends/cpu/native -name '*.h' -o -name '*.cpp' -o -name CMakeLists.txt 2>/dev/null)
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input --quiet

# One thread per test process: xdist runs JOBS of them.
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
unexport PYTHONPATH PYTHONHOME

.PHONY: help env demo test test-all test-interpreter test-interpreter-slow test-sanitize test-npu test-triton-ascend test-llama-cpp test-kt-kernel test-gptqmodel lint bench device-check docs clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F '\t' '{ printf "  make %-14s %s\n", $$1, $$2 }'
	@echo "  variables: PYTHON=$(PYTHON) (makes .venv), JOBS=$(JOBS) (test processes)"

env: $(READY) $(NATIVE) ## a ready .venv with everything that development needs

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"$(PYTHON) is Python {v[0]}.{v[1]}; development needs 3.11 or later: make env PYTHON=python3.11")'
	@[ -x $(BIN)/python ] || { echo "== making .venv with $$($(PYTHON) --version)"; $(PYTHON) -m venv .venv; }
	@echo "== installing what builds the package"
	@$(PIP) install -c constraints.txt hatchling editables scikit-build-core nanobind cmake ninja
	@echo "== installing glm5_port and its development tools (some minutes the first time: torch is large)"
	@PATH="$$PWD/$(BIN):$$PATH" $(PIP) install -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@ $(NATIVE)
	@echo "== .venv is ready: source .venv/bin/activate"

# Only what changed is compiled again. The PATH is for cmake and ninja.
$(NATIVE): $(NATIVE_SOURCES) | $(READY)
	@echo "== building the native kernels"
	@PATH="$$PWD/$(BIN):$$PATH" $(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

demo: env ## the main job on real input: backends, a small GLM-5.2, agreement with transformers, parity, INT4
	@$(BIN)/glm5-port demo

lint: env ## ruff and mypy
	@echo "== ruff format --check"; $(BIN)/ruff format --check --output-format concise --quiet . || { echo "  make it so: $(BIN)/ruff format ."; exit 1; }
	@echo "== ruff check"; $(BIN)/ruff check --quiet .
	@echo "== mypy"; $(BIN)/mypy

test: lint ## format, lint, types and the fast tests
	@echo "== pytest, fast tests, $(JOBS) processes"; $(PYTEST) -n $(JOBS) -q
	@$(MAKE) test-interpreter
	@echo "== left out here:"
	@$(PYTEST) -m slow --collect-only -q -p no:cacheprovider | grep -E '::' | sed 's/::.*//' | sort | uniq -c \
	  | sed 's/^ */  slow tests: /' || echo "  slow tests: there are none yet"
	@echo "  native kernels under sanitizers: make test-sanitize"
	@echo "  npu backend under the vendor's torch_npu: make test-npu"
	@echo "  Triton kernels lowered for an Ascend NPU: make test-triton-ascend (make test-all leaves it out too)"
	@echo "  CUDA kernels by the interpreter in float32, float16 and large tiles, and broken ones: make test-interpreter-slow"
	@echo "  outside judges in environments of their own: make test-llama-cpp, make test-kt-kernel, make test-gptqmodel (make test-all leaves them out too)"
	@echo "  random cases of every operator, as many as wanted: glm5-port parity --sweep 100"

test-interpreter: env ## the CUDA kernels on the CPU by Triton's interpreter, in a process of its own; no GPU runs
	@if $(BIN)/python -c 'import triton' 2>/dev/null; then \
	  echo "== pytest, CUDA kernels by Triton's interpreter (no GPU), $(JOBS) processes"; \
	  TRITON_INTERPRET=1 $(PYTEST) tests/interpreter -n $(JOBS) -q; \
	else echo "== NOT TESTED: CUDA kernels by the interpreter (triton has no build for this machine)"; fi

test-interpreter-slow: env ## the same in float32, float16 and with large tiles, and broken kernels, which it must notice
	@if $(BIN)/python -c 'import triton' 2>/dev/null; then \
	  echo "== pytest, CUDA kernels by Triton's interpreter (no GPU), slow tests, $(JOBS) processes"; \
	  TRITON_INTERPRET=1 $(PYTEST) tests/interpreter -n $(JOBS) -q -m slow; \
	else echo "== NOT TESTED: slow tests of the CUDA kernels by the interpreter (triton has no build for this machine)"; fi

test-sanitize: env ## the native kernels' own tests, under address and undefined-behaviour sanitizers
	@command -v $${CXX:-c++} >/dev/null || { echo "== NOT TESTED: sanitizers (no C++ compiler)"; exit 0; }; \
	  echo "== native kernels under address and undefined-behaviour sanitizers"; \
	  export PATH="$$PWD/$(BIN):$$PATH"; mkdir -p build; \
	  cmake -S glm5_port/backends/cpu/native -B build/sanitize -G Ninja -DGLM5_PORT_SANITIZE=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo >build/sanitize.log && \
	  cmake --build build/sanitize >>build/sanitize.log || { cat build/sanitize.log; exit 1; }; \
	  build/sanitize/native_tests

# torch_npu breaks `import torch` for everybody else and refuses CUDA builds of it, so it lives in .venv-npu.
NPU_PYTEST := TORCH_DEVICE_BACKEND_AUTOLOAD=0 OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 .venv-npu/bin/python -m pytest

test-npu: ## the npu backend under the vendor's own torch_npu, on a stand-in for CANN (no NPU needed, none tested)
	@for tool in gcc nm; do command -v $$tool >/dev/null || { echo "== NOT TESTED: NPU front end ($$tool is not installed)"; exit 0; }; done; \
	  $(MAKE) .venv-npu/.ready || { echo "== NOT TESTED: NPU front end (torch 2.13.0 with torch_npu 2.13.0 cannot be installed here)"; exit 0; }; \
	  echo "== npu backend on the stand-in runtime, $(JOBS) processes (no kernel of the hardware runs)"; \
	  $(NPU_PYTEST) tests/npu_runtime -m "slow or not slow" -n $(JOBS) -q

.venv-npu/.ready: tests/npu_runtime/requirements.txt
	@echo "== making .venv-npu (some minutes: it has a torch of its own)"
	@rm -rf .venv-npu; $(PYTHON) -m venv .venv-npu
	@.venv-npu/bin/python -m pip --disable-pip-version-check --no-input --quiet install -c constraints.txt -r $<
	@touch $@

# triton-ascend owns the import name `triton`. Everything else its tests find in .venv, whose packages come after its own.
TRITON_ASCEND_PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 .venv-triton-ascend/bin/python -m pytest

test-triton-ascend: env ## the Triton kernels lowered to Linalg for an Ascend NPU by triton-ascend (no NPU and no CANN needed, none tested)
	@$(MAKE) .venv-triton-ascend/.ready || { echo "== NOT TESTED: lowering for Ascend (triton-ascend cannot be installed here)"; exit 0; }; \
	  echo "== Triton kernels lowered for Ascend910B2 (nothing runs)"; $(TRITON_ASCEND_PYTEST) tests/triton_ascend -q

.venv-triton-ascend/.ready: tests/outside/triton_ascend_requirements.txt $(READY)
	@echo "== making .venv-triton-ascend"
	@rm -rf .venv-triton-ascend; $(PYTHON) -m venv .venv-triton-ascend
	@.venv-triton-ascend/bin/python -m pip --disable-pip-version-check --no-input --quiet install -r $<
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > "$$(.venv-triton-ascend/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/packages_of_venv.pth"
	@touch $@

test-all: test test-interpreter-slow test-sanitize test-npu ## also the slow tests, the sanitizers and the npu front end
	@echo "== pytest, slow tests, $(JOBS) processes"
	@status=0; $(PYTEST) -m slow -n $(JOBS) -q || status=$$?; \
	  if [ $$status -eq 5 ]; then echo "  there are no slow tests yet"; elif [ $$status -ne 0 ]; then exit $$status; fi

# Outside judges in environments of their own: .venv-<name>, made on first use and whenever its requirements change. They are in
# no other target, and end with an error where they cannot run.
OUTSIDE := tests/outside

test-llama-cpp: env .venv-llama-cpp/.ready ## llama.cpp judges exported GGUF files (compiles it the first time, ten minutes)
	@$(BIN)/python -m tests.outside.llama_cpp_judge

.venv-llama-cpp/.ready: $(OUTSIDE)/llama_cpp_requirements.txt
	@command -v $${CXX:-c++} >/dev/null || { echo "NOT RUN: llama.cpp is compiled from source, and there is no C++ compiler ($${CXX:-c++}): install one, or set CXX"; exit 1; }
	@echo "== making .venv-llama-cpp and compiling llama.cpp (about ten minutes of processor time)"
	@rm -rf .venv-llama-cpp; $(PYTHON) -m venv .venv-llama-cpp
	@CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) .venv-llama-cpp/bin/python -m pip --disable-pip-version-check --no-input --quiet install -r $<
	@touch $@

test-kt-kernel: env .venv-kt-kernel/.ready ## kt-kernel judges exported INT4 experts (needs AVX-512 or AMX)
	@$(BIN)/python -m tests.outside.kt_kernel_judge

.venv-kt-kernel/.ready: $(OUTSIDE)/kt_kernel_requirements.txt
	@echo "== making .venv-kt-kernel (some minutes: it has a torch of its own)"
	@rm -rf .venv-kt-kernel; $(PYTHON) -m venv .venv-kt-kernel
	@.venv-kt-kernel/bin/python -m pip --disable-pip-version-check --no-input --quiet install --no-deps -r $< \
	  || { echo "NOT RUN: kt-kernel has wheels for Linux on x86-64 with glibc 2.35 or newer"; exit 1; }
	@touch $@

test-gptqmodel: env .venv-gptqmodel/.ready ## GPT-QModel judges exports to GPTQ and AWQ
	@$(BIN)/python -m tests.outside.gptqmodel_judge

.venv-gptqmodel/.ready: $(OUTSIDE)/gptqmodel_requirements.txt
	@echo "== making .venv-gptqmodel (some minutes: it has a torch of its own)"
	@rm -rf .venv-gptqmodel; $(PYTHON) -m venv .venv-gptqmodel
	@.venv-gptqmodel/bin/python -m pip --disable-pip-version-check --no-input --quiet install --no-deps -r $<
	@BUILD_CUDA_EXT=0 .venv-gptqmodel/bin/python -m pip --disable-pip-version-check --no-input --quiet install \
	  --no-deps --no-build-isolation gptqmodel==7.7.0
	@touch $@

device-check: ## for a machine with a GPU or NPU: parity, promises and speed on it, into evidence/; installs nothing (PYTHON=python3, BACKEND=cuda)
	@$(PYTHON) -m glm5_port.testing.device_check --backend $(BACKEND)

bench: env ## time every operator at GLM-5 widths (refuses where parity is red)
	@$(BIN)/glm5-port bench

docs: env ## regenerate docs/flags.md and the evidence table of the README
	@$(BIN)/python docs/generate.py

clean: ## remove every environment and cache
	rm -rf .venv .venv-npu .venv-triton-ascend .venv-llama-cpp .venv-kt-kernel .venv-gptqmodel build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
