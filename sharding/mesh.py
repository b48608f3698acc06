"""Meshes of data-parallel, expert-parallel and tensor-parallel axes."""

from __future__ import annotations

import jax
from jax.sharding import AxisType, Mesh

from sharding.axes import MESH_AXES


def make_mesh(sizes: str | dict[str, int]) -> Mesh:
    """A mesh with the axes dp, ep and tp, from sizes like "ep=4,tp=2"; axes not named have size 1.

    Raises:
      ValueError: an unknown axis, a size that is no positive number, more devices than there are, or, over several
        processes, fewer than all.
    """
    if isinstance(sizes, str):
        sizes = _parsed(sizes)
    unknown = sorted(set(sizes) - set(MESH_AXES))
    if unknown:
        raise ValueError(f"mesh: expected axes among {', '.join(MESH_AXES)}, got {', '.join(unknown)}")
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    if min(shape) < 1:
        raise ValueError(f"mesh: expected every axis to have at least 1 device, got {sizes}")
    needed = shape[0] * shape[1] * shape[2]
    if needed > jax.device_count():
        raise ValueError(
            f"mesh: expected at most {jax.device_count()} devices, got {sizes}, which needs {needed}; "
            "JAX_NUM_CPU_DEVICES makes more of them on a CPU"
        )
    if jax.process_count() > 1 and needed != jax.device_count():
        raise ValueError(
            f"mesh: expected all {jax.device_count()} devices of the {jax.process_count()} processes, got {sizes}, which "
            f"needs {needed}; choose sizes whose product is {jax.device_count()}"
        )
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=jax.devices()[:needed])


def _parsed(text: str) -> dict[str, int]:
    sizes = {}
    for part in text.split(","):
        axis, separator, size = part.strip().partition("=")
        if not separator or not size.isdecimal():
            raise ValueError(f'mesh: expected sizes like "ep=4,tp=2", got {text!r}')
        sizes[axis] = int(size)
    return sizes
