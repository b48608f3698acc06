"""The Mixture-of-Experts layer: a router, experts, and optionally an expert that every token visits."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.layers import parameter
from moe_jax.layers.linear import linear
from moe_jax.layers.mlp import MLP
from pallas_kernels import Activation, Routing, RoutingRule, experts, route

DROPPED = -1


class SharedExpert(nnx.Module):
    """An MLP for every token, weighted by a sigmoid gate of its own (Qwen2-MoE)."""

    def __init__(self, width: int, hidden_width: int, *, activation: Activation, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.mlp = MLP(width, hidden_width, activation=activation, dtype=dtype, rngs=rngs)
        self.gate_1D = parameter.normal(rngs, (1, width), (None, "embed"), dtype)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        gate_BT1 = jax.nn.sigmoid(linear(x_BTD, self.gate_1D[...]).astype(jnp.float32))
        return (gate_BT1 * self.mlp(x_BTD)).astype(x_BTD.dtype)


class MoE(nnx.Module):
    """Routes tokens and runs their experts.

    With `capacity`, an expert takes at most that many tokens of one sequence, first come first served; a token over the
    capacity gets nothing from it (arXiv:2101.03961, as Hugging Face counts: per sequence). Its routing shows expert -1.
    """

    def __init__(
        self,
        width: int,
        hidden_width: int,
        num_experts: int,
        *,
        rule: RoutingRule,
        activation: Activation,
        is_gated: bool = True,
        has_gate_bias: bool = False,
        capacity: int | None = None,
        shared: SharedExpert | None = None,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.rule, self.activation, self.capacity = rule, activation, capacity
        E, G, F, D = num_experts, 2 if is_gated else 1, hidden_width, width
        self.gate_ED = parameter.normal(rngs, (E, D), (None, "embed"), dtype)
        self.gate_bias_E = parameter.zeros((E,), (None,), dtype) if has_gate_bias else None
        self.up_EGFD = parameter.normal(rngs, (E, G, F, D), ("experts", None, "expert_mlp", "embed"), dtype)
        self.down_EDF = parameter.normal(rngs, (E, D, F), ("experts", "embed", "expert_mlp"), dtype)
        self.shared = shared

    def __call__(self, x_BTD: jax.Array, *, implementation: str | None = None) -> tuple[jax.Array, Routing]:
        """The layer's output and routing; `implementation` is that of `route` and of `experts`, None for the fastest."""
        B, T, D = x_BTD.shape
        x_TD = x_BTD.reshape(B * T, D)
        bias_E = None if self.gate_bias_E is None else self.gate_bias_E[...]
        routing = route(x_TD, self.gate_ED[...], rule=self.rule, gate_bias_E=bias_E, implementation=implementation)
        if self.capacity is not None:
            routing = dropped_over_capacity(routing, batch=B, capacity=self.capacity)
        weights = (self.up_EGFD[...], self.down_EDF[...])
        y_TD = experts(x_TD, routing, *weights, activation=self.activation, implementation=implementation)
        y_BTD = y_TD.reshape(B, T, D)
        if self.shared is not None:
            y_BTD = y_BTD + self.shared(x_BTD)
        # What the router prepared for the kernels is of no use outside.
        return y_BTD, dataclasses.replace(routing, plan=None, places=None)


def dropped_over_capacity(routing: Routing, *, batch: int, capacity: int) -> Routing:
    """Sends the choices that come after an expert's first `capacity` of a sequence to expert -1 with weight 0."""
    num_experts = routing.logits_TE.shape[1]
    experts_BX = routing.experts_TA.reshape(batch, -1)
    chosen_BXE = jax.nn.one_hot(experts_BX, num_experts, dtype=jnp.int32)
    rank_BX = jnp.take_along_axis(jnp.cumsum(chosen_BXE, axis=1), experts_BX[..., None], axis=2)[..., 0]
    is_kept_TA = (rank_BX <= capacity).reshape(routing.experts_TA.shape)
    return dataclasses.replace(
        routing,
        weights_TA=jnp.where(is_kept_TA, routing.weights_TA, 0.0),
        experts_TA=jnp.where(is_kept_TA, routing.experts_TA, DROPPED),
        # What the router prepared for the kernels still has the dropped ones: they prepare it anew.
        plan=None,
        places=None,
    )
