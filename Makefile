# `make` alone lists the targets. Everything runs in .venv, which is made on first use.
PYTHON ?= python3
PYTEST_ARGS ?=
# Files of tests are shared out among so many processes, each with one thread, the longest first (tests/conftest.py).
WORKERS ?= 2
DEMO_ARGS ?=
BENCH_GPU_ARGS ?= --out bench-gpu.json

VENV := .venv
BIN := $(VENV)/bin
NATIVE := $(wildcard qnext/ops/cpu/CMakeLists.txt qnext/ops/cpu/src/*)
SHARED := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
ALONE := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu"
# Beside them one more process: first what looks at the time and memory of its process, then, once more, what computes,
# without the native kernels.
BESIDE := $(VENV)/beside.log
# Where it can make a difference who computes. Not again: policy and sampling, which reach no operator, and tests that
# name their implementations, want gradients or compute in fp64, which is torch's work in any case.
OPERATORS := backends conv limits linear long_positions moe norm packing rope rounding
MODELS := init model peer weights
ENGINES := drafter drafts engine engine_sizes state_dtype
WHO_COMPUTES := $(OPERATORS:%=tests/ops/test_%.py) $(MODELS:%=tests/model/test_%.py) $(ENGINES:%=tests/engine/test_%.py)
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-gpu check bench bench-gpu clean

help:
	@echo "make demo      train a small Qwen3-Next here on the CPU; it completes code (DEMO_ARGS=\"--minutes 5\")"
	@echo "make test      the tests that every change must pass, a few minutes        (PYTEST_ARGS=tests/ops)"
	@echo "make test-all  every test: also the slow ones, and those for a GPU where there is one"
	@echo "make test-gpu  the tests of GPU kernels, on the GPU of this machine"
	@echo "make check     ruff and mypy"
	@echo "make bench     the benchmarks on this machine"
	@echo "make bench-gpu errors and times of GPU kernels and of an engine, and bench-gpu.json   (BENCH_GPU_ARGS=\"--out FILE\")"
	@echo "make clean     remove the environment and caches; runs/ stays"
	@echo
	@echo "PYTHON=python3.12 chooses the interpreter that .venv is made from (3.10 or newer)."

demo: $(VENV)/.installed
	$(BIN)/qnext demo $(DEMO_ARGS)

# Hundreds of processes would compile the package anew, 0.3 s each, and each pytest its tests.
test: export PYTHONDONTWRITEBYTECODE :=
test: $(VENV)/.installed-dev
ifeq ($(strip $(PYTEST_ARGS)),)
	@trap 'kill $$beside 2>/dev/null' EXIT; trap 'exit 130' INT TERM; code=0; \
	(trap 'kill $$!; exit 143' TERM; code=0; \
	$(ALONE) -q tests/server/hostile & wait $$! || code=$$?; \
	env QNEXT_BACKEND=torch $(ALONE) -q $(WHO_COMPUTES) & wait $$! || code=$$?; \
	exit $$code) >$(BESIDE) 2>&1 & beside=$$!; \
	$(SHARED) -m "not slow and not gpu" --ignore tests/server/hostile tests || code=$$?; \
	echo "beside them, in a process of its own: tests/server/hostile; then, once more, without the native kernels"; \
	wait $$beside || code=$$?; cat $(BESIDE); exit $$code
else
	$(SHARED) -m "not slow and not gpu" $(PYTEST_ARGS)
endif

test-all: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-gpu: $(VENV)/.installed-dev
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { \
		echo "make test-gpu: there is no CUDA device here, or PyTorch was built without CUDA" >&2; exit 2; }
	$(BIN)/python -m pytest -m gpu tests $(PYTEST_ARGS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(VENV)/.installed-dev
	@set -e; for script in benchmarks/bench_*.py; do \
		if [ ! -f "$$script" ]; then echo "no benchmarks here" >&2; exit 2; fi; \
		echo "== $$script"; $(BIN)/python "$$script"; \
	done

bench-gpu: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/check_gpu.py $(BENCH_GPU_ARGS)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pip comes last into an environment: without it the folder is left from an interrupted run and is made again.
$(BIN)/pip:
	@command -v $(PYTHON) >/dev/null || { \
		echo "make: $(PYTHON) is not here; install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "make: $$($(PYTHON) --version) is too old; Python 3.10 or newer is needed: make PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "make: $(PYTHON) cannot make environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt $(NATIVE) | $(BIN)/pip
	@echo "installing qnext into $(VENV); torch makes the first time take minutes"
	@$(PIP) -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt $(NATIVE) | $(BIN)/pip
	@echo "installing qnext and its test tools into $(VENV); torch makes the first time take minutes"
	@$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.installed
