"""RMS normalisation (arXiv:1910.07467): no mean, no bias."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from moe_jax.layers import parameter


class RMSNorm(nnx.Module):
    """`x / rms(x) * weight` over the last dimension. Statistics are float32 whatever the model's dtype."""

    def __init__(self, width: int, *, epsilon: float, dtype: jnp.dtype, axis: str | None = "embed"):
        self.epsilon = epsilon
        self.weight_D = parameter.ones((width,), (axis,), dtype)

    def __call__(self, x_XD: jax.Array) -> jax.Array:
        x_f32 = x_XD.astype(jnp.float32)
        scale = lax.rsqrt(jnp.mean(x_f32 * x_f32, axis=-1, keepdims=True) + self.epsilon)
        return (x_f32 * scale * self.weight_D[...].astype(jnp.float32)).astype(x_XD.dtype)
