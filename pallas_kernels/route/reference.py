"""The definition of routing, in plain JAX. Runs on every device."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.dispatch import Implementation
from pallas_kernels.route.api import Routing, RoutingRule


def normalising(route: Callable[..., Routing]) -> Callable[..., Routing]:
    """`route` with the RMSNorm in front, for implementations that have none of their own."""

    @functools.wraps(route)
    def norm_and_route(x_TD, gate_ED, *, norm_weight_D=None, norm_epsilon: float = 1e-6, **arguments) -> Routing:
        if norm_weight_D is None:
            return route(x_TD, gate_ED, **arguments)
        normed_TD = rms_norm(x_TD, norm_weight_D, epsilon=norm_epsilon)
        return dataclasses.replace(route(normed_TD, gate_ED, **arguments), normed_TD=normed_TD)

    return norm_and_route


def rms_norm(x_TD, weight_D, *, epsilon: float) -> jax.Array:
    x32_TD = x_TD.astype(jnp.float32)
    inverse_T1 = lax.rsqrt(jnp.mean(x32_TD * x32_TD, axis=1, keepdims=True) + epsilon)
    return (x32_TD * inverse_T1 * weight_D.astype(jnp.float32)).astype(x_TD.dtype)


@normalising
def route(x_TD, gate_ED, *, rule: RoutingRule, gate_bias_E=None, selection_bias_E=None) -> Routing:
    logits_TE = router_logits(x_TD, gate_ED, gate_bias_E, dtype=rule.dtype)
    return choose_experts(logits_TE, rule=rule, selection_bias_E=selection_bias_E)


def router_logits(x_TD, gate_ED, gate_bias_E=None, *, dtype="float32") -> jax.Array:
    # HIGHEST: a GPU would round float32 operands to TF32, and close logits would route differently.
    logits_TE = lax.dot_general(
        x_TD.astype(dtype),
        gate_ED.astype(dtype),
        (((1,), (1,)), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    if gate_bias_E is not None:
        logits_TE = logits_TE + _rounded(gate_bias_E, dtype)
    return _rounded(logits_TE, dtype)


def choose_experts(logits_TE, *, rule: RoutingRule, selection_bias_E=None) -> Routing:
    scores_TE = _rounded(_scores(logits_TE, rule), rule.dtype)
    selection_TE = scores_TE if selection_bias_E is None else scores_TE + selection_bias_E.astype(jnp.float32)
    if rule.num_groups > 1:
        selection_TE = _only_best_groups(selection_TE, rule)
    _, experts_TA = lax.top_k(selection_TE, rule.top_k)
    weights_TA = jnp.take_along_axis(scores_TE, experts_TA, axis=1)
    if rule.score == "topk_softmax":
        weights_TA = jax.nn.softmax(weights_TA, axis=1)
    if rule.renormalize:
        weights_TA = weights_TA / (weights_TA.sum(axis=1, keepdims=True) + rule.epsilon)
    return Routing(weights_TA * rule.scale, experts_TA.astype(jnp.int32), logits_TE)


def _scores(logits_TE, rule: RoutingRule):
    if rule.score == "softmax":
        return jax.nn.softmax(logits_TE, axis=1)
    if rule.score == "sigmoid":
        return jax.nn.sigmoid(logits_TE)
    return logits_TE


def _only_best_groups(selection_TE, rule: RoutingRule):
    num_tokens, num_experts = selection_TE.shape
    grouped_TGX = selection_TE.reshape(num_tokens, rule.num_groups, num_experts // rule.num_groups)
    best = 1 if rule.group_score == "max" else 2
    group_scores_TG = lax.top_k(grouped_TGX, best)[0].sum(axis=2)
    _, kept_groups = lax.top_k(group_scores_TG, rule.top_groups)
    is_kept_TG = jax.nn.one_hot(kept_groups, rule.num_groups, dtype=jnp.bool_).any(axis=1)
    return jnp.where(is_kept_TG[:, :, None], grouped_TGX, -jnp.inf).reshape(num_tokens, num_experts)


def _rounded(values, dtype: str):
    return values.astype(dtype).astype(jnp.float32)


IMPLEMENTATION = Implementation("reference", supports=lambda device, *args, **kwargs: None, run=route)
