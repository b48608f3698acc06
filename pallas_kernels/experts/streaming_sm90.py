"""What the decode and compact kernels share: weights streamed by one warp, multiplied as `wgmma`'s A operand by others.

The ring in shared memory never drains between tiles: the producer warp knows the whole sequence of loads, and runs ahead
of the multiplications by the number of slots.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 64  # of a weight tile: wgmma's M
PIECES = 2  # weight tiles in a slot of the ring: gate and linear part, or two that follow each other
COMPILER = plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True)


@dataclasses.dataclass(frozen=True)
class WeightTiles:
    """Matrices `[E, G, O, I]` as a stack `[X, rows, I]`, and where in it the two pieces of a slot are.

    `places(expert, row)`: (index in the stack, first row) of each piece. Gated: rows `row` up to `row + 64` of gate and linear
    part; not gated: rows `row` up to `row + 128`. If `follow`, the second piece is the first's successor in the stack, and one
    copy can load both.
    """

    stack_XRI: jax.Array
    places: Callable[[Any, Any], list[tuple[Any, Any]]]
    rows: int
    follow: bool

    @classmethod
    def of(cls, weights_EGOI) -> WeightTiles:
        num_experts, gates, rows, inner = weights_EGOI.shape
        if gates == PIECES:
            stack_XRI = weights_EGOI.reshape(num_experts * gates, rows, inner)
            return cls(stack_XRI, lambda expert, row: [(expert * gates + n, row) for n in range(PIECES)], ROWS, True)
        if rows % ROWS:
            stack_XRI = weights_EGOI.reshape(num_experts, rows, inner)
            both = lambda expert, row: [(expert, row + n * ROWS) for n in range(PIECES)]  # noqa: E731
            return cls(stack_XRI, both, ROWS * PIECES, False)
        tiles = rows // ROWS
        stack_XRI = weights_EGOI.reshape(num_experts * tiles, ROWS, inner)
        both = lambda expert, row: [(expert * tiles + row // ROWS + n, 0) for n in range(PIECES)]  # noqa: E731
        return cls(stack_XRI, both, ROWS * PIECES, True)


def are_swizzled(columns: int) -> bool:
    """Whether copies of up to 64 columns into swizzled memory exist for an array of this width."""
    return columns % 64 == 0 or (columns < 64 and columns % 16 == 0)


def load_pieces(stack_gmem, places, columns, slot_smem, full, *, in_one_copy: bool) -> None:
    """Starts to load both pieces of a slot."""
    if in_one_copy:
        (first, row), _ = places
        plgpu.copy_gmem_to_smem(stack_gmem.at[pl.ds(first, PIECES), pl.ds(row, ROWS), columns], slot_smem, full)
    else:
        for n, (first, row) in enumerate(places):
            plgpu.copy_gmem_to_smem(stack_gmem.at[first, pl.ds(row, ROWS), columns], slot_smem.at[n], full)


def on_producer_warp(stream, *, warpgroup: int) -> None:
    """Runs `stream` on one warp of the warpgroup."""

    @pl.when(lax.axis_index("warpgroup") == warpgroup)
    def producer():
        @plgpu.warp_map
        def warps(warp):
            pl.when(warp == 0)(stream)


def fill_ring(count, stages: int, empty, load, *, start=0) -> None:
    """Calls `load(j)` for j from `start` to `count` as slots fall empty, then waits until the last loads were consumed."""

    @pl.loop(start, count)
    def fill(j):
        @pl.when(j >= stages)
        def reuse():
            plgpu.barrier_wait(empty.at[lax.rem(j, stages)])

        load(j)

    @pl.loop(lax.max(count - stages, 0), count)
    def drain(j):
        plgpu.barrier_wait(empty.at[lax.rem(j, stages)])


def store_transposed(tile_RT, out_smem) -> None:
    out_smem.T[...] = plgpu.layout_cast(tile_RT, plgpu.Layout.WGMMA_TRANSPOSED)


def add_to_rows(tile_RT, values_smem):
    """Adds one number of `values_smem` to each row."""
    values_R = plgpu.load(values_smem, layout=plgpu.Layout.WGMMA.reduce(1)).astype(tile_RT.dtype)
    return tile_RT + lax.broadcast_in_dim(values_R, tile_RT.shape, (0,))
