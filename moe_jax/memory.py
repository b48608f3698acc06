"""Whether something fits in a device's memory, asked before it is put there."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable

import jax

GIB = 2**30


def require(leaves: Iterable[jax.ShapeDtypeStruct], *, what: str, remedy: str) -> None:
    """Refuses arrays that do not fit on their devices; those without a sharding go to the default device.

    Raises:
      ValueError: with the arithmetic and the remedy.
    """
    needed_bytes, device = 0, jax.devices()[0]
    for leaf in leaves:
        shape = leaf.shape
        if leaf.sharding is not None:
            shape = leaf.sharding.shard_shape(shape)
            device = min(leaf.sharding.addressable_devices, key=lambda each: each.id)
        needed_bytes += math.prod(shape) * leaf.dtype.itemsize
    free_bytes = free_on(device)
    if needed_bytes > free_bytes:
        raise ValueError(
            f"{what} takes {needed_bytes / GIB:.2f} GiB on each device, and {device.device_kind} has "
            f"{free_bytes / GIB:.2f} GiB free: {remedy}"
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
