"""What `route` is tested, compiled and measured on: the routers of real checkpoints, and cases chosen to be awkward."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from pallas_kernels.route.api import RoutingRule


@dataclasses.dataclass(frozen=True)
class Router:
    """One checkpoint family's router: `E` experts seen from a width of `D`, and how it chooses among them."""

    num_experts: int
    model_width: int
    rule: RoutingRule
    has_gate_bias: bool = False
    has_selection_bias: bool = False
    has_norm: bool = False


_DEEPSEEK_V3 = RoutingRule(
    8, score="sigmoid", renormalize=True, scale=2.5, num_groups=8, top_groups=4, group_score="top2_sum", epsilon=1e-20
)
ROUTERS: dict[str, Router] = {
    "tinymistral": Router(6, 1024, RoutingRule(2, renormalize=True)),
    "olmoe": Router(64, 2048, RoutingRule(8)),
    "qwen1.5": Router(60, 2048, RoutingRule(4)),
    "qwen3-30b": Router(128, 2048, RoutingRule(8, renormalize=True)),
    "mixtral": Router(8, 4096, RoutingRule(2, renormalize=True)),
    "gpt-oss": Router(32, 2880, RoutingRule(4, score="topk_softmax"), has_gate_bias=True),
    "deepseek-v3": Router(256, 7168, _DEEPSEEK_V3, has_selection_bias=True),
    "switch-base-128": Router(128, 768, RoutingRule(1)),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """`tokens` through `router`. With `ties`, logits take so few values that most choices are between equals."""

    name: str
    tokens: int
    router: Router
    ties: bool = False
    dtype: str = "bfloat16"

    @property
    def key(self) -> str:
        """How tuned tables name its shape."""
        return f"E{self.router.num_experts} A{self.router.rule.top_k} D{self.router.model_width}"

    @property
    def read_bytes(self) -> int:
        """The gate and the tokens."""
        return 2 * self.router.model_width * (self.router.num_experts + self.tokens)


def _toy(num_experts: int, rule: RoutingRule, *, model_width: int = 128, **biases: bool) -> Router:
    return Router(num_experts, model_width, rule, **biases)


_GROUPED_MAX = RoutingRule(3, num_groups=4, top_groups=2, group_score="max", scale=16.0)
_BIASES = dict(has_gate_bias=True, has_selection_bias=True)
_GROUPED_SUM = dataclasses.replace(_DEEPSEEK_V3, top_k=4)
AWKWARD: tuple[Case, ...] = (
    Case("softmax_one_token", 1, _toy(8, RoutingRule(2))),
    Case("softmax_renormalized", 5, _toy(8, RoutingRule(2, renormalize=True))),
    Case("six_experts", 9, _toy(6, RoutingRule(2, renormalize=True))),
    Case("sixty_experts", 7, _toy(60, RoutingRule(4))),
    Case("topk_softmax_gate_bias", 8, _toy(32, RoutingRule(4, score="topk_softmax"), has_gate_bias=True)),
    Case("sigmoid_selection_bias", 6, _toy(16, RoutingRule(4, score="sigmoid"), has_selection_bias=True)),
    Case("groups_by_max", 5, _toy(16, _GROUPED_MAX)),
    Case("groups_by_top2_sum", 5, _toy(64, _GROUPED_SUM, has_selection_bias=True)),
    Case("top1", 11, _toy(16, RoutingRule(1))),
    Case("norm_in_front", 5, _toy(8, RoutingRule(2), has_norm=True)),
    Case("norm_and_all_biases", 9, _toy(64, _GROUPED_SUM, model_width=192, has_norm=True, **_BIASES)),
    Case("every_expert", 3, _toy(4, RoutingRule(4))),
    Case("many_experts", 3, _toy(384, RoutingRule(8, score="sigmoid", renormalize=True), has_selection_bias=True)),
    Case("ties", 16, _toy(16, RoutingRule(4)), ties=True),
    Case("ties_between_groups", 9, _toy(16, _GROUPED_MAX), ties=True),
    Case("width_of_sixteenths", 4, _toy(8, RoutingRule(2), model_width=80)),
    Case("a_page_of_tokens", 70, _toy(8, RoutingRule(2, renormalize=True))),
    Case("bfloat16_scores", 5, _toy(8, RoutingRule(1, dtype="bfloat16"))),
    Case("float32_activations", 5, _toy(8, RoutingRule(2)), dtype="float32"),
)
TOKENS = (1, 8, 32, 64, 512, 4096)
REAL: tuple[Case, ...] = tuple(
    Case(f"{name}-{tokens}", tokens, router) for name, router in ROUTERS.items() for tokens in TOKENS
)


def arguments(case: Case, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The case's positional and keyword arguments.

    `x_TD` and `gate_ED` hold small whole numbers, the gate scaled by a power of two: every order of summation gives the
    same logits, bit by bit, so that experts can be compared exactly.
    """
    router = case.router
    keys = jax.random.split(jax.random.key(seed), 6)
    largest = 1 if case.ties else 4
    x_TD = jax.random.randint(keys[0], (case.tokens, router.model_width), -2, 3)
    gate_ED = jax.random.randint(keys[1], (router.num_experts, router.model_width), -largest, largest + 1)
    # Logits of about unit size: a softmax that underflows, or a sigmoid that saturates, would tie what should not tie.
    scale = 2.0 ** -round(math.log2(largest * router.model_width**0.5))
    if case.ties:
        x_TD, scale = x_TD.at[:, 4:].set(0), 0.5
    named: dict[str, Any] = dict(rule=router.rule)
    if router.has_norm:
        # Rows whose root mean square is a power of two: rounding to bfloat16 hides the last bits of the inverse root.
        x_TD = 2 * jax.random.rademacher(keys[4], x_TD.shape)
        named["norm_weight_D"] = jax.random.randint(keys[5], (router.model_width,), 1, 4).astype(case.dtype)
    operands = (x_TD.astype(case.dtype), (gate_ED * scale).astype(case.dtype))
    if router.has_gate_bias:
        named["gate_bias_E"] = jax.random.randint(keys[2], (router.num_experts,), -8, 9) / 16
    if router.has_selection_bias:
        named["selection_bias_E"] = jax.random.normal(keys[3], (router.num_experts,)) / 8
    return operands, named
