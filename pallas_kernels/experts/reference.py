"""The definition of the expert layer, in plain JAX: one expert after another over all tokens. Runs on every device."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import precision
from pallas_kernels.dispatch import Implementation
from pallas_kernels.route.api import Routing

CLAMP = 7.0
SIGMOID_SLOPE = 1.702

_ELEMENTWISE = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


def activate(up_GX: jax.Array, activation: str, *, axis: int) -> jax.Array:
    """Applies the activation to projections whose dimension `axis` is [gate, linear] (gated) or [up] (not gated)."""
    parts = [jnp.squeeze(part, axis) for part in jnp.split(up_GX, up_GX.shape[axis], axis)]
    if activation == "swiglu_clamped":
        gate, linear = jnp.minimum(parts[0], CLAMP), jnp.clip(parts[1], -CLAMP, CLAMP)
        return gate * jax.nn.sigmoid(SIGMOID_SLOPE * gate) * (linear + 1)
    hidden = _ELEMENTWISE[activation](parts[0])
    return hidden * parts[1] if len(parts) == 2 else hidden


def adding_residual(experts: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`experts` with the residual behind, for implementations that do not add it themselves."""

    @functools.wraps(experts)
    def compute_and_add(x_TD, routing, up_EGFD, down_EDF, *, residual_TD=None, **arguments) -> jax.Array:
        y_TD = experts(x_TD, routing, up_EGFD, down_EDF, **arguments)
        return y_TD if residual_TD is None else residual_TD + y_TD

    return compute_and_add


@adding_residual
def experts(
    x_TD, routing: Routing, up_EGFD, down_EDF, *, activation, up_bias_EGF=None, down_bias_ED=None, first_expert=0
):
    num_experts, gates, width, model_width = up_EGFD.shape
    weights_ET = combine_weights(routing, num_experts, first_expert)
    zeros = jnp.zeros((num_experts,), jnp.float32)
    up_bias_EGF = zeros[:, None, None] if up_bias_EGF is None else up_bias_EGF
    down_bias_ED = zeros[:, None] if down_bias_ED is None else down_bias_ED

    product = functools.partial(jnp.einsum, precision=precision.full(x_TD.dtype), preferred_element_type=jnp.float32)

    def add_expert(y_TD, expert):
        up_GFD, down_DF, up_bias_GF, down_bias_D, weights_T = expert
        up_TGF = product("TD,GFD->TGF", x_TD, up_GFD) + up_bias_GF
        hidden_TF = activate(up_TGF, activation, axis=1).astype(x_TD.dtype)
        out_TD = product("TF,DF->TD", hidden_TF, down_DF) + down_bias_D
        return y_TD + weights_T[:, None] * out_TD, None

    y_TD = jnp.zeros((x_TD.shape[0], model_width), jnp.float32)
    y_TD, _ = lax.scan(add_expert, y_TD, (up_EGFD, down_EDF, up_bias_EGF, down_bias_ED, weights_ET))
    return y_TD.astype(x_TD.dtype)


def combine_weights(routing: Routing, num_experts: int, first_expert: int) -> jax.Array:
    """`[E, T]` float32: the weight of expert `first_expert + e` for token `t`, zero where it was not chosen."""
    is_chosen_TAE = jax.nn.one_hot(routing.experts_TA - first_expert, num_experts, dtype=jnp.float32)
    return jnp.einsum("TAE,TA->ET", is_chosen_TAE, routing.weights_TA, precision=lax.Precision.HIGHEST)


IMPLEMENTATION = Implementation("reference", supports=lambda device, *args, **kwargs: None, run=experts)
