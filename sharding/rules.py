"""Strategies as tables: dimension of a parameter -> axes of the mesh that it is split over.

XLA's partitioner does the rest: these two keep activations replicated and let it put in the collectives.
"""

from __future__ import annotations

import math

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sharding.axes import DIMENSIONS

STRATEGIES: dict[str, dict[str, tuple[str, ...]]] = {
    # Intra-expert: every device holds a slice of every expert and of every head.
    "tp": {
        "expert_mlp": ("ep", "tp"),
        "mlp": ("ep", "tp"),
        "q_heads": ("ep", "tp"),
        "kv_heads": ("ep", "tp"),
    },
    # Inter-expert over ep, each expert split over tp.
    "eptp": {
        "experts": ("ep",),
        "expert_mlp": ("tp",),
        "mlp": ("tp",),
        "q_heads": ("tp",),
        "kv_heads": ("tp",),
    },
}


def placement(
    dimensions: tuple[str | None, ...], shape: tuple[int, ...], *, mesh: Mesh, strategy: str, name: str
) -> NamedSharding:
    """Where a parameter of these dimensions goes.

    Raises:
      ValueError: unknown strategy or dimension, or a dimension that does not divide (with what to try).
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"expected strategy to be one of {', '.join(STRATEGIES)}, got {strategy!r}")
    table = STRATEGIES[strategy]
    spec: list[tuple[str, ...] | None] = []
    for dimension, size in zip(dimensions, shape, strict=True):
        if dimension is not None and dimension not in DIMENSIONS:
            raise ValueError(f"{name}: unknown dimension {dimension!r}, expected one of {', '.join(DIMENSIONS)}")
        axes = table.get(dimension, ()) if dimension is not None else ()
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if size % parts:
            raise ValueError(
                f"{name}: {dimension} has {size} entries, which {parts} devices ({' x '.join(axes)}) do not divide; "
                f"choose mesh sizes whose product divides {size}, or another strategy"
            )
        spec.append(axes or None)
    return NamedSharding(mesh, PartitionSpec(*spec))
