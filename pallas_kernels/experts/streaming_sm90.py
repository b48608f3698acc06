"""What the decode and compact kernels share: weights streamed by one warp, multiplied as `wgmma`'s A operand by others.

The ring in shared memory never drains between tiles: the producer warp knows the whole sequence of loads, and runs ahead
of the multiplications by the number of slots.
"""

from __future__ import annotations

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 64  # of a weight tile: wgmma's M
COMPILER = plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True)


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


def wait_for_previous_launch(is_interpreted: bool) -> None:
    """In a kernel that was launched early: waits until the one before has ended and its results are visible."""
    if not is_interpreted:
        plgpu.griddepcontrol_wait()


def let_next_launch_start(is_interpreted: bool) -> None:
    """Lets the next kernel's blocks onto multiprocessors that have room, if it calls `wait_for_previous_launch`.

    Call it after waiting oneself: the next kernel may then read whatever was ready before this one, weights for example.
    """
    if not is_interpreted:
        plgpu.griddepcontrol_launch_dependents()
