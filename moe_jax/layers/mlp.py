"""The feed-forward network of a dense layer, or of an expert that every token visits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.layers import parameter
from moe_jax.layers.linear import activated, projected
from moe_jax.layers.norm import RMSNorm
from pallas_kernels import Activation


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

    def __call__(
        self, x_BTD: jax.Array, *, norm: RMSNorm | None = None, residual_BTD: jax.Array | None = None
    ) -> jax.Array:
        """`residual + mlp(norm(x))`, in two launches where few rows have kernels."""
        hidden_BTF = activated(x_BTD, self.up_GFD[...], self.activation, norm=norm)
        return projected(hidden_BTF, (self.down_DF[...],), residual_BTO=residual_BTD)[0]
