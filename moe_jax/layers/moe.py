"""The Mixture-of-Experts layer: a router, experts, and optionally an expert that every token visits."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.layers import parameter
from moe_jax.layers.linear import linear
from moe_jax.layers.mlp import MLP
from moe_jax.layers.norm import RMSNorm
from pallas_kernels import Activation, Routing, RoutingRule, experts, route

DROPPED = -1


class SharedExpert(nnx.Module):
    """An MLP for every token, weighted by a sigmoid gate of its own (Qwen2-MoE)."""

    def __init__(self, width: int, hidden_width: int, *, activation: Activation, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.mlp = MLP(width, hidden_width, activation=activation, dtype=dtype, rngs=rngs)
        self.gate_1D = parameter.normal(rngs, (1, width), (None, "embed"), dtype)

    def __call__(self, x_BTD: jax.Array, *, residual_BTD: jax.Array | None = None) -> jax.Array:
        gate_BT1 = jax.nn.sigmoid(linear(x_BTD, self.gate_1D[...]).astype(jnp.float32))
        y_BTD = (gate_BT1 * self.mlp(x_BTD)).astype(x_BTD.dtype)
        return y_BTD if residual_BTD is None else residual_BTD + y_BTD


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
        # Set where the model lies over several devices: a `sharding.Exchange`, by which tokens reach their experts.
        self.exchange: Any = None
        # Set by `rebalanced`: where each expert's weights are, as `sharding.placement.Tables`.
        self.tables: Any = None

    def __call__(
        self,
        x_BTD: jax.Array,
        *,
        norm: RMSNorm | None = None,
        residual_BTD: jax.Array | None = None,
        implementation: str | None = None,
    ) -> tuple[jax.Array, Routing]:
        """`residual + layer(norm(x))`, and its routing.

        `implementation` is that of `route` and `experts`, None for the fastest.
        """
        B, T, D = x_BTD.shape
        if norm is not None and T > 1:  # only in a decode step is the norm part of the router's launch
            x_BTD, norm = norm(x_BTD), None
        x_TD = x_BTD.reshape(B * T, D)
        routing = self._routed(x_TD, norm, implementation, is_decode=T == 1)
        if routing.normed_TD is not None:
            x_TD = routing.normed_TD
        if self.capacity is not None:
            routing = dropped_over_capacity(routing, batch=B, capacity=self.capacity)
        if self.shared is not None:
            residual_BTD = self.shared(x_TD.reshape(B, T, D), residual_BTD=residual_BTD)
        residual_TD = None if residual_BTD is None else residual_BTD.reshape(B * T, D)
        if self.exchange is not None:
            return self._exchanged(x_TD, routing, residual_TD, shape=x_BTD.shape)
        y_TD = experts(
            x_TD,
            routing,
            self.up_EGFD[...],
            self.down_EDF[...],
            activation=self.activation,
            residual_TD=residual_TD,
            implementation=implementation,
        )
        # What the router prepared for the experts is of no use outside.
        return y_TD.reshape(B, T, D), dataclasses.replace(routing, plan=None, places=None, normed_TD=None)

    def _routed(self, x_TD, norm: RMSNorm | None, implementation: str | None, *, is_decode: bool) -> Routing:
        named: dict[str, Any] = dict(rule=self.rule, implementation=implementation)
        arrays: dict[str, Any] = dict(gate_ED=self.gate_ED[...])
        if self.gate_bias_E is not None:
            arrays["gate_bias_E"] = self.gate_bias_E[...]
        if norm is not None:
            arrays["norm_weight_D"] = norm.weight_D[...]
            named["norm_epsilon"] = norm.epsilon
        if self.exchange is None:
            return route(x_TD, **arrays, **named)

        def routed(x_TD, arrays):
            # What the router prepares is for all experts; a device has some of them.
            return dataclasses.replace(route(x_TD, **arrays, **named), plan=None, places=None)

        return self.exchange.tokenwise(routed, x_TD, arrays, is_decode=is_decode)

    def _exchanged(self, x_TD, routing: Routing, residual_TD, *, shape) -> tuple[jax.Array, Routing]:
        """The experts over several devices, by the exchange; choices that it dropped show expert -1."""

        def on_one_device(x_TD, experts_TA, weights_TA, up_EGFD, down_EDF):
            routing = Routing(weights_TA, experts_TA, jnp.zeros((len(x_TD), len(up_EGFD)), jnp.float32))
            return experts(x_TD, routing, up_EGFD, down_EDF, activation=self.activation)

        parameters = (self.up_EGFD, self.down_EDF)
        y_TD, is_kept_TA = self.exchange.experts(
            on_one_device,
            x_TD,
            routing.experts_TA,
            routing.weights_TA,
            *(each[...] for each in parameters),
            dimensions=[each.get_metadata()["dimensions"] for each in parameters],
            is_decode=shape[1] == 1,
            tables=None if self.tables is None else self.tables.get_value(),
        )
        y_TD = y_TD if residual_TD is None else residual_TD + y_TD
        return y_TD.reshape(shape), dataclasses.replace(_keeping(routing, is_kept_TA), normed_TD=None)


def dropped_over_capacity(routing: Routing, *, batch: int, capacity: int) -> Routing:
    """Sends the choices that come after an expert's first `capacity` of a sequence to expert -1 with weight 0."""
    num_experts = routing.logits_TE.shape[1]
    experts_BX = routing.experts_TA.reshape(batch, -1)
    chosen_BXE = jax.nn.one_hot(experts_BX, num_experts, dtype=jnp.int32)
    rank_BX = jnp.take_along_axis(jnp.cumsum(chosen_BXE, axis=1), experts_BX[..., None], axis=2)[..., 0]
    is_kept_TA = (rank_BX <= capacity).reshape(routing.experts_TA.shape)
    return _keeping(routing, is_kept_TA)


def _keeping(routing: Routing, is_kept_TA: jax.Array) -> Routing:
    return dataclasses.replace(
        routing,
        weights_TA=jnp.where(is_kept_TA, routing.weights_TA, 0.0),
        experts_TA=jnp.where(is_kept_TA, routing.experts_TA, DROPPED),
        # What the router prepared for the experts still has the dropped ones: they prepare it anew.
        plan=None,
        places=None,
    )
