"""Moves rows between token order and expert order, on Hopper at the speed of the memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

WARPS = 4  # of the block that spreads rows, each with its own ring
RING_BYTES = 16 * 1024  # of each of them
MOST_AT_ONCE = 16  # loads of one thread between turns of its loop: lowering takes 1 s, with 64 between 9 and 32 s
LARGEST_BARRIER = 32  # slots of one array of barriers
LARGEST_BOX = 256  # elements of one dimension of a TMA copy


def box(model_width: int) -> tuple[int, int] | None:
    """A row as a rectangle that one TMA copy takes, both sides at most 256, the inner one a multiple of 8; None if
    none is.

    Example: 2880 is (12, 240).
    """
    for inner in range(LARGEST_BOX, 0, -8):
        if model_width % inner == 0:
            return (model_width // inner, inner) if model_width // inner <= LARGEST_BOX else None
    return None


def spread(x_TD: jax.Array, rows_TA: jax.Array, *, num_rows: int, num_sms: int) -> jax.Array:
    """`[num_rows, D]` with `x_TD[t]` at each of the rows `rows_TA[t]` that are not -1; other rows stay undefined.

    Every row of `x_TD` is read once and written once for each of its choices.
    """
    num_tokens, model_width = x_TD.shape
    active = rows_TA.shape[1]
    rectangle = box(model_width)
    assert rectangle is not None  # `supports` has seen to it
    slots = min(max(2, RING_BYTES // (model_width * x_TD.dtype.itemsize)), LARGEST_BARRIER // WARPS)
    blocks = num_sms
    workers = blocks * WARPS

    def kernel(x_gmem, rows_gmem, out_gmem, x_smem, full):
        @plgpu.warp_map
        def _warp(warp):
            worker = lax.axis_index("block") * WARPS + warp
            num_mine = lax.max((num_tokens - worker + workers - 1) // workers, 0)

            def load(i):
                slot = lax.rem(i, slots)
                ring = warp * slots + slot
                plgpu.copy_gmem_to_smem(x_gmem.at[worker + i * workers], x_smem.at[ring], full.at[ring])

            pl.loop(0, lax.min(num_mine, slots - 1))(load)

            @pl.loop(0, num_mine)
            def _token(i):
                ring = warp * slots + lax.rem(i, slots)
                rows = [rows_gmem[worker + i * workers, a] for a in range(active)]
                plgpu.barrier_wait(full.at[ring])
                for row in rows:

                    @pl.when(row >= 0)
                    def _(row=row):
                        plgpu.copy_smem_to_gmem(x_smem.at[ring], out_gmem.at[row], commit_group=False)

                plgpu.commit_smem_to_gmem_group()

                @pl.when(i + slots - 1 < num_mine)
                def _():
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the slot of the token before has been read
                    load(i + slots - 1)

            plgpu.wait_smem_to_gmem(0)

    out = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((num_rows, *rectangle), x_TD.dtype),
        grid=(blocks,),
        grid_names=("block",),
        kernel_name="spread_rows",
        scratch_types=dict(
            x_smem=plgpu.SMEM((WARPS * slots, *rectangle), x_TD.dtype),
            full=plgpu.Barrier(num_barriers=WARPS * slots),
        ),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )(x_TD.reshape(num_tokens, *rectangle), rows_TA)
    return out.reshape(num_rows, model_width)


def combine(values_MD: jax.Array, scales_NM: jax.Array, rows_TA, weights_TA, *, model_width: int, dtype) -> jax.Array:
    """`[T, model_width]`: the sum over a token's rows of weight * scale * value, in float32, in order of choice.

    One block for each token; a row of -1 adds nothing.
    """
    num_tokens, active = rows_TA.shape
    num_tiles = scales_NM.shape[0]
    columns = values_MD.shape[1] // num_tiles
    at_once = max(n for n in range(1, num_tiles + 1) if num_tiles % n == 0 and (n == 1 or n * active <= MOST_AT_ONCE))

    def kernel(values_gmem, scales_gmem, rows_gmem, weights_gmem, out_gmem, out_smem):
        token = lax.axis_index("token")
        rows = [rows_gmem[token, a] for a in range(active)]
        weights = [weights_gmem[token, a] for a in range(active)]

        def sum_tile(tile):
            total = jnp.zeros((columns,), jnp.float32)
            for row, weight in zip(rows, weights, strict=True):
                there = lax.max(row, 0)
                value = values_gmem[there, pl.ds(tile * columns, columns)].astype(jnp.float32)
                factor = jnp.full((columns,), weight * scales_gmem[tile, there])
                # Selected after the product: a row that was never written may hold anything.
                total = total + jnp.where(jnp.full((columns,), row >= 0), factor * value, 0.0)
            out_smem[pl.ds(tile * columns, columns)] = total.astype(dtype)

        @pl.loop(0, num_tiles, step=at_once)
        def _sum_tiles(first):
            for n in range(at_once):
                sum_tile(first + n)

        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(0, model_width)], out_gmem.at[token])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((num_tokens, model_width), dtype),
        grid=(num_tokens,),
        grid_names=("token",),
        kernel_name="combine_rows",
        scratch_types=dict(out_smem=plgpu.SMEM((num_tiles * columns,), dtype)),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(values_MD, scales_NM, rows_TA, weights_TA)
