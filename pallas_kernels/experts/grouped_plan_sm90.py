"""The plan of the grouped algorithm on Hopper: sums over blocks of tokens by XLA, all the rest in one launch.

XLA makes seven launches of the same plan, of about a microsecond each: felt at hundreds of tokens. Vectors over experts
meet vectors over rows in matrices of 64 x 64, as registers know neither cumulative sums nor gathers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.experts import grouped_plan
from pallas_kernels.experts.grouped_plan import BLOCK, GroupedPlan
from pallas_kernels.route.api import Places

MATRIX = plgpu.Layout.WGMMA
EXPERTS = plgpu.Layout.WGMMA.reduce(0)  # of a vector along the columns of a matrix
ROWS = plgpu.Layout.WGMMA.reduce(1)
NUMBERS = 4  # of 4 bytes: TMA writes whole 16 bytes, and leaves out what an array has beyond the last multiple of them


def plan(
    experts_TA: jax.Array,
    *,
    num_experts: int,
    first_expert: int = 0,
    tile_rows: int = 128,
    places: Places | None = None,
) -> GroupedPlan:
    """`grouped_plan.plan`, number for number; there may be up to three more tiles that do not exist."""
    num_tokens, active = experts_TA.shape
    num_blocks = pl.cdiv(num_tokens, BLOCK)
    num_tiles = grouped_plan.max_tiles(experts_TA.size, num_experts, tile_rows)
    ranks_TA, counts_BE = grouped_plan.local_places(
        experts_TA, places, num_experts=num_experts, first_expert=first_expert
    )
    sums_BE = grouped_plan.sums_over_blocks(jnp.pad(counts_BE, ((0, 0), (0, -num_experts % NUMBERS))))
    num_choices = experts_TA.size
    experts_M, ranks_M = (
        jnp.pad(each_TA.reshape(-1), (0, -num_choices % NUMBERS)) for each_TA in (experts_TA, ranks_TA)
    )
    chunks = pl.cdiv(num_experts, BLOCK)

    def kernel(sums_gmem, experts_gmem, ranks_gmem, rows_gmem, *table_gmem_and_count, **scratch):
        *table_gmem, count_gmem = table_gmem_and_count
        before_smem, sizes_smem, starts_smem, first_tiles_smem = (
            scratch[name] for name in ("before_smem", "sizes_smem", "starts_smem", "first_tiles_smem")
        )
        experts_smem, ranks_smem, rows_smem, table_smem, loaded = (
            scratch[name] for name in ("experts_smem", "ranks_smem", "rows_smem", "table_smem", "loaded")
        )
        block = lax.axis_index("block")

        def load():
            @pl.loop(0, chunks)
            def _sums(chunk):  # past the last expert TMA reads zeros
                part = pl.ds(chunk * BLOCK, BLOCK)
                plgpu.copy_gmem_to_smem(sums_gmem.at[block, part], before_smem.at[part], loaded)
                plgpu.copy_gmem_to_smem(sums_gmem.at[num_blocks, part], sizes_smem.at[part], loaded)

            @pl.loop(0, active)
            def _choices(choice):
                source, part = pl.ds((block * active + choice) * BLOCK, BLOCK), pl.ds(choice * BLOCK, BLOCK)
                plgpu.copy_gmem_to_smem(experts_gmem.at[source], experts_smem.at[part], loaded)
                plgpu.copy_gmem_to_smem(ranks_gmem.at[source], ranks_smem.at[part], loaded)

            plgpu.barrier_wait(loaded)

        def vector(ref, chunk, layout=EXPERTS):
            return plgpu.load(ref.at[pl.ds(chunk * BLOCK, BLOCK)], layout=layout, optimized=False)

        def padded_and_tiles(chunk):
            padded = lax.div(vector(sizes_smem, chunk) + (BLOCK - 1), BLOCK) * BLOCK
            return padded, lax.div(padded + (tile_rows - 1), tile_rows)

        def sum_starts():
            @pl.loop(0, chunks)
            def _rows(rows):
                def add(chunk, sums):
                    is_earlier = _column_ids(chunk) < _row_ids(rows)
                    return [
                        total + _pick(is_earlier, part)
                        for total, part in zip(sums, padded_and_tiles(chunk), strict=True)
                    ]

                starts, first_tiles = lax.fori_loop(0, chunks, add, [_no_rows(), _no_rows()])
                starts_smem[pl.ds(rows * BLOCK, BLOCK)] = starts.astype(jnp.int32)
                first_tiles_smem[pl.ds(rows * BLOCK, BLOCK)] = first_tiles.astype(jnp.int32)

            plgpu.commit_smem()

        def write_rows():
            @pl.loop(0, active)
            def _choice(choice):
                local = vector(experts_smem, choice, ROWS) - first_expert

                def add(chunk, row):
                    base = vector(starts_smem, chunk) + vector(before_smem, chunk)
                    return row + _pick(_across(local) == _column_ids(chunk), base)

                row = lax.fori_loop(0, chunks, add, _no_rows()).astype(jnp.int32) + vector(ranks_smem, choice, ROWS)
                rows_smem[pl.ds(choice * BLOCK, BLOCK)] = jnp.where((local >= 0) & (local < num_experts), row, -1)

            plgpu.commit_smem()
            for choice in range(active):
                target = rows_gmem.at[pl.ds((block * active + choice) * BLOCK, BLOCK)]
                plgpu.copy_smem_to_gmem(rows_smem.at[pl.ds(choice * BLOCK, BLOCK)], target)

        def write_tiles(tile_block):
            tile = _row_ids(tile_block)

            def add(chunk, sums):
                first_tiles, num_tiles = vector(first_tiles_smem, chunk), padded_and_tiles(chunk)[1]
                is_of = (_down(first_tiles) <= tile) & (tile < _down(first_tiles + num_tiles))
                ids = jnp.sum(jnp.where(is_of, _column_ids(chunk).astype(jnp.float32), 0.0), axis=1)
                per_expert = (vector(starts_smem, chunk), vector(sizes_smem, chunk), first_tiles, num_tiles)
                parts = [ids, *(_pick(is_of, values) for values in per_expert)]
                return [total + part for total, part in zip(sums, parts, strict=True)]

            sums = lax.fori_loop(0, chunks, add, [_no_rows()] * 5)
            expert, first_row, size, first_tile, tiles = (total.astype(jnp.int32) for total in sums)
            ids = plgpu.broadcasted_iota(jnp.int32, (BLOCK,), 0, layout=ROWS) + tile_block * BLOCK
            start, end = grouped_plan.share_of_rows(size, ids - first_tile, tiles)
            columns = (expert, first_row + start, first_row + end, jnp.minimum(size, end) - start)
            for index, column in enumerate(columns):
                table_smem[index] = column
            plgpu.commit_smem()
            for index, column_gmem in enumerate(table_gmem):
                target = column_gmem.at[pl.ds(tile_block * BLOCK, BLOCK)]
                plgpu.copy_smem_to_gmem(table_smem.at[index], target)
            plgpu.wait_smem_to_gmem(0)

        load()
        sum_starts()
        write_rows()
        for turn in range(pl.cdiv(pl.cdiv(num_tiles, BLOCK), num_blocks)):
            tile_block = block + turn * num_blocks
            pl.when(tile_block * BLOCK < num_tiles)(lambda tile_block=tile_block: write_tiles(tile_block))

        @pl.when(block == 0)
        def _():
            last_size = sizes_smem[num_experts - 1]
            last_tiles = lax.div(lax.div(last_size + (BLOCK - 1), BLOCK) * BLOCK + (tile_rows - 1), tile_rows)
            count_gmem[0] = first_tiles_smem[num_experts - 1] + last_tiles

        plgpu.wait_smem_to_gmem(0)

    per_expert = plgpu.SMEM((chunks * BLOCK,), jnp.int32)
    per_choice = plgpu.SMEM((active * BLOCK,), jnp.int32)
    rows_M, expert_X, start_X, end_X, size_X, count_1 = plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct(experts_M.shape, jnp.int32),
            *[jax.ShapeDtypeStruct((grouped_plan.round_up(num_tiles, NUMBERS),), jnp.int32)] * 4,
            jax.ShapeDtypeStruct((1,), jnp.int32),
        ),
        grid=(num_blocks,),
        grid_names=("block",),
        kernel_name="grouped_plan",
        scratch_types=dict(
            before_smem=per_expert,
            sizes_smem=per_expert,
            starts_smem=per_expert,
            first_tiles_smem=per_expert,
            experts_smem=per_choice,
            ranks_smem=per_choice,
            rows_smem=per_choice,
            table_smem=plgpu.SMEM((4, BLOCK), jnp.int32),
            loaded=plgpu.Barrier(num_arrivals=2 * chunks + 2 * active),
        ),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )(sums_BE, experts_M, ranks_M)
    return GroupedPlan(rows_M[:num_choices].reshape(num_tokens, active), expert_X, start_X, end_X, size_X, count_1)


def _no_rows():
    return plgpu.layout_cast(jnp.zeros((BLOCK,), jnp.float32), ROWS)


def _row_ids(block):
    return plgpu.broadcasted_iota(jnp.int32, (BLOCK, BLOCK), 0, layout=MATRIX) + block * BLOCK


def _column_ids(chunk):
    return plgpu.broadcasted_iota(jnp.int32, (BLOCK, BLOCK), 1, layout=MATRIX) + chunk * BLOCK


def _down(values):
    return lax.broadcast_in_dim(values, (BLOCK, BLOCK), (1,))


def _across(values):
    return lax.broadcast_in_dim(values, (BLOCK, BLOCK), (0,))


def _pick(is_wanted, values):
    """For each row the sum, in float32, of the columns' values that it wants. Exact: all are below 2^24."""
    return jnp.sum(jnp.where(is_wanted, _down(values).astype(jnp.float32), 0.0), axis=1)
