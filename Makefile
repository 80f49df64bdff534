# One virtual environment, made on first use and kept: a second run installs only if pyproject.toml changed.
#   PYTHON       interpreters to try for the environment, in this order
#   TORCH_INDEX  extra package index for PyTorch wheels (for example one with CPU-only builds); empty: the default index
#   JOBS         test processes, each computing on one thread; compiler processes
#   CMAKE CTEST  build and test the native kernels
#   ARGS         further arguments for pytest

SHELL       := /bin/bash
VENV        ?= .venv
PYTHON      ?= python3 python3.14 python3.13 python3.12 python3.11
TORCH_INDEX ?=
PORT        ?= 8000
ONCE        ?=
JOBS        ?= 2
CMAKE       ?= cmake
CTEST       ?= ctest
ARGS        ?=

# Threads that spin while they wait make two busy processes slow each other down several times over.
export OMP_WAIT_POLICY ?= passive
# For `make native` and for pip, which would otherwise download Ninja where there is none.
export CMAKE_GENERATOR ?= $(if $(shell command -v ninja),Ninja,Unix Makefiles)
export CMAKE_BUILD_PARALLEL_LEVEL ?= $(JOBS)

BIN     := $(VENV)/bin
PYTEST  := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile
INSTALL := $(BIN)/python -m pip --quiet --disable-pip-version-check install \
           $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

# The commands that configure the native kernels, $(1): variant, $(2): options; that build its tests; that run them.
comma := ,
CONFIGURE    = $(CMAKE) -S . -B build/$(1) --log-level=WARNING -DCMAKE_INSTALL_MESSAGE=NEVER -DQERVE_BUILD_TESTS=ON $(2)
NATIVE_TESTS = $(CMAKE) --build build/$(1) --target qerve_cpu_tests && $(CTEST) --test-dir build/$(1) --output-on-failure

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help venv native native-test native-neon demo model ops-tools test test-all bench gpu-check quality tree clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

venv: $(VENV)/.installed-dev ## create the virtual environment with everything tests and checks need

# Beside the Python sources, where it comes before the one that pip built: a changed kernel needs no new install.
native: ## build the native CPU kernels in place; they follow their sources without a new install
	@if $(CMAKE) --version > /dev/null 2>&1; then \
	    $(call CONFIGURE,native) \
	        && $(CMAKE) --build build/native --target _qerve_cpu && $(CMAKE) --install build/native --prefix .; \
	else \
	    echo "$(CMAKE) is not installed: the native kernels are those that pip built"; \
	fi

native-test: native ## test the native kernels: plain, with the address and undefined sanitizers, with the thread sanitizer
	@$(call NATIVE_TESTS,native)
	@$(call CONFIGURE,native-address,-DQERVE_WERROR=ON -DQERVE_SANITIZE=address$(comma)undefined)
	@$(call NATIVE_TESTS,native-address)
	@$(call CONFIGURE,native-thread,-DQERVE_WERROR=ON -DQERVE_SANITIZE=thread)
	@$(call NATIVE_TESTS,native-thread)

native-neon: ## test the native kernels as compiled for 64-bit ARM, under an emulator
	@for tool in aarch64-linux-gnu-g++ qemu-aarch64; do \
	    command -v $$tool > /dev/null || { echo "skipped: $$tool is not installed"; exit 0; }; \
	done; \
	$(call CONFIGURE,native-neon,-DQERVE_WERROR=ON -DCMAKE_TOOLCHAIN_FILE=cmake/aarch64-linux-gnu.cmake) \
	    && $(call NATIVE_TESTS,native-neon)

demo: $(VENV)/.installed native ## quantize a small real model, serve it, try it; ONCE=1 ends after the summary, PORT=N
	@$(BIN)/python -m tools.demo --port $(PORT) $(if $(filter-out 0,$(ONCE)),--once)

model: $(VENV)/.created ## fetch the small real model that the demo and some tests use
	@$(BIN)/python -m tools.fetch_model

ops-tools: $(VENV)/.created ## fetch Prometheus, Alertmanager and Helm, with which tests check deploy/
	@$(BIN)/python -m tools.fetch_ops_tools

test: $(VENV)/.installed-dev native ## run the tests, without those marked slow
	@$(BIN)/python -m tools.fetch_model || echo "tests with the real model will be skipped"
	@$(BIN)/python -m tools.fetch_ops_tools || echo "tests with the missing programs will be skipped"
	@$(PYTEST) -m "not slow" $(ARGS)

test-all: $(VENV)/.installed-dev native model ## run every test, with the real model
	@$(PYTEST) $(ARGS)

bench: $(VENV)/.installed-dev native model ## time numerics, kernels, engine and server; run it with nothing else running
	@$(BIN)/python -m tools.bench_qera --checkpoint .cache/models/SmolLM2-135M-Instruct.Q4_1.gguf
	@$(BIN)/python -m tools.bench_qera --shape 4096x11008
	@$(BIN)/python -m tools.bench_artifact

gpu-check: $(VENV)/.installed-dev ## on a machine with a GPU: its tests and benches, written to docs/gpu-results.md
	@$(BIN)/python -m tools.gpu_check $(ARGS)

quality: $(VENV)/.installed-dev ## lint, formatting and types, as CI checks them
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

tree: $(VENV)/.created ## bring the README's file tree up to date
	@$(BIN)/python -m tools.readme_tree

clean: ## remove the environment and caches; artifacts/ and the fetched model stay
	rm -rf models/kernels/_qerve_cpu.* .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find models service tests tools -type d -name __pycache__ -prune -exec rm -rf {} +

# Touched only when every step worked: a half-made environment is made again.
$(VENV)/.created:
	@set -e; for candidate in $(PYTHON); do \
	    if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        echo "creating $(VENV) with $$candidate"; \
	        "$$candidate" -m venv $(VENV); touch $@; exit 0; \
	    fi; \
	done; \
	echo "qerve needs Python 3.11 or newer and found none among: $(PYTHON)" >&2; \
	echo "install one, or name it: make PYTHON=/path/to/python3.12" >&2; exit 1

$(VENV)/.installed: pyproject.toml $(VENV)/.created
	@echo "installing qerve into $(VENV) (the first time downloads PyTorch, which takes minutes)"
	@$(INSTALL) --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(VENV)/.created
	@echo "installing qerve and its development tools into $(VENV) (the first time takes minutes)"
	@$(INSTALL) --editable '.[dev]'
	@touch $@ $(VENV)/.installed
