"""The compact kernel's arithmetic by hand; its numbers are tested with those of all kernels in `test_kernels.py`."""

from __future__ import annotations

import functools
import itertools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import aot, interpret
from pallas_kernels.experts import cases, compact_sm90
from pallas_kernels.experts.compact_plan_sm90 import Plan, Sizes
from pallas_kernels.experts.compact_schedule import Deal, chunks_of_down

SMS = 132


@functools.partial(jax.jit, static_argnames=("head_starts", "num_blocks", "most"))
def _deal(up_items, down_items, *, head_starts: int, num_blocks: int, most: int):
    """Of each block: counts of both phases, and the first `most` items of both."""

    def of_block(block):
        deal = Deal.of(up_items, down_items, head_starts=head_starts, block=block, num_blocks=num_blocks)
        indices = jnp.arange(most, dtype=jnp.int32)
        return deal.num_up, deal.num_down, jax.vmap(deal.up)(indices), jax.vmap(deal.down)(indices)

    return jax.vmap(of_block)(jnp.arange(num_blocks, dtype=jnp.int32))


def test_every_item_is_dealt_once_and_in_order():
    rng = random.Random(0)
    for num_blocks, head_starts in ((1, 1), (2, 3), (7, 0), (SMS, 2)):
        for _ in range(10):
            counts = rng.randint(0, 400), rng.choice([0, 1, rng.randint(0, 400)])
            dealt = _deal(*map(jnp.int32, counts), head_starts=head_starts, num_blocks=num_blocks, most=401)
            num_up, num_down, up, down = map(np.asarray, dealt)
            for count, numbers, items in ((counts[0], num_up, up), (counts[1], num_down, down)):
                mine = [row[:number].tolist() for row, number in zip(items, numbers, strict=True)]
                assert sorted(itertools.chain.from_iterable(mine)) == list(range(count))
                assert all(each == sorted(each) for each in mine)


@pytest.mark.parametrize(
    ("name", "tokens_tiles", "depth"),
    [("qwen3-30b", 126, 128), ("olmoe", 64, 128), ("mixtral", 8, 128), ("tinymistral", 6, 128), ("gpt-oss", 32, 64)],
)
def test_blocks_load_about_as_much(name, tokens_tiles, depth):
    """The busiest of 132 blocks has at most 4 % more steps than the mean: what is left is half an item's length."""
    layer = cases.LAYERS[name]
    up_steps, all_down_steps = pl.cdiv(layer.model_width, depth), pl.cdiv(layer.width, depth)
    down_tiles = pl.cdiv(layer.model_width, 128)
    chunks = chunks_of_down(all_down_steps, tokens_tiles * down_tiles, depth=depth, num_blocks=SMS)
    down_steps = pl.cdiv(all_down_steps, chunks)
    items = tokens_tiles * pl.cdiv(layer.width, 64), tokens_tiles * down_tiles * pl.cdiv(all_down_steps, down_steps)
    num_up, num_down, _, _ = _deal(
        *map(jnp.int32, items), head_starts=max(1, up_steps // down_steps), num_blocks=SMS, most=1
    )
    steps = num_up * up_steps + num_down * down_steps
    assert steps.max() <= 1.04 * steps.mean()


@pytest.mark.parametrize(
    ("case", "most_tokens"),
    [
        (cases.Case("one_token", 1, cases.Layer(4, 2, 64, 64)), 8),
        (cases.Case("tall", 70, cases.Layer(4, 2, 64, 64)), 16),
        (cases.Case("local", 33, cases.Layer(12, 3, 64, 64), local=(2, 9)), 64),
        (cases.Case("a_multiple_of_64", 20, cases.Layer(64, 4, 64, 64)), 8),
        (cases.Case("many", 9, cases.Layer(130, 8, 64, 64)), 8),
        (cases.Case("elsewhere", 5, cases.Layer(8, 2, 64, 64), chosen=(0, 1, 2), local=(4, 4)), 8),
    ],
    ids=lambda value: value.name if isinstance(value, cases.Case) else str(value),
)
def test_plan_counts_as_by_hand(case, most_tokens):
    experts_TA = cases.routing(jax.random.key(0), case.tokens, case.layer, chosen=case.chosen).experts_TA
    first, count = case.local or (0, case.layer.num_experts)
    sizes = Sizes(*experts_TA.shape, first, count, most_tokens, num_blocks=1)

    rows_TA, tiles = _plan(experts_TA, sizes)

    rows, expected_tiles, end = _plan_by_hand(np.asarray(experts_TA).reshape(-1) - first, count, most_tokens)
    assert rows_TA.reshape(-1).tolist() == rows
    assert tiles == expected_tiles
    assert len(tiles) <= sizes.tiles
    assert end <= sizes.rows


def _plan(experts_TA, sizes: Sizes):
    """Rows of all choices, and (expert, first row, tokens) of each tile, as a block reads them from its plan."""

    def kernel(experts_gmem, rows_gmem, tiles_gmem, count_gmem, **scratch):
        plan = Plan(sizes, experts_gmem, **scratch)
        plan.write_keys()
        plan.write_table()
        plan.write_places(0)
        count_gmem[0] = plan.num_tiles

        @pl.loop(0, sizes.num_tokens)
        def _token(token):
            for choice in range(sizes.active):
                own = token * sizes.active + choice
                rows_gmem[own] = plan.row_of(token, own, choice)

        @pl.loop(0, plan.num_tiles)
        def _tile(tile):
            for column, value in enumerate((plan.expert_of(tile), *plan.rows_of(tile))):
                tiles_gmem[tile, column] = value

    with interpret.interpreting():
        rows_M, tiles_X3, count_1 = jax.block_until_ready(
            plgpu.kernel(
                kernel,
                out_type=(
                    jax.ShapeDtypeStruct((sizes.choices,), jnp.int32),
                    jax.ShapeDtypeStruct((sizes.tiles, 3), jnp.int32),
                    jax.ShapeDtypeStruct((1,), jnp.int32),
                ),
                grid=(1,),
                grid_names=("block",),
                scratch_types=sizes.scratch(),
                compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
            )(experts_TA.reshape(-1))
        )
    return np.asarray(rows_M), [tuple(row) for row in np.asarray(tiles_X3)[: int(count_1[0])].tolist()]


def _plan_by_hand(local_M: np.ndarray, num_experts: int, most_tokens: int):
    rows, tiles, end = [-1] * len(local_M), [], 0
    for expert in range(num_experts):
        choices = np.flatnonzero(local_M == expert)
        for rank, choice in enumerate(choices):
            rows[choice] = end + rank
        for earlier in range(0, len(choices), most_tokens):
            tiles.append((expert, end + earlier, min(most_tokens, len(choices) - earlier)))
        end += (len(choices) + 7) // 8 * 8
    return rows, tiles, end


@pytest.mark.aot
@pytest.mark.parametrize(("name", "tokens"), [("qwen3-30b", 64), ("gpt-oss", 300)])
def test_compiles_to_one_launch(name, tokens):
    case = cases.Case(name, tokens, cases.LAYERS[name])
    operands, named = aot.shapes_of(functools.partial(cases.arguments, case))
    arrays, static = aot.split_arrays(named)
    program = aot.compile_for_h200(
        lambda operands, arrays: compact_sm90.experts(*operands, **arrays, **static), operands, arrays
    )
    (kernel,) = program.kernels
    assert kernel.spill_bytes == 0
    assert kernel.shared_memory_bytes <= aot.SHARED_MEMORY_BYTES
    assert len(program.launches) == 2, "the kernel, and zeros to signal with"
