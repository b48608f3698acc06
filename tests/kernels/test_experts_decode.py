"""The arithmetic around the decode kernel: its plan, and how blocks share the steps of the down phase."""

from __future__ import annotations

import itertools
import random

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.experts import cases
from pallas_kernels.experts.decode_sm90 import last_block_before, part_of
from pallas_kernels.experts.plan import decode_plan, padded_tokens

CASES = {case.name: case for case in cases.AWKWARD}


@pytest.mark.parametrize(("tokens", "padded"), [(1, 8), (8, 8), (9, 16), (17, 32), (33, 64), (64, 64)])
def test_token_tile(tokens, padded):
    assert padded_tokens(tokens) == padded


@pytest.mark.parametrize("name", ["one_token", "empty_experts", "off_the_tile", "upper_half_local", "nothing_local"])
def test_decode_plan_by_hand(name):
    case = CASES[name]
    (_, routing, *_), named = cases.arguments(case)
    first, count = case.local or (0, case.layer.num_experts)
    expected_ET = np.zeros((count, padded_tokens(case.tokens)), np.float32)
    for token, (experts, weights) in enumerate(zip(routing.experts_TA, routing.weights_TA, strict=True)):
        for expert, weight in zip(map(int, experts), weights, strict=True):
            if first <= expert < first + count:
                expected_ET[expert - first, token] = weight
    active = sorted({int(e) - first for e in routing.experts_TA.reshape(-1) if first <= e < first + count})

    plan = decode_plan(routing, num_experts=count, first_expert=named["first_expert"])
    np.testing.assert_array_equal(plan.combine_ET, expected_ET)
    assert plan.num_active.tolist() == [len(active)]
    assert plan.active_E.tolist() == active + [count] * (count - len(active))


def test_parts_cover_every_tile_once():
    """Whoever finishes a tile must name exactly the blocks that hold the rest of it: more would wait for ever."""
    rng = random.Random(0)
    for _ in range(300):
        steps_per_tile, tiles, num_blocks = rng.randint(1, 90), rng.randint(1, 120), rng.choice([1, 2, 7, 132])
        all_steps = steps_per_tile * tiles
        parts = [part_of(block, all_steps=all_steps, num_blocks=num_blocks) for block in range(num_blocks)]
        assert parts[0][0] == 0 and parts[-1][1] == all_steps
        assert all(before[1] == after[0] for before, after in itertools.pairwise(parts))
        for end in range(steps_per_tile, all_steps + 1, steps_per_tile):
            last = last_block_before(end, all_steps=all_steps, num_blocks=num_blocks)
            assert last == max(block for block, (begin, _) in enumerate(parts) if begin < end)


def test_parts_fit_in_int32():
    """The largest layers: DeepSeek-V3 with all its experts active."""
    all_steps = jnp.int32(7168 // 128 * 256 * (2048 // 64))
    begin, end = part_of(jnp.int32(131), all_steps=all_steps, num_blocks=132)
    assert int(end) == int(all_steps) and int(begin) > 0
    assert int(last_block_before(all_steps, all_steps=all_steps, num_blocks=132)) == 131
