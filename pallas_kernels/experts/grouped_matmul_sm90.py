"""Grouped matrix multiplication on Hopper: tiles of rows sorted by expert, each times its own expert's matrix, transposed.

One persistent launch. A producer warp streams tiles of rows and weights through a ring in shared memory that never drains
between work items; two warpgroups multiply 64 rows each, and the second only keeps step where a tile has 64 rows or fewer.
Two epilogues: `grouped_up` applies the expert's activation, `grouped_down` stores rows in float16 beside a scale.

Items are dealt out in turn, and those of the last waves go to whichever SM is free: they differ in height.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.experts.grouped_plan import GroupedPlan
from pallas_kernels.experts.reference import CLAMP, SIGMOID_SLOPE

ROWS = 64  # of one warpgroup
SWIZZLED = 64  # elements of 2 bytes in the widest swizzle
WARPGROUPS = 2  # that multiply
TILE_ROWS = ROWS * WARPGROUPS
TAIL = 3  # waves of items that blocks of their own work on, at most
SMALLEST_SCALE = 1e-30  # keeps the scale of a row of zeros invertible


@dataclasses.dataclass(frozen=True)
class Tile:
    """How the work is cut.

    columns: of the output, per gate. band: tiles of rows that are multiplied by the same columns one after another, so
    that weights come from memory once and then from the L2 cache.
    """

    columns: int
    band: int


def grouped_up(
    rows_MD, up_EGFD, bias_EGF, plan: GroupedPlan, *, activation: str, tile: Tile, num_sms: int
) -> jax.Array:
    """`act(rows @ up[expert].T + bias)` in the rows' dtype, `[M, F]` with F rounded up to 64 by zeros.

    Rows that no tile covers stay undefined.
    """
    width = pl.cdiv(up_EGFD.shape[2], SWIZZLED) * SWIZZLED
    is_gated = up_EGFD.shape[1] == 2

    def _activated(parts):
        return [activate(parts, activation)] if is_gated else [activate([part], activation) for part in parts]

    (hidden_MF,) = _grouped_matmul(
        rows_MD,
        up_EGFD,
        bias_EGF,
        plan,
        lambda parts: ([value.astype(rows_MD.dtype) for value in _activated(parts)],),
        out_types=(jax.ShapeDtypeStruct((rows_MD.shape[0], width), rows_MD.dtype),),
        tile=tile,
        num_sms=num_sms,
        name="grouped_up",
    )
    return hidden_MF


def grouped_down(
    rows_MF, down_EDF, bias_ED, plan: GroupedPlan, *, tile: Tile, num_sms: int
) -> tuple[jax.Array, jax.Array]:
    """`rows @ down[expert].T + bias` as float16 `[M, D]` times float32 scales `[ceil(D / columns), M]`, one per row
    and tile.

    bfloat16 would add a third rounding to the two of the definition; float32 would double the bytes. A row divided by
    its largest value keeps eleven bits in float16 and cannot overflow.
    """
    num_rows, model_width = rows_MF.shape[0], down_EDF.shape[1]
    num_tiles = pl.cdiv(model_width, tile.columns)
    values_MD, scales_NM = _grouped_matmul(
        rows_MF,
        down_EDF[:, None],
        None if bias_ED is None else bias_ED[:, None],
        plan,
        _scaled,
        out_types=(
            jax.ShapeDtypeStruct((num_rows, num_tiles * tile.columns), jnp.float16),
            jax.ShapeDtypeStruct((num_tiles, num_rows), jnp.float32),
        ),
        tile=tile,
        num_sms=num_sms,
        name="grouped_down",
    )
    return values_MD, scales_NM


def _scaled(parts):
    scale = functools.reduce(jnp.maximum, (jnp.max(jnp.abs(part), axis=1) for part in parts))
    scale = jnp.maximum(scale, SMALLEST_SCALE)
    inverse = lax.broadcast_in_dim(1.0 / scale, parts[0].shape, (0,))
    return [(part * inverse).astype(jnp.float16) for part in parts], scale


def activate(parts: list[jax.Array], activation: str) -> jax.Array:
    """`reference.activate` on [gate, linear] or [up] in float32 registers, from operations that Mosaic lowers."""
    first = parts[0]
    if activation == "swiglu_clamped":
        gate, linear = jnp.minimum(first, CLAMP), jnp.clip(parts[1], -CLAMP, CLAMP)
        return gate * jax.nn.sigmoid(SIGMOID_SLOPE * gate) * (linear + 1.0)
    hidden = _ELEMENTWISE[activation](first)
    return hidden * parts[1] if len(parts) == 2 else hidden


def _gelu(x):
    # Mosaic has no erf: Abramowitz and Stegun 7.1.26, at most 1.5e-7 off.
    distance = jnp.abs(x) * math.sqrt(0.5)
    t = 1.0 / (1.0 + 0.3275911 * distance)
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    tail = 0.5 * x * series * jnp.exp(-distance * distance)
    return jnp.where(x >= 0.0, x - tail, tail)


_ELEMENTWISE = {
    "silu": lambda x: x * jax.nn.sigmoid(x),
    "gelu": _gelu,
    "gelu_tanh": lambda x: 0.5 * x * (1.0 + jnp.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x))),
    "relu": lambda x: jnp.maximum(x, 0.0),
}


def _share(block, num_items, num_sms: int):
    """How many items `block` works on, and a function from their order to the item."""
    # Items differ in height. Dealt out in turn to one persistent block an SM, some SMs would be done a tenth earlier than
    # others; so each block of the last waves has one item, and the hardware starts it where an SM has become free.
    waves = lax.div(num_items + num_sms - 1, num_sms)
    dealt = lax.min((waves - lax.min(TAIL, lax.div(waves, 4))) * num_sms, num_items)
    is_dealer, tail_item = block < num_sms, dealt + block - num_sms
    whole = lax.div(dealt, num_sms)
    has_one_more = lax.rem(block + whole, num_sms) < dealt - whole * num_sms
    count = jnp.where(is_dealer, whole + has_one_more.astype(jnp.int32), (tail_item < num_items).astype(jnp.int32))

    def item_of(i):
        # Turned by one each wave: tall and short tiles alternate, and would meet the same SMs each time.
        return jnp.where(is_dealer, i * num_sms + lax.rem(block + i, num_sms), tail_item)

    return count, item_of


def _grouped_matmul(
    rows_MI,
    weights_EGOI,
    bias_EGO,
    plan: GroupedPlan,
    finish: Callable,
    *,
    out_types,
    tile: Tile,
    num_sms: int,
    name: str,
):
    """`finish` turns the two halves of a product, `[64, half]` each, into what is stored in `out_types`.

    The halves are gate and linear part of gated experts, left and right columns otherwise. `finish` returns a list of
    blocks of columns for `out[rows, columns]` and, optionally, one number per row for `out[tile of columns, rows]`.
    """
    _, gates, width, depth = weights_EGOI.shape
    step_depth = math.gcd(depth, SWIZZLED)  # a swizzled copy wants an array whose width it divides
    column_tiles, steps = pl.cdiv(width, tile.columns), depth // step_depth
    half = tile.columns if gates == 2 else tile.columns // 2
    stages = 4 if half > ROWS else 6  # of the ring: as many as fit
    sources = [(0, 0), (1, 0)] if gates == 2 else [(0, 0), (0, half)]  # (gate, first column) of each half
    has_bias = bias_EGO is not None
    if has_bias:  # read by registers, which unlike TMA do not stop at the end of an array
        bias_EGO = jnp.pad(bias_EGO.astype(jnp.float32), ((0, 0), (0, 0), (0, column_tiles * tile.columns - width)))

    def kernel(rows_gmem, weights_gmem, expert_gmem, start_gmem, end_gmem, num_tiles_gmem, *refs, **scratch):
        bias_gmem, outs_gmem = (refs[0], refs[1:]) if has_bias else (None, refs)
        rows_smem, weights_smem, out_smem, full, empty = (
            scratch[key] for key in ("rows_smem", "weights_smem", "out_smem", "full", "empty")
        )
        warpgroup = lax.axis_index("warpgroup")
        row_tiles = num_tiles_gmem[0]
        num_items, item_of = _share(lax.axis_index("block"), row_tiles * column_tiles, num_sms)

        def place(i):
            """Tile of rows and tile of columns of this block's i-th item: bands of rows, columns, rows of the band."""
            item = item_of(i)
            band = item // (tile.band * column_tiles)
            within = item - band * (tile.band * column_tiles)
            height = lax.min(row_tiles - band * tile.band, tile.band)
            return band * tile.band + lax.rem(within, height), within // height

        def first_row(row_tile):
            # Divided and multiplied so that the compiler knows a multiple of 64: swizzled copies want that.
            return lax.div(start_gmem[row_tile], ROWS) * ROWS

        def stage(step):
            return lax.rem(step, stages)

        def produce():
            @pl.loop(0, num_items)
            def _item(i):
                row_tile, column_tile = place(i)
                expert, start = expert_gmem[row_tile], first_row(row_tile)

                @pl.loop(0, steps)
                def _step(k):
                    step = i * steps + k
                    slot = stage(step)

                    @pl.when(step >= stages)
                    def _():
                        plgpu.barrier_wait(empty.at[slot])

                    inner = pl.ds(k * step_depth, step_depth)
                    plgpu.copy_gmem_to_smem(
                        rows_gmem.at[pl.ds(start, TILE_ROWS), inner], rows_smem.at[slot], full.at[slot]
                    )
                    for index, (gate, first) in enumerate(sources):
                        plgpu.copy_gmem_to_smem(
                            weights_gmem.at[expert, gate, pl.ds(column_tile * tile.columns + first, half), inner],
                            weights_smem.at[slot, index],
                            full.at[slot],
                        )

            @pl.loop(0, lax.min(num_items * steps, stages))
            def _drain(j):  # every completion is awaited before the block may end
                plgpu.barrier_wait(empty.at[stage(lax.max(num_items * steps - stages, 0) + j)])

        def multiply(i, accs):
            rows = pl.ds(pl.multiple_of(warpgroup * ROWS, ROWS), ROWS)

            @pl.loop(0, steps)
            def _step(k):
                step = i * steps + k
                slot = stage(step)
                plgpu.barrier_wait(full.at[slot])
                for index, acc in enumerate(accs):
                    plgpu.wgmma(acc, rows_smem.at[slot, rows], weights_smem.at[slot, index].T)
                plgpu.wgmma_wait(len(accs))  # the products of the step before are done: its slot is free

                @pl.when(k > 0)
                def _():
                    plgpu.barrier_arrive(empty.at[stage(step - 1)])

            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(empty.at[stage(i * steps + steps - 1)])
            return [acc[...] for acc in accs]

        def store(blocks, row, column_tile):
            for index, block in enumerate(blocks):
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                out_smem[warpgroup] = block
                plgpu.commit_smem()
                columns = pl.ds(column_tile * tile.columns + index * half, half)
                plgpu.copy_smem_to_gmem(out_smem.at[warpgroup], outs_gmem[0].at[pl.ds(row, ROWS), columns])

        def consume():
            @pl.loop(0, num_items)
            def _item(i):
                row_tile, column_tile = place(i)
                expert, row = expert_gmem[row_tile], first_row(row_tile) + warpgroup * ROWS
                has_rows = row < end_gmem[row_tile]

                @pl.when(has_rows)
                def _():
                    parts = pl.run_scoped(lambda *accs: multiply(i, accs), *[plgpu.ACC((ROWS, half))] * 2)
                    if has_bias:
                        parts = [
                            part
                            + _across_rows(bias_gmem.at[expert, gate, pl.ds(column_tile * tile.columns + first, half)])
                            for part, (gate, first) in zip(parts, sources, strict=True)
                        ]
                    blocks, *scales = finish(parts)
                    store(blocks, row, column_tile)
                    for scale, scales_gmem in zip(scales, outs_gmem[1:], strict=True):
                        scales_gmem[column_tile, pl.ds(row, ROWS)] = scale

                @pl.when(jnp.logical_not(has_rows))
                def _keep_step():
                    @pl.loop(0, steps)
                    def _step(k):
                        slot = stage(i * steps + k)
                        plgpu.barrier_wait(full.at[slot])
                        plgpu.barrier_arrive(empty.at[slot])

            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == WARPGROUPS)
        def _():
            plgpu.set_max_registers(40, action="decrease")

            @plgpu.warp_map
            def _warp(warp):
                pl.when(warp == 0)(produce)

        @pl.when(warpgroup < WARPGROUPS)
        def _():
            plgpu.set_max_registers(232, action="increase")
            consume()

    def _across_rows(bias_gmem):
        bias = plgpu.load(bias_gmem, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
        return lax.broadcast_in_dim(bias, (ROWS, half), (1,))

    dtype = rows_MI.dtype
    return plgpu.kernel(
        kernel,
        out_type=out_types,
        grid=((1 + TAIL) * num_sms,),
        grid_names=("block",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name=name,
        scratch_types=dict(
            rows_smem=plgpu.SMEM((stages, TILE_ROWS, step_depth), dtype),
            weights_smem=plgpu.SMEM((stages, 2, half, step_depth), dtype),
            out_smem=plgpu.SMEM((WARPGROUPS, ROWS, half), out_types[0].dtype),
            full=plgpu.Barrier(num_arrivals=3, num_barriers=stages),
            empty=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(
        rows_MI, weights_EGOI, plan.expert_X, plan.start_X, plan.end_X, plan.num_tiles_1,
        *([bias_EGO] if has_bias else []),
    )  # fmt: skip
