"""What routing kernels write beside experts and weights, and what they refuse."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import aot, interpret
from pallas_kernels.dispatch import Device
from pallas_kernels.experts.plan import decode_plan
from pallas_kernels.route import RoutingRule, cases, decode_sm90, prefill_sm90, reference, route
from pallas_kernels.route.api import NUM_SIGNALS

H200 = Device("gpu", "NVIDIA H200", 132)
CASES = {case.name: case for case in cases.AWKWARD}


@pytest.mark.parametrize("name", ["softmax_one_token", "sixty_experts", "ties"])
def test_decode_kernel_writes_the_plan(name: str) -> None:
    operands, named = cases.arguments(CASES[name])
    with interpret.interpreting():
        routing = jax.block_until_ready(decode_sm90.route(*operands, **named))
    expected = decode_plan(routing, num_experts=operands[1].shape[0], first_expert=0)
    assert routing.plan is not None
    np.testing.assert_array_equal(routing.plan.combine_ET, expected.combine_ET)
    np.testing.assert_array_equal(routing.plan.active_E, expected.active_E)
    np.testing.assert_array_equal(routing.plan.num_active, expected.num_active)
    np.testing.assert_array_equal(routing.plan.signals, np.zeros(NUM_SIGNALS))


@pytest.mark.aot
def test_decode_kernel_normalises_in_its_own_launch() -> None:
    router = dataclasses.replace(cases.ROUTERS["qwen3-30b"], has_norm=True)
    operands, named = aot.shapes_of(functools.partial(cases.arguments, cases.Case("normed", 8, router)))
    arrays, static = aot.split_arrays(named)
    program = aot.compile_for_h200(
        lambda operands, arrays: decode_sm90.route(*operands, **arrays, **static), operands, arrays
    )
    assert program.launches == ("route_decode",)
    assert program.kernels[0].spill_bytes == 0


PREFILL = [
    "top1",
    "a_page_of_tokens",
    "sixty_experts",
    "ties",
    "ties_between_groups",
    "groups_by_top2_sum",
    "many_experts",
]


@pytest.mark.parametrize("name", PREFILL)
def test_prefill_kernel_is_exact_and_writes_the_places(name: str) -> None:
    case = CASES[name]
    operands, named = cases.arguments(case)
    with interpret.interpreting():
        routing = jax.block_until_ready(prefill_sm90.route(*operands, **named))
    expected = reference.route(*operands, **named)
    np.testing.assert_array_equal(routing.experts_TA, expected.experts_TA)
    np.testing.assert_allclose(routing.weights_TA, expected.weights_TA, rtol=1e-6)
    ranks_TA, counts_BE = _count(np.asarray(routing.experts_TA), case.router.num_experts)
    assert routing.places is not None
    np.testing.assert_array_equal(routing.places.ranks_TA, ranks_TA)
    np.testing.assert_array_equal(routing.places.counts_BE, counts_BE)


def _count(experts_TA: np.ndarray, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Ranks and counts per block of 64 tokens, one choice after the other."""
    ranks_TA = np.zeros_like(experts_TA)
    counts_BE = np.zeros((-(-len(experts_TA) // 64), num_experts), np.int32)
    for (token, choice), expert in np.ndenumerate(experts_TA):
        ranks_TA[token, choice] = counts_BE[token // 64, expert]
        counts_BE[token // 64, expert] += 1
    return ranks_TA, counts_BE


@pytest.mark.aot
@pytest.mark.parametrize("name", ["qwen3-30b-4096", "mixtral-512"])
def test_prefill_kernel_compiles(name: str) -> None:
    case = next(case for case in cases.REAL if case.name == name)
    operands, named = aot.shapes_of(functools.partial(cases.arguments, case))
    program = aot.compile_for_h200(functools.partial(prefill_sm90.route, rule=named["rule"]), *operands)
    (kernel,) = program.kernels
    assert kernel.spill_bytes == 0
    assert kernel.shared_memory_bytes <= aot.SHARED_MEMORY_BYTES


@pytest.mark.aot
@pytest.mark.parametrize("tokens", [1, 16, 512])
def test_as_many_experts_as_there_may_be_compile_without_spills(tokens: int) -> None:
    """Kimi-K2's router: the largest that a decode and a prefill kernel take."""
    rule = RoutingRule(8, score="sigmoid", renormalize=True, scale=2.827)
    router = cases.Router(decode_sm90.MAX_EXPERTS, 7168, rule, has_selection_bias=True)
    operands, named = aot.shapes_of(functools.partial(cases.arguments, cases.Case("kimi-k2", tokens, router)))
    arrays, static = aot.split_arrays(named)
    program = aot.compile_for_h200(lambda operands, arrays: route(*operands, **arrays, **static), operands, arrays)
    (kernel,) = program.kernels
    assert kernel.spill_bytes == 0
    assert kernel.shared_memory_bytes <= aot.SHARED_MEMORY_BYTES


@pytest.mark.parametrize(
    ("tokens", "experts", "rule", "dtype", "reason"),
    [
        (65, 64, RoutingRule(8), "bfloat16", "64 tokens"),
        (8, 385, RoutingRule(8), "bfloat16", "384 experts"),
        (8, 64, RoutingRule(8, dtype="bfloat16"), "bfloat16", "scores are float32"),
        (8, 64, RoutingRule(8), "float32", "multiplies bfloat16"),
    ],
)
def test_decode_kernel_says_what_it_cannot(
    tokens: int, experts: int, rule: RoutingRule, dtype: str, reason: str
) -> None:
    x_TD, gate_ED = jnp.zeros((tokens, 128), dtype), jnp.zeros((experts, 128), dtype)
    answer = decode_sm90.IMPLEMENTATION.supports(H200, x_TD, gate_ED, rule=rule)
    assert answer is not None
    assert reason in answer


def test_decode_kernel_refuses_what_exceeds_shared_memory() -> None:
    x_TD, gate_ED = jnp.zeros((64, 7168), "bfloat16"), jnp.zeros((256, 7168), "bfloat16")
    assert decode_sm90.IMPLEMENTATION.supports(H200, x_TD[:32], gate_ED, rule=RoutingRule(8)) is None
    answer = decode_sm90.IMPLEMENTATION.supports(H200, x_TD, gate_ED, rule=RoutingRule(8))
    assert answer is not None
    assert "shared memory" in answer


def test_prefill_kernel_refuses_groups_that_straddle_warpgroups() -> None:
    rule = RoutingRule(6, num_groups=3, top_groups=1, group_score="max")
    x_TD, gate_ED = jnp.zeros((128, 128), "bfloat16"), jnp.zeros((300, 128), "bfloat16")
    answer = prefill_sm90.IMPLEMENTATION.supports(H200, x_TD, gate_ED, rule=rule)
    assert answer is not None
    assert "groups" in answer
