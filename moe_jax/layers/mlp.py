"""The feed-forward network of a dense layer, or of an expert that every token visits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.layers import parameter
from moe_jax.layers.linear import linear
from pallas_kernels import Activation, activate


class MLP(nnx.Module):
    """`down @ (act(gate @ x) * (up @ x))`, or `down @ act(up @ x)` without a gate. G is 2 or 1, as in `experts`."""

    def __init__(
        self,
        width: int,
        hidden_width: int,
        *,
        activation: Activation,
        is_gated: bool = True,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.activation = activation
        gates = 2 if is_gated else 1
        self.up_GFD = parameter.normal(rngs, (gates, hidden_width, width), (None, "mlp", "embed"), dtype)
        self.down_DF = parameter.normal(rngs, (width, hidden_width), ("embed", "mlp"), dtype)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        G, F, D = self.up_GFD.shape
        up_BTGF = linear(x_BTD, self.up_GFD[...].reshape(G * F, D)).reshape(*x_BTD.shape[:-1], G, F)
        hidden_BTF = activate(up_BTGF.astype(jnp.float32), self.activation, axis=x_BTD.ndim - 1)
        return linear(hidden_BTF.astype(x_BTD.dtype), self.down_DF[...])
