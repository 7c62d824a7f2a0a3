# make demo   sets everything up, extends a real model and shows it working past its window
# make test   lint, types, and every test CI runs
# make test-full  and what is too slow for CI: llama-server, Hugging Face transformers
# make test-hard  the long sweeps alone: kills, faults, fuzzing, load (docs/reliability.md says how long they took)
# make fuzz   every fuzz target for SECONDS=600 each; test-hard has the same in it
# make test-asan, test-tsan   21 test files that reach the C++ core, with the core under sanitizers (7 and 18 minutes under load)
# make test-asan-engine       the patched llama.cpp under sanitizers: its tiny architectures (20 minutes of compiling)
# make audit  bandit on the sources, pip-audit on what is installed (needs PyPI's advisories)
# make engine the patched llama.cpp that tests run on
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
JOBS   ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
NATIVE := $(wildcard native/*) CMakeLists.txt pyproject.toml

export CMAKE_BUILD_PARALLEL_LEVEL ?= $(JOBS)
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test test-full test-hard audit engine test-reference lint bench wheel clean fuzz test-asan test-tsan test-asan-engine

demo: $(VENV)/.demo
	$(BIN)/mrrope demo --out demo

test: lint engine
	$(BIN)/python -m pytest

test-full: lint engine test-reference
	MRROPE_TEST_FULL=1 $(BIN)/python -m pytest

test-hard: engine
	MRROPE_TEST_HARD=1 $(BIN)/python -m pytest -m hard

fuzz: $(VENV)/.dev
	$(BIN)/python -m tests.fuzz --seconds $(or $(SECONDS),600)

test-asan test-tsan test-asan-engine: test-%: $(VENV)/.dev
	$(BIN)/python -m tests.sanitized $*

# what tests/conftest.py asks for, made here where its progress shows: 3 to 6 minutes on 2 cores, once
engine: $(VENV)/.dev
	$(BIN)/mrrope build --backend cpu --no-server --tests

# Against Hugging Face transformers, in an environment of its own (torch: 3 to 6 GB). Not in CI.
test-reference: $(VENV)/.dev $(VENV)-reference/.done
	MRROPE_REFERENCE_PYTHON=$(VENV)-reference/bin/python $(BIN)/python -m pytest tests/reference

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@$(BIN)/cmake -S . -B build/lint -G Ninja -DCMAKE_BUILD_TYPE=Debug -DMRROPE_WERROR=ON \
	  -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
	  -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) --log-level=WARNING > /dev/null
	$(BIN)/cmake --build build/lint

audit: $(VENV)/.dev $(VENV)-audit/.done
	$(VENV)-audit/bin/bandit --quiet --recursive --configfile tools/bandit.yaml mrrope_gguf tools
	$(VENV)-audit/bin/pip-audit --strict --skip-editable --progress-spinner off \
	  --path "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks

wheel: $(VENV)/.dev
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(BIN)/python tools/check_wheel.py dist

# The package itself, and llama-cpp-python compiled from source (the slow part; pip keeps the built wheel).
$(VENV)/.demo: $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet scikit-build-core pybind11 cmake ninja
	@echo "compiling llama.cpp for this machine: about 4 minutes on 2 cores, once"
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[engine,plot]'
	touch $@

$(VENV)/.dev: $(VENV)/.demo requirements-dev.txt
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	touch $@

$(VENV)-audit/.done: tools/audit.txt
	$(PYTHON) -m venv $(VENV)-audit
	$(VENV)-audit/bin/python -m pip install --quiet --requirement $<
	touch $@

$(VENV)-reference/.done: tests/reference/requirements.txt
	$(PYTHON) -m venv $(VENV)-reference
	$(VENV)-reference/bin/python -m pip install --quiet --requirement $<
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-reference $(VENV)-audit build dist demo wheelhouse .mypy_cache .pytest_cache .ruff_cache .hypothesis
