"""CPU tests: eight devices, XLA without its slow optimisations (compiling is most of what these tests do), and bfloat16
rounded wherever the models say so, as in PyTorch: XLA would leave out roundings between fused operations, and with
them near-equal experts change places."""

import os
import signal
import sys
from pathlib import Path

import pytest

if os.environ.get("JAX_PLATFORMS") == "cpu":
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0 --xla_allow_excess_precision=false"
    )
    # Threads of XLA's CPU client, otherwise one per core: interpreted kernels have more that wait for one another.
    os.environ.setdefault("NPROC", "16")

MAPPINGS = Path("/proc/self/maps")
# Linux gives a process 65,530 mappings of memory, and XLA's CPU programs, which JAX keeps, take several each. Where
# they run out, whatever compiles next crashes the process: two workers had passed 38,000 halfway through the tests.
MOST_MAPPINGS = 20_000


def pytest_collection_modifyitems(items):
    """Tests marked `gpu` are skipped where there is none, whatever was asked for."""
    import jax

    if jax.default_backend() != "gpu":
        skip = pytest.mark.skip(reason="needs an NVIDIA GPU, and jax sees none: run `make test-gpu` where there is one")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


def pytest_runtest_teardown():
    """Programs of earlier tests are given up before there are too many of them."""
    import jax

    if MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()


@pytest.fixture
def heeds_control_c():
    """For what a test starts: a shell that runs the tests in the background has them, and it, ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A worker whose CUDA context broke ends, and another takes its place: every test after it would fail too."""
    report = yield
    said = str(call.excinfo.value) if call.excinfo else ""
    if hasattr(item.config, "workerinput") and "CUDA_ERROR_" in said and "OUT_OF_MEMORY" not in said:
        print(f"{item.nodeid} broke its CUDA context: {said}", file=sys.__stderr__, flush=True)
        os._exit(1)
    return report
