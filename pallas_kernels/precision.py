"""How exactly matrix products of a type are computed."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax


def full(dtype: jnp.dtype) -> lax.Precision | None:
    """What makes a product exact to its type: a GPU would round float32 operands to TF32, with 10 bits."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None
