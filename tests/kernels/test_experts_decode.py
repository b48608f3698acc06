"""The arithmetic around the decode kernel: its plan, and how blocks share the steps of the down phase."""

from __future__ import annotations

import dataclasses
import random

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.experts import cases
from pallas_kernels.experts.decode_sm90 import Line
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


def test_every_tile_is_finished_by_one_block_with_all_its_helpers():
    """The finisher waits for exactly the blocks that hand over to it: one more, and it would wait for ever."""
    rng = random.Random(0)
    for _ in range(200):
        steps_per_tile, num_tiles, num_blocks = rng.randint(1, 90), rng.randint(0, 120), rng.choice([1, 2, 7, 132])
        blocks = [
            cut_line(num_tiles, steps_per_tile, block=block, num_blocks=num_blocks) for block in range(num_blocks)
        ]
        covered, finished, handed_over, waited_for = 0, [], [], []
        for index, line in enumerate(blocks):
            assert line.begin == covered
            covered = line.end
            for tile in range(line.begin // steps_per_tile, line.begin // steps_per_tile + int(line.num_tiles_touched)):
                begin = tile * steps_per_tile
                if line.begin > begin:
                    handed_over.append((line.last_block_before(begin + 1), index))
                else:
                    finished.append(tile)
                    waited_for += [
                        (index, other) for other in range(index + 1, line.last_block_before(begin + steps_per_tile) + 1)
                    ]
        assert covered == num_tiles * steps_per_tile
        assert finished == list(range(num_tiles))
        assert sorted(handed_over) == sorted(waited_for)


def cut_line(num_tiles: int, steps_per_tile: int, *, block: int, num_blocks: int) -> Line:
    """`Line.cut` in Python's integers."""
    line = Line.cut(num_tiles, steps_per_tile, block=block, num_blocks=num_blocks)
    return Line(steps_per_tile, *map(int, (line.all_steps, line.num_parts, line.begin, line.end)))


def test_lines_fit_in_int32():
    """The largest layer: DeepSeek-V3 with all its experts active, in the smallest steps."""
    line = cut_line(256 * 2048 // 64, 7168 // 64, block=131, num_blocks=132)
    assert line.end == line.all_steps == 256 * 2048 // 64 * 7168 // 64
    assert (
        int(Line.last_block_before(dataclasses.replace(line, all_steps=jnp.int32(line.all_steps)), jnp.int32(line.end)))
        == 131
    )
