"""Parameters: random until a checkpoint fills them, with the names of their dimensions for sharding.

Dimension names are those of `sharding.axes`. Matrices keep the checkpoints' `[out, in]` orientation.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

INITIAL_SCALE = 0.02


def normal(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], dtype: jnp.dtype, scale: float = INITIAL_SCALE
) -> nnx.Param:
    """A parameter drawn from a normal distribution of standard deviation `scale`."""
    values = jax.random.normal(rngs.params(), shape, jnp.float32) * scale
    return nnx.Param(values.astype(dtype), dimensions=axes)


def ones(shape: tuple[int, ...], axes: tuple[str | None, ...], dtype: jnp.dtype) -> nnx.Param:
    return nnx.Param(jnp.ones(shape, dtype), dimensions=axes)


def zeros(shape: tuple[int, ...], axes: tuple[str | None, ...], dtype: jnp.dtype) -> nnx.Param:
    return nnx.Param(jnp.zeros(shape, dtype), dimensions=axes)
