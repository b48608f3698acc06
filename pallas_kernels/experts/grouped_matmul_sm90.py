"""Grouped matrix multiplication on Hopper: tiles of rows sorted by expert, each times its own expert's matrix, transposed.

One persistent launch. A producer warp streams tiles of rows and weights through a ring in shared memory that never drains
between work items; two warpgroups multiply in turns of 64 rows, as many as the tile has, and only keep step if there are none.
Two epilogues: `grouped_up` applies the expert's activation, `grouped_down` stores rows in float16 beside a scale.

Items are dealt out in turn, and those of the last waves go to whichever SM is free: they differ in height.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
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
RING_COLUMNS = 1536  # of 64 elements, of rows and weights in all slots together
TAIL = 3  # waves of items that blocks of their own work on, at most
SMALLEST_SCALE = 1e-30  # keeps the scale of a row of zeros invertible


@dataclasses.dataclass(frozen=True)
class Tile:
    """How the work is cut.

    rows: of a tile, at most. columns: of the output, per gate. band: tiles of rows that are multiplied by the same columns
    one after another, so that weights come from memory once and then from the L2 cache.
    """

    rows: int
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
    sizes = _Sizes(gates, width, depth, bias_EGO is not None, finish, tile, num_sms)
    arrays = dict(
        rows=rows_MI,
        weights=weights_EGOI,
        expert=plan.expert_X,
        start=plan.start_X,
        end=plan.end_X,
        num_tiles=plan.num_tiles_1,
    )
    if bias_EGO is not None:  # read by registers, which unlike TMA do not stop at the end of an array
        padding = ((0, 0), (0, 0), (0, sizes.column_tiles * tile.columns - width))
        arrays["bias"] = jnp.pad(bias_EGO.astype(jnp.float32), padding)

    def kernel(*refs, **scratch):
        gmem, outs_gmem = dict(zip(arrays, refs, strict=False)), refs[len(arrays) :]
        _Block(sizes, types.SimpleNamespace(**gmem), outs_gmem, types.SimpleNamespace(**scratch)).run()

    dtype, half, stages = rows_MI.dtype, sizes.half, sizes.stages
    return plgpu.kernel(
        kernel,
        out_type=out_types,
        grid=((1 + TAIL) * num_sms,),
        grid_names=("block",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name=name,
        scratch_types=dict(
            rows_smem=plgpu.SMEM((stages, tile.rows, sizes.step_depth), dtype),
            weights_smem=plgpu.SMEM((stages, 2 * half, sizes.step_depth), dtype),
            out_smem=plgpu.SMEM((WARPGROUPS, ROWS, half), out_types[0].dtype),
            full=plgpu.Barrier(num_arrivals=3, num_barriers=stages),
            empty=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(*arrays.values())


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """What the kernel is compiled for. An item of its work is a tile of rows and a tile of columns."""

    gates: int
    width: int
    depth: int
    has_bias: bool
    finish: Callable
    tile: Tile
    num_sms: int

    @property
    def step_depth(self) -> int:
        """A swizzled copy wants an array whose width it divides."""
        return math.gcd(self.depth, SWIZZLED)

    @property
    def steps(self) -> int:
        """Of an item."""
        return self.depth // self.step_depth

    @property
    def column_tiles(self) -> int:
        return pl.cdiv(self.width, self.tile.columns)

    @property
    def half(self) -> int:
        return self.tile.columns if self.gates == 2 else self.tile.columns // 2

    @property
    def sources(self) -> list[tuple[int, int]]:
        """(gate, first column) of each half."""
        return [(0, 0), (1, 0)] if self.gates == 2 else [(0, 0), (0, self.half)]

    @property
    def turns(self) -> int:
        """64 rows that a warpgroup multiplies at a time, at most."""
        return self.tile.rows // (WARPGROUPS * ROWS)

    @property
    def stages(self) -> int:
        """Of the ring: as many as fit."""
        return RING_COLUMNS // (self.tile.rows + 2 * self.half)


class _Block:
    """One block's items: a warp that loads rows and weights, two warpgroups that multiply 64 rows each."""

    def __init__(self, sizes: _Sizes, gmem, outs_gmem, scratch):
        self.sizes, self.gmem, self.outs_gmem, self.scratch = sizes, gmem, outs_gmem, scratch
        self.warpgroup = lax.axis_index("warpgroup")
        self.row_tiles = gmem.num_tiles[0]
        self.num_items, self.item_of = _share(
            lax.axis_index("block"), self.row_tiles * sizes.column_tiles, sizes.num_sms
        )

    def run(self) -> None:
        @pl.when(self.warpgroup == WARPGROUPS)
        def _produce():
            plgpu.set_max_registers(40, action="decrease")

            @plgpu.warp_map
            def _warp(warp):
                pl.when(warp == 0)(self.produce)

        @pl.when(self.warpgroup < WARPGROUPS)
        def _consume():
            plgpu.set_max_registers(232, action="increase")
            pl.loop(0, self.num_items)(self.consume)
            plgpu.wait_smem_to_gmem(0)

    # Where things are.

    def place(self, i):
        """Tile of rows and tile of columns of this block's i-th item: bands of rows, columns, rows of the band."""
        item, band_rows, column_tiles = self.item_of(i), self.sizes.tile.band, self.sizes.column_tiles
        band = item // (band_rows * column_tiles)
        within = item - band * (band_rows * column_tiles)
        height = lax.min(self.row_tiles - band * band_rows, band_rows)
        return band * band_rows + lax.rem(within, height), within // height

    def rows_of(self, row_tile):
        """First row of a tile, and how many times 64 rows it has."""
        first = lax.div(self.gmem.start[row_tile], ROWS)
        # Multiplied so that the compiler knows a multiple of 64: swizzled copies want that.
        return first * ROWS, lax.div(self.gmem.end[row_tile], ROWS) - first

    def columns(self, column_tile, first: int):
        """Those of a half, which begins with column `first` of the tile."""
        return pl.ds(column_tile * self.sizes.tile.columns + first, self.sizes.half)

    def slot(self, step):
        return lax.rem(step, self.sizes.stages)

    # Loading.

    def produce(self) -> None:
        sizes, empty = self.sizes, self.scratch.empty

        @pl.loop(0, self.num_items)
        def _item(i):
            row_tile, column_tile = self.place(i)
            expert, rows = self.gmem.expert[row_tile], self.rows_of(row_tile)

            @pl.loop(0, sizes.steps)
            def _step(k):
                step = i * sizes.steps + k
                slot = self.slot(step)

                @pl.when(step >= sizes.stages)
                def _reuse():
                    plgpu.barrier_wait(empty.at[slot])

                self.load(slot, expert, rows, column_tile, pl.ds(k * sizes.step_depth, sizes.step_depth))

        @pl.loop(0, lax.min(self.num_items * sizes.steps, sizes.stages))
        def _drain(j):  # every completion is awaited before the block may end
            plgpu.barrier_wait(empty.at[self.slot(lax.max(self.num_items * sizes.steps - sizes.stages, 0) + j)])

    def load(self, slot, expert, rows, column_tile, inner) -> None:
        gmem, scratch, full = self.gmem, self.scratch, self.scratch.full.at[slot]
        start, count = rows
        for n in range(1, self.sizes.tile.rows // ROWS + 1):

            @pl.when(count == n)
            def _rows(height=n * ROWS):
                window = gmem.rows.at[pl.ds(start, height), inner]
                plgpu.copy_gmem_to_smem(window, scratch.rows_smem.at[slot, pl.ds(0, height)], full)

        half = self.sizes.half
        for index, (gate, first) in enumerate(self.sizes.sources):
            window = gmem.weights.at[expert, gate, self.columns(column_tile, first), inner]
            plgpu.copy_gmem_to_smem(window, scratch.weights_smem.at[slot, pl.ds(index * half, half)], full)

    # Multiplying and storing.

    def consume(self, i) -> None:
        row_tile, column_tile = self.place(i)
        expert, (row, count) = self.gmem.expert[row_tile], self.rows_of(row_tile)
        # Warpgroups take turns: of three times 64 rows, the first has the first and the last.
        mine = lax.div(count - self.warpgroup + (WARPGROUPS - 1), WARPGROUPS)
        for turns in range(1, self.sizes.turns + 1):

            @pl.when(mine == turns)
            def _multiply(turns=turns):
                accs = [plgpu.ACC((ROWS, 2 * self.sizes.half))] * turns
                products = pl.run_scoped(lambda *accs: self.multiply(i, accs), *accs)
                for turn, product in enumerate(products):
                    parts = [product[:, : self.sizes.half], product[:, self.sizes.half :]]
                    if self.sizes.has_bias:
                        parts = self.plus_bias(parts, expert, column_tile)
                    self.store(self.sizes.finish(parts), row + self.first_of(turn), column_tile)

        pl.when(mine == 0)(lambda: self.keep_step(i))

    def first_of(self, turn: int):
        """The first of the rows, counted from the tile's, that this warpgroup multiplies in a turn."""
        return pl.multiple_of((turn * WARPGROUPS + self.warpgroup) * ROWS, ROWS)

    def multiply(self, i, accs):
        """`[64, 2 * half]` for each turn."""
        scratch, steps = self.scratch, self.sizes.steps

        @pl.loop(0, steps)
        def _step(k):
            step = i * steps + k
            slot = self.slot(step)
            plgpu.barrier_wait(scratch.full.at[slot])
            for turn, acc in enumerate(accs):
                rows_smem = scratch.rows_smem.at[slot, pl.ds(self.first_of(turn), ROWS)]
                plgpu.wgmma(acc, rows_smem, scratch.weights_smem.at[slot].T)
            plgpu.wgmma_wait(len(accs))  # the products of the step before are done: its slot is free

            @pl.when(k > 0)
            def _release():
                plgpu.barrier_arrive(scratch.empty.at[self.slot(step - 1)])

        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(scratch.empty.at[self.slot(i * steps + steps - 1)])
        return [acc[...] for acc in accs]

    def keep_step(self, i) -> None:
        """For a warpgroup that has no rows in the tile."""
        steps = self.sizes.steps

        @pl.loop(0, steps)
        def _step(k):
            slot = self.slot(i * steps + k)
            plgpu.barrier_wait(self.scratch.full.at[slot])
            plgpu.barrier_arrive(self.scratch.empty.at[slot])

    def plus_bias(self, parts, expert, column_tile):
        def across_rows(gate: int, first: int):
            bias_gmem = self.gmem.bias.at[expert, gate, self.columns(column_tile, first)]
            bias = plgpu.load(bias_gmem, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
            return lax.broadcast_in_dim(bias, (ROWS, self.sizes.half), (1,))

        return [part + across_rows(*source) for part, source in zip(parts, self.sizes.sources, strict=True)]

    def store(self, finished, row, column_tile) -> None:
        (blocks, *scales), out_smem = finished, self.scratch.out_smem
        for index, block in enumerate(blocks):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out_smem[self.warpgroup] = block
            plgpu.commit_smem()
            columns, out_gmem = self.columns(column_tile, index * self.sizes.half), self.outs_gmem[0]

            # Past the end of an array of one tile of columns, a copy would go to its beginning.
            @pl.when(columns.start < out_gmem.shape[1])
            def _copy(columns=columns, out_gmem=out_gmem):
                plgpu.copy_smem_to_gmem(out_smem.at[self.warpgroup], out_gmem.at[pl.ds(row, ROWS), columns])

        for scale, scales_gmem in zip(scales, self.outs_gmem[1:], strict=True):
            scales_gmem[column_tile, pl.ds(row, ROWS)] = scale
