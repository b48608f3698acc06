"""Whether something fits in a device's memory, asked before it is put there."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable

import jax
import numpy as np

GIB = 2**30


def require(leaves: Iterable[jax.ShapeDtypeStruct], *, what: str, remedy: str) -> None:
    """Refuses arrays that do not fit on their devices; those without a sharding go to the default device.

    Raises:
      ValueError: with the arithmetic and the remedy.
    """
    values: dict[np.dtype, int] = {}
    device = jax.local_devices()[0]
    for leaf in leaves:
        shape = leaf.shape
        if leaf.sharding is not None:
            shape = leaf.sharding.shard_shape(shape)
            device = min(leaf.sharding.addressable_devices, key=lambda each: each.id)
        dtype = np.dtype(leaf.dtype)
        values[dtype] = values.get(dtype, 0) + math.prod(shape)
    needed_bytes = sum(count * dtype.itemsize for dtype, count in values.items())
    free_bytes = free_on(device)
    if needed_bytes > free_bytes:
        terms = " + ".join(f"{count:,} x {dtype.itemsize} bytes" for dtype, count in values.items())
        raise ValueError(
            f"{what} takes {needed_bytes / GIB:.2f} GiB on each device ({terms}), and {device.device_kind} has "
            f"{free_bytes / GIB:.2f} GiB free{_of_limit(device)}: {remedy}"
        )


def _of_limit(device: jax.Device) -> str:
    """Where JAX holds itself to a part of a GPU's memory: what that part is, and how to raise it."""
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return ""
    return (
        f" of {stats['bytes_limit'] / GIB:.2f} GiB that JAX may use, {stats['bytes_in_use'] / GIB:.2f} being in use "
        "(by default three quarters of a GPU; XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 gives it more)"
    )


def free_on(device: jax.Device) -> int:
    """Bytes that a device can still hold; of a CPU, the host's memory."""
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") + _reclaimable_bytes()


def _reclaimable_bytes() -> int:
    """File cache that Linux gives up on demand."""
    try:
        with open("/proc/meminfo") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        return int(fields["Cached"].split()[0]) * 1024
    except (OSError, KeyError):
        return 0
