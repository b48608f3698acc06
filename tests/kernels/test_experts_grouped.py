"""The plan of the grouped expert layer, against counting by hand; and its own building blocks."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import interpret
from pallas_kernels.experts import cases, grouped_plan, grouped_plan_sm90, grouped_rows_sm90
from pallas_kernels.route.api import Places

MANY = cases.Case("many_blocks", 300, cases.Layer(12, 3, 64, 128), local=(2, 9))
TALL = cases.Case("several_tiles_each", 900, cases.Layer(4, 2, 64, 128))
SEVENTY = cases.Case("seventy_experts", 70, cases.Layer(70, 6, 64, 64))
ODD = cases.Case("an_odd_number_of_choices", 131, cases.Layer(5, 1, 64, 64))
PLANNED = [case for case in cases.AWKWARD if case.dtype == "bfloat16"] + [MANY, TALL, SEVENTY]


@pytest.mark.parametrize(("has_places", "tile_rows"), [(False, 128), (True, 192)])
@pytest.mark.parametrize("case", PLANNED, ids=lambda case: case.name)
def test_plan_counts_as_by_hand(case, has_places, tile_rows):
    routing = cases.routing(jax.random.key(0), case.tokens, case.layer, chosen=case.chosen)
    first, count = case.local or (0, case.layer.num_experts)
    places = _places_by_hand(np.asarray(routing.experts_TA), case.layer.num_experts) if has_places else None

    plan = grouped_plan.plan(
        routing.experts_TA, num_experts=count, first_expert=first, tile_rows=tile_rows, places=places
    )

    rows, tiles, end = _plan_by_hand(np.asarray(routing.experts_TA).reshape(-1) - first, count, tile_rows)
    assert np.asarray(plan.rows_TA).reshape(-1).tolist() == rows
    num_tiles = int(plan.num_tiles_1[0])
    columns = (plan.expert_X, plan.start_X, plan.end_X, plan.size_X)
    assert list(zip(*(np.asarray(column)[:num_tiles].tolist() for column in columns), strict=True)) == tiles
    assert num_tiles <= len(plan.expert_X)
    assert end <= grouped_plan.num_rows(routing.experts_TA.size, count)


@pytest.mark.parametrize("case", [MANY, TALL, SEVENTY, ODD], ids=lambda case: case.name)
def test_plan_kernel_is_the_plan(case):
    routing = cases.routing(jax.random.key(0), case.tokens, case.layer)
    first, count = case.local or (0, case.layer.num_experts)
    places = _places_by_hand(np.asarray(routing.experts_TA), case.layer.num_experts)
    arguments = dict(num_experts=count, first_expert=first, tile_rows=128, places=places)
    expected = grouped_plan.plan(routing.experts_TA, **arguments)
    with interpret.interpreting():
        plan = jax.block_until_ready(grouped_plan_sm90.plan(routing.experts_TA, **arguments))
    num_tiles = int(expected.num_tiles_1[0])
    for name, exact in dataclasses.asdict(expected).items():
        checked = slice(num_tiles) if name.endswith("_X") else slice(None)
        np.testing.assert_array_equal(getattr(plan, name)[checked], exact[checked], err_msg=name)


def _plan_by_hand(local_M: np.ndarray, num_experts: int, tile_rows: int):
    rows, tiles, end = [-1] * len(local_M), [], 0
    for expert in range(num_experts):
        choices, start = np.flatnonzero(local_M == expert), end
        for rank, choice in enumerate(choices):
            rows[choice] = start + rank
        blocks = (len(choices) + 63) // 64
        end = start + blocks * 64
        num_tiles = (blocks * 64 + tile_rows - 1) // tile_rows
        for tile in range(num_tiles):
            first, last = (start + index * blocks // num_tiles * 64 for index in (tile, tile + 1))
            tiles.append((expert, first, last, min(last, start + len(choices)) - first))
    return rows, tiles, end


def _places_by_hand(experts_TA: np.ndarray, num_experts: int) -> Places:
    num_blocks = (len(experts_TA) + 63) // 64
    counts_BE, ranks_TA = np.zeros((num_blocks, num_experts), np.int32), np.zeros_like(experts_TA)
    for token, chosen in enumerate(experts_TA):
        ranks_TA[token] = counts_BE[token // 64, chosen]
        counts_BE[token // 64, chosen] += 1
    return Places(jnp.asarray(ranks_TA), jnp.asarray(counts_BE))


@pytest.mark.parametrize(
    ("width", "rectangle"), [(2880, (12, 240)), (4096, (16, 256)), (80, (1, 80)), (16 * 257, None)]
)
def test_rows_are_copied_as_rectangles_of_at_most_256(width, rectangle):
    assert grouped_rows_sm90.box(width) == rectangle


def test_spread_writes_each_choice_and_leaves_the_rest():
    x_TD = jnp.arange(5 * 48, dtype=jnp.bfloat16).reshape(5, 48)
    rows_TA = jnp.array([[3, -1], [0, 7], [-1, -1], [6, 1], [2, 5]], jnp.int32)
    with interpret.interpreting(detect_races=True) as detector:
        out = jax.block_until_ready(grouped_rows_sm90.spread(x_TD, rows_TA, num_rows=8, num_sms=2))
    assert not detector.races_found
    for token, rows in enumerate(rows_TA.tolist()):
        for row in rows:
            assert row < 0 or (out[row] == x_TD[token]).all()
    assert jnp.isnan(out[4]).all()  # nobody's row: never written


def test_combine_sums_tiles_one_after_the_other():
    """24 tiles, 4 choices: four tiles at a time, in six turns."""
    tokens, active, num_tiles = 2, 4, 24
    keys = jax.random.split(jax.random.key(0), 3)
    values_MD = jax.random.normal(keys[0], (tokens * active, 128 * num_tiles), jnp.float16)
    scales_NM = jax.random.uniform(keys[1], (num_tiles, tokens * active))
    weights_TA = jax.random.uniform(keys[2], (tokens, active))
    rows_TA = jnp.arange(tokens * active, dtype=jnp.int32).reshape(tokens, active)
    with interpret.interpreting():
        out_TD = grouped_rows_sm90.combine(
            values_MD, scales_NM, rows_TA, weights_TA, model_width=128 * num_tiles, dtype=jnp.float32
        )
        out_TD = jax.block_until_ready(out_TD)
    scaled_TAD = values_MD.reshape(tokens, active, -1) * jnp.repeat(scales_NM.T, 128, 1).reshape(tokens, active, -1)
    np.testing.assert_allclose(out_TD, (weights_TA[:, :, None] * scaled_TAD).sum(axis=1), rtol=1e-5, atol=1e-5)


def test_combine_ignores_what_unwritten_rows_hold():
    values_MD = jnp.array([[1.0] * 128, [0.5] * 128, [jnp.nan] * 128], jnp.float16)
    scales_NM = jnp.array([[2.0, 4.0, jnp.nan]], jnp.float32)
    rows_TA, weights_TA = jnp.array([[0, 1], [-1, 1], [-1, -1]], jnp.int32), jnp.array([[0.5, 0.25]] * 3, jnp.float32)
    with interpret.interpreting():
        out = grouped_rows_sm90.combine(values_MD, scales_NM, rows_TA, weights_TA, model_width=96, dtype=jnp.bfloat16)
        out = jax.block_until_ready(out)
    assert out.shape == (3, 96)
    assert [set(row.tolist()) for row in np.asarray(out, np.float32)] == [{1.5}, {0.5}, {0.0}]
