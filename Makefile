# make demo | test | lint | aot | test-gpu | bench | clean. Each installs what it needs into .venv first, once.
# With an environment of your own, which already has everything: make test PYTHON=/path/to/python

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo test lint aot test-gpu bench clean

VENV := .venv
PYTHON := $(VENV)/bin/python
JOBS := 2
GPU_JOBS := 12

# The stamps of what .venv holds; none when PYTHON names another environment.
ifeq ($(PYTHON),$(VENV)/bin/python)
base := $(VENV)/installed-base
dev := $(VENV)/installed-dev
aot := $(VENV)/installed-aot
cuda := $(VENV)/installed-cuda13
endif

demo: $(base)
	$(PYTHON) -m moe_jax generate --model shakespeare --prompt "ROMEO:"

test: $(dev)
	JAX_PLATFORMS=cpu $(PYTHON) -m pytest -n $(JOBS) -m "not gpu and not aot"

lint: $(dev)
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy

aot: $(dev) $(aot)
	JAX_PLATFORMS=cpu $(PYTHON) -m pytest -n $(JOBS) -m aot

# One GPU and many processes, since lowering a kernel is Python; the cases of a large layer in the same one, and huge layers
# afterwards, since processes keep the memory that they took. XLA does not time alternatives meanwhile. A kernel that never
# ends takes its process with it, and another comes in its place.
gpu_tests := --dist loadgroup --max-worker-restart 50 -o faulthandler_timeout=240 -o faulthandler_exit_on_timeout=true
test-gpu: export XLA_PYTHON_CLIENT_PREALLOCATE := false
test-gpu: export XLA_FLAGS += --xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false
test-gpu: $(dev) $(cuda)
	XLA_PYTHON_CLIENT_MEM_FRACTION=0.12 $(PYTHON) -m pytest -m "gpu and not huge" -n $(GPU_JOBS) $(gpu_tests)
	XLA_PYTHON_CLIENT_MEM_FRACTION=0.9 $(PYTHON) -m pytest -m "gpu and huge" -n 1 $(gpu_tests)

bench: $(dev) $(cuda)
	$(PYTHON) scripts/benchmark_kernels.py --again
	$(PYTHON) scripts/plot_kernels.py
	$(PYTHON) scripts/benchmark_generate.py --again
	$(PYTHON) scripts/experts_sweep.py
	for batch in 1 8; do $(PYTHON) scripts/profile_step.py --batch $$batch; done
	$(PYTHON) scripts/plot_generate.py

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# $(call install,requirement): pip's output as one line that grows by a name for every package it looks at.
install = $(PYTHON) -m pip install --disable-pip-version-check --progress-bar off -e "$(1)" \
	| awk '/^Collecting/ { printf " %s", $$2; fflush() } /^Installing/ { printf "\n  writing them to $(VENV) ..."; fflush() } END { print "" }'

$(PYTHON):
	@python=$$(.ci/find-python) && echo "Making $(VENV) with $$python" && "$$python" -m venv $(VENV)

$(VENV)/installed-base: pyproject.toml | $(PYTHON)
	@echo "Installing moe-jax into $(VENV) (once, about a minute):"
	@$(call install,.)
	@touch $@

$(VENV)/installed-%: pyproject.toml $(VENV)/installed-base | $(PYTHON)
	@echo "Installing moe-jax[$*] into $(VENV) (once):"
	@$(call install,.[$*])
	@touch $@
