"""How long a function keeps the GPU busy, kernel by kernel, and records of it as JSON lines."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import datetime
import fcntl
import json
import pathlib
import re
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

RESULTS = pathlib.Path("docs/benchmarks")
L2_BYTES = 60 << 20  # the largest of these GPUs'


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What a GPU can do at best in a second: bytes that it reads, and bfloat16 operations."""

    read_bytes_per_s: float
    bf16_flops_per_s: float

    def __str__(self) -> str:
        return f"{self.read_bytes_per_s / 1e12:.3g} TB/s and {self.bf16_flops_per_s / 1e12:.0f} TFLOP/s"


# H200: measured, the sum of 4 GB and a product of 8192-cubed random matrices. H100: assumed, the same share of the data
# sheet's 3.35 TB/s, and the same matrix units.
CEILINGS = {"H200": Ceilings(4.6e12, 808e12), "H100": Ceilings(3.2e12, 808e12)}


def ceilings(device_kind: str | None = None) -> Ceilings:
    """Those of a GPU by its name, or of the one at hand; of an H200 where they are not known."""
    model = _model_of(device_kind or jax.devices()[0].device_kind)
    return CEILINGS["H200" if model is None else model]


def results_path(name: str) -> pathlib.Path:
    """Where measurements of the device at hand go: on an H200, docs/benchmarks/h200/<name>."""
    kind = jax.devices()[0].device_kind
    return RESULTS / re.sub(r"[^a-z0-9]+", "_", (_model_of(kind) or kind).lower()) / name


def _model_of(device_kind: str) -> str | None:
    return next((model for model in CEILINGS if model in device_kind), None)


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Median device time of one call, in microseconds. `kernels` are its launches in order, with the median of each.

    The time is the sum over kernels: gaps between launches (about a microsecond each in a CUDA graph) are not in it.
    """

    time_us: float
    kernels: tuple[tuple[str, float], ...]


def measure(function: Callable[..., Any], inputs: Sequence[tuple[Any, ...]], *, repeats: int = 5) -> Measurement:
    """Device time of `function(*inputs[i])` by CUPTI, over `repeats` rounds through all of `inputs`.

    Pass enough different inputs that together they exceed the L2 cache (`rotations` says how many): otherwise weights
    are read from there. All must have the same shapes. Never zeros: they take less power, and clocks rise.

    Raises:
      RuntimeError: no GPU, or another profiler holds CUPTI, so that no launch was seen.
    """
    compiled = function if isinstance(function, jax.stages.Wrapped | jax.stages.Compiled) else jax.jit(function)
    for arguments in inputs:
        jax.block_until_ready(compiled(*arguments))
    # jax.experimental.mosaic.gpu.profiler.measure repeats one and the same input; these are the calls it makes.
    from jax._src.lib import mosaic_gpu

    cupti = mosaic_gpu._mosaic_gpu_ext
    with gpu_to_oneself():
        cupti._cupti_init()
        try:
            for _ in range(repeats):
                for arguments in inputs:
                    result = compiled(*arguments)
            jax.block_until_ready(result)
        finally:
            launches = cupti._cupti_get_timings(True)
    return _summarise(launches, calls=repeats * len(inputs))


def _summarise(launches: list[tuple[str, float]], *, calls: int) -> Measurement:
    """From (kernel name, milliseconds) of all calls together."""
    if not launches or len(launches) % calls:
        raise RuntimeError(
            f"expected a multiple of {calls} kernel launches, one set for each call; CUPTI saw {len(launches)}"
        )
    per_call = len(launches) // calls
    times_us = 1e3 * np.array([milliseconds for _, milliseconds in launches]).reshape(calls, per_call)
    names = [name for name, _ in launches[:per_call]]
    medians_us = [statistics.median(column) for column in times_us.T.tolist()]
    return Measurement(statistics.median(times_us.sum(axis=1).tolist()), tuple(zip(names, medians_us, strict=True)))


_is_alone: contextvars.ContextVar[bool] = contextvars.ContextVar("is_alone", default=False)


@contextlib.contextmanager
def gpu_to_oneself() -> Iterator[None]:
    """Waits until no other process of this machine is inside: several compile at once, and one at a time measures.

    `measure` does this by itself; around several measurements it keeps others out between them.
    """
    if _is_alone.get():
        yield
        return
    with open(pathlib.Path(tempfile.gettempdir()) / "moe-jax-gpu.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        token = _is_alone.set(True)
        try:
            yield
        finally:
            _is_alone.reset(token)


def rotations(size_bytes: int) -> int:
    """How many inputs of which each reads `size_bytes` exceed the L2 cache twice over."""
    return -(-2 * L2_BYTES // size_bytes)


def context() -> dict[str, str]:
    """Device, versions and time of a measurement, to go into each of its records."""
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def append_record(path: pathlib.Path, record: dict[str, Any]) -> None:
    """Adds one JSON line to `path`, with `context()`; dataclasses among the values are written as objects."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record | context(), default=dataclasses.asdict) + "\n")


def records_of_here(path: pathlib.Path) -> list[dict[str, Any]]:
    """The records of `path` that were measured on this device with this version of JAX."""
    here = context()
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [record for record in records if all(record[key] == here[key] for key in ("device", "jax"))]
