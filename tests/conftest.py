"""CPU tests: eight devices, and XLA without its slow optimisations (compiling is most of what these tests do)."""

import os

if os.environ.get("JAX_PLATFORMS") == "cpu":
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
    # Threads of XLA's CPU client, otherwise one per core: interpreted kernels have more that wait for one another.
    os.environ.setdefault("NPROC", "16")
