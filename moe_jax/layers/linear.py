"""Matrix products with the checkpoints' `[out, in]` matrices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def linear(x_XI: jax.Array, weight_OI: jax.Array, bias_O: jax.Array | None = None) -> jax.Array:
    """`x @ weight.T + bias` over the last dimension of x, accumulated in float32, in x's dtype.

    float32 operands are multiplied in full float32, on GPUs too (they would take TF32 otherwise).
    """
    return _accumulated(x_XI, weight_OI, bias_O).astype(x_XI.dtype)


def logits(x_XD: jax.Array, weight_VD: jax.Array) -> jax.Array:
    """`x @ weight.T` left in float32: vocabulary logits are not rounded to the model's dtype."""
    return _accumulated(x_XD, weight_VD, None)


def _accumulated(x_XI, weight_OI, bias_O):
    y_XO = lax.dot_general(
        x_XI,
        weight_OI,
        (((x_XI.ndim - 1,), (1,)), ((), ())),
        precision=lax.Precision.HIGHEST if x_XI.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    return y_XO if bias_O is None else y_XO + bias_O.astype(jnp.float32)
