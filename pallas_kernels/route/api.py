"""Routing: which experts a token goes to, and with what weight."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch


@dataclasses.dataclass(frozen=True)
class RoutingRule:
    """How router logits become expert ids and weights. Static: part of the compiled program.

    score:
      `softmax`       probabilities over all experts, then the `top_k` largest (Switch, Mixtral, OLMoE, Qwen-MoE, DeepSeek-V2)
      `topk_softmax`  the `top_k` largest logits, then a softmax over those alone (gpt-oss)
      `sigmoid`       independent probabilities (DeepSeek-V3)
    renormalize: divide the chosen weights by their sum (plus `epsilon`).
    scale: multiplies the weights last (DeepSeek's `routed_scaling_factor`).
    num_groups, top_groups: experts are split into `num_groups` equal groups, and only experts of the best `top_groups` groups
      can be chosen; a group's score is its largest score (`max`, DeepSeek-V2) or the sum of its two largest (`top2_sum`, V3).
    dtype: scores are rounded to this type before the choice (Switch's `router_dtype`); float32 unless a checkpoint asks.
    """

    top_k: int
    score: Literal["softmax", "topk_softmax", "sigmoid"] = "softmax"
    renormalize: bool = False
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2_sum"] = "top2_sum"
    epsilon: float = 0.0
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


NUM_SIGNALS = 512


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodePlan:
    """A routing as the decode kernels read it: dense over a token tile of 8, 16, 32 or 64 tokens.

    combine_ET: float32; the weight of each expert for each token, 0 where it was not chosen and past the last token.
    active_E: int32; the experts that some token chose, ascending, in the first `num_active[0]` places. Past those: `E`.
    num_active: int32, one element.
    signals: `NUM_SIGNALS` int32 zeros, by which the blocks of the experts' launch wait for each other. They are here because
      zeros of their own would cost that launch another one; None where nobody made them on the way.
    """

    combine_ET: Float[Array, "E T"]
    active_E: Int[Array, "E"]
    num_active: Int[Array, "1"]
    signals: Int[Array, "X"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Places:
    """Where each choice stands among the choices of its block of 64 tokens, which is what sorting by expert needs.

    ranks_TA: int32; how many earlier tokens of the same block chose the same expert.
    counts_BE: int32; how many tokens of each block chose each expert.
    """

    ranks_TA: Int[Array, "T A"]
    counts_BE: Int[Array, "B E"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """Where tokens go. `experts_TA[t]` are in order of falling score, lowest id first among equals.

    `logits_TE` are the router's float32 logits, for losses and inspection. `plan` comes with few tokens and `places` with
    many, from implementations that write them along the way; the expert kernels make their own where they are missing.
    `normed_TD` are the rows that the router saw, for the experts to see as well; None where `route` normalised nothing.
    """

    weights_TA: Float[Array, "T A"]
    experts_TA: Int[Array, "T A"]
    logits_TE: Float[Array, "T E"]
    plan: DecodePlan | None = None
    places: Places | None = None
    normed_TD: Float[Array, "T D"] | None = None


def route(
    x_TD: Float[Array, "T D"],
    gate_ED: Float[Array, "E D"],
    *,
    rule: RoutingRule,
    gate_bias_E: Float[Array, "E"] | None = None,
    selection_bias_E: Float[Array, "E"] | None = None,
    norm_weight_D: Float[Array, "D"] | None = None,
    norm_epsilon: float = 1e-6,
    implementation: str | None = None,
) -> Routing:
    """Routes every token to `rule.top_k` experts; logits, scores and weights are float32.

    `gate_bias_E` is added to the logits. `selection_bias_E` is added to the scores for the choice only: the weights come from
    the scores without it (DeepSeek-V3's `e_score_correction_bias`).

    norm_weight_D: RMSNorm in front, `x / sqrt(mean(x**2) + norm_epsilon) * weight` in float32, rounded once to `x_TD`'s dtype.
      The experts want the same rows: `routing = route(x_TD, ..., norm_weight_D=weight_D)`, then
      `experts(routing.normed_TD, routing, ..., residual_TD=x_TD)`.

    Raises:
      ValueError: shapes disagree, or the rule does not fit the number of experts.
    """
    _check(x_TD, gate_ED, rule, gate_bias_E, selection_bias_E, norm_weight_D)
    arguments = dict(
        rule=rule,
        gate_bias_E=gate_bias_E,
        selection_bias_E=selection_bias_E,
        norm_weight_D=norm_weight_D,
        norm_epsilon=norm_epsilon,
    )
    chosen = dispatch.choose("route", _implementations(), x_TD, gate_ED, implementation=implementation, **arguments)
    return chosen.run(x_TD, gate_ED, **arguments)


def explain(x_TD, gate_ED, **arguments: Any) -> list[tuple[str, str | None]]:
    """Each implementation with None (it can run this call) or the reason why it cannot, fastest first."""
    return dispatch.explain(_implementations(), x_TD, gate_ED, **arguments)


def _implementations() -> tuple[dispatch.Implementation, ...]:
    from pallas_kernels.route import decode_sm90, prefill_sm90, reference

    return (decode_sm90.IMPLEMENTATION, prefill_sm90.IMPLEMENTATION, reference.IMPLEMENTATION)


def _check(x_TD, gate_ED, rule: RoutingRule, gate_bias_E, selection_bias_E, norm_weight_D) -> None:
    if x_TD.ndim != 2 or gate_ED.ndim != 2 or x_TD.shape[1] != gate_ED.shape[1]:
        raise ValueError(f"route: expected x_TD [T, D] and gate_ED [E, D], got {x_TD.shape} and {gate_ED.shape}")
    num_experts, width = gate_ED.shape
    expected = {
        "gate_bias_E": (gate_bias_E, num_experts),
        "selection_bias_E": (selection_bias_E, num_experts),
        "norm_weight_D": (norm_weight_D, width),
    }
    for name, (vector, length) in expected.items():
        if vector is not None and vector.shape != (length,):
            raise ValueError(f"route: expected {name} of shape ({length},), got {vector.shape}")
    if num_experts % rule.num_groups:
        raise ValueError(f"route: {num_experts} experts do not split into {rule.num_groups} equal groups")
    selectable = num_experts // rule.num_groups * rule.top_groups
    if not 1 <= rule.top_k <= selectable:
        raise ValueError(f"route: expected top_k between 1 and the {selectable} selectable experts, got {rule.top_k}")
