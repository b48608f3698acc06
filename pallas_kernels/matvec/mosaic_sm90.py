"""Dense projections of up to 64 rows on Hopper, in one launch: weights stream from memory once.

64 rows of a weight are `wgmma`'s A operand, the tokens its N (8 to 64). A block has one such tile, or a part of its
columns: few long tiles are shared by the blocks of a cluster, which send their sums to the cluster's first block; it adds
them in a fixed order.

The norm in front costs no pass over the input: the scale of a token commutes with the product. Tokens are multiplied by
the norm's weight on their way into `wgmma`, their squares summed up beside it, and the products scaled at the end.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch, tuning
from pallas_kernels.experts.grouped_matmul_sm90 import activate
from pallas_kernels.experts.plan import padded_tokens
from pallas_kernels.experts.streaming_sm90 import (
    COMPILER,
    ROWS,
    add_to_rows,
    fill_ring,
    on_producer_warp,
    store_transposed,
)

NAME = "mosaic_sm90"
MOST_TOKENS = 64
MOST_PARTS = 8  # the largest portable cluster
MOST_RESIDENT = 3  # blocks on a multiprocessor: while one begins or ends, the others load
LEAST_STEPS = 8  # of a block: sharing a tile that is shorter costs more than it gains (measured)
DEPTH = 256  # columns of a step: 0.3 us less than with 128, at every shape (measured)
SHARED_MEMORY_BYTES = 227 << 10
SWIZZLED = 64  # columns that a swizzled copy arranges together
CHUNK = 64  # columns of the input that are scaled at a time: one tile of registers


def matvec(
    x_TI,
    weights,
    *,
    norm_weight_I=None,
    norm_epsilon=1e-6,
    bias_O=None,
    residual_TO=None,
    activation=None,
    settings: dict[str, Any] | None = None,
) -> tuple[jax.Array, ...]:
    device = dispatch.current_device()
    if settings is None:
        settings = tuning.lookup(f"matvec.{NAME}", shape_key(weights), x_TI.shape[0], tile=padded_tokens)
    if settings is None:
        settings = default_settings(x_TI, weights, num_sms=device.num_sms)
    return _matvec(
        x_TI,
        weights,
        norm_weight_I,
        bias_O,
        residual_TO,
        activation=activation,
        norm_epsilon=norm_epsilon,
        # The interpreter has no access to the shared memory of other blocks.
        parts=1 if device.is_interpreted else settings["parts"],
        depth=settings["depth"],
        stages=settings["stages"],
    )


@functools.partial(jax.jit, static_argnames=("activation", "norm_epsilon", "parts", "depth", "stages"))
def _matvec(
    x_TI, weights, norm_weight_I, biases, residual_TO, *, activation, norm_epsilon, parts, depth, stages
) -> tuple[jax.Array, ...]:
    num_tokens, width = x_TI.shape
    tokens = padded_tokens(num_tokens)
    if num_tokens > 8 and num_tokens % 8:  # copies fill up fewer than 8 rows, or a multiple of 8, with zeros
        x_TI = jnp.pad(x_TI, ((0, tokens - num_tokens), (0, 0)))
        if residual_TO is not None:
            residual_TO = jnp.pad(residual_TO, ((0, tokens - num_tokens), (0, 0)))
    if residual_TO is not None and residual_TO.shape[1] % ROWS:  # as the results: swizzled copies want whole tiles
        residual_TO = jnp.pad(residual_TO, ((0, 0), (0, -residual_TO.shape[1] % ROWS)))
    pieces = 1 if activation is None else weights[0].shape[0]
    steps, tiles = pl.cdiv(width, depth), [pl.cdiv(weight.shape[-2], ROWS) for weight in weights]
    has_norm, has_bias, has_residual = (value is not None for value in (norm_weight_I, biases, residual_TO))

    def kernel(x_gmem, *refs, weights_smem, tokens_smem, out_smem, full, empty, **scratch):
        optional_gmem = dict(zip(optional, refs[: len(optional)], strict=True))
        weight_gmems, y_gmems = refs[len(optional) :][: len(weights)], refs[-len(weights) :]
        tile, part = lax.axis_index("tile"), lax.axis_index("part") if parts > 1 else 0
        first_step, last_step = steps * part // parts, steps * (part + 1) // parts
        count = last_step - first_step

        def for_my_weight(body) -> None:
            """Calls `body(n, row)` with the weight that the tile belongs to, and the tile's first row in it."""
            for n in range(len(weights)):
                first = sum(tiles[:n])

                @pl.when((tile >= first) & (tile < first + tiles[n]))
                def _(n=n, first=first):
                    body(n, (tile - first) * ROWS)

        def stream(n, row):
            def load(j):
                slot, columns = lax.rem(j, stages), pl.ds((first_step + j) * depth, depth)
                for piece in range(pieces):
                    matrix_gmem = weight_gmems[n] if activation is None else weight_gmems[n].at[piece]
                    tile_gmem = matrix_gmem.at[pl.ds(row, ROWS), columns]
                    plgpu.copy_gmem_to_smem(tile_gmem, weights_smem.at[slot, piece], full.at[slot])
                plgpu.copy_gmem_to_smem(x_gmem.at[_whole(tokens), columns], tokens_smem.at[slot], full.at[slot])
                if has_norm:
                    norm_gmem = optional_gmem["norm_weight"].at[columns]
                    plgpu.copy_gmem_to_smem(norm_gmem, scratch["norm_smem"].at[slot], full.at[slot])

            fill_ring(count, stages, empty, load)

        on_producer_warp(lambda: for_my_weight(stream), warpgroup=1)

        def load_addends(n, row):
            rows = pl.ds(row, ROWS)
            if has_bias:
                bias_gmem = optional_gmem[f"bias{n}"].at[rows]
                plgpu.copy_gmem_to_smem(bias_gmem, scratch["bias_smem"], scratch["addends_full"])
            if has_residual:
                residual_gmem = optional_gmem["residual"].at[_whole(tokens), rows]
                plgpu.copy_gmem_to_smem(residual_gmem, scratch["residual_smem"], scratch["addends_full"])

        def multiply(*accs):
            """The products of this block's columns, `[64, T]` each, and with a norm the tokens' squares for every row."""

            def step(j, squares_CT=None):
                slot = lax.rem(j, stages)
                plgpu.barrier_wait(full.at[slot])
                if has_norm:
                    squares_CT = weigh_tokens(slot, squares_CT)
                for piece, acc in enumerate(accs):
                    plgpu.wgmma(acc, weights_smem.at[slot, piece], tokens_smem.at[slot].T)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(empty.at[slot])
                return squares_CT

            if not has_norm:
                pl.loop(0, count)(step)
                return [acc[...] for acc in accs]
            zeros_CT = plgpu.layout_cast(jnp.zeros((CHUNK, tokens), jnp.float32), plgpu.Layout.WGMMA_TRANSPOSED)
            squares_CT = lax.fori_loop(0, count, step, zeros_CT)
            return [*(acc[...] for acc in accs), sum_for_every_row(squares_CT)]

        def weigh_tokens(slot, squares_CT):
            """Multiplies the slot's columns of the tokens by the norm's weight, in place, and adds their squares."""
            for chunk in range(depth // CHUNK):
                columns = pl.ds(chunk * CHUNK, CHUNK)
                x_smem = tokens_smem.at[slot, :, columns].T
                x_CT = plgpu.load(x_smem, layout=plgpu.Layout.WGMMA_TRANSPOSED).astype(jnp.float32)
                norm_smem = scratch["norm_smem"].at[slot, columns]
                weight_C = plgpu.load(norm_smem, layout=plgpu.Layout.WGMMA_TRANSPOSED.reduce(1)).astype(jnp.float32)
                weighted_CT = x_CT * lax.broadcast_in_dim(weight_C, x_CT.shape, (0,))
                x_smem[...] = weighted_CT.astype(tokens_smem.dtype)
                squares_CT = squares_CT + x_CT * x_CT
            plgpu.commit_smem()
            return squares_CT

        def sum_for_every_row(squares_CT):
            """The sums over columns, as the products are laid out in registers."""
            scratch["squares_smem"][...] = jnp.sum(squares_CT, axis=0)
            plgpu.commit_smem()
            sums_T = plgpu.load(scratch["squares_smem"], layout=plgpu.Layout.WGMMA.reduce(0))
            return plgpu.layout_cast(lax.broadcast_in_dim(sums_T, (ROWS, tokens), (1,)), plgpu.Layout.WGMMA)

        def send(sums):
            for n, total in enumerate(sums):
                target_smem = scratch["parts_smem"].at[part - 1, n]
                plgpu.async_store_smem(
                    total,
                    target_smem,
                    scratch["parts_full"],
                    cluster_idx=jnp.int32(0),
                    cluster_dim="part",
                    optimized=False,
                )

        def add_others(sums):
            plgpu.barrier_wait(scratch["parts_full"])
            for other in range(parts - 1):
                theirs_smem = [scratch["parts_smem"].at[other, n] for n in range(num_sums)]
                theirs = [plgpu.load(smem, layout=plgpu.Layout.WGMMA, optimized=False) for smem in theirs_smem]
                sums = [total + their for total, their in zip(sums, theirs, strict=True)]
            return sums

        def finish(sums):
            y_RT = sums[0]
            if has_norm:
                *products, squares_RT = sums
                scale_RT = lax.rsqrt(squares_RT * (1.0 / width) + norm_epsilon)
                sums = [product * scale_RT for product in products]
                y_RT = sums[0]
            if activation is not None:
                y_RT = activate(sums, activation)
            if has_bias or has_residual:
                plgpu.barrier_wait(scratch["addends_full"])
            if has_bias:
                y_RT = add_to_rows(y_RT, scratch["bias_smem"])
            if has_residual:
                residual_RT = plgpu.load(scratch["residual_smem"].T, layout=plgpu.Layout.WGMMA_TRANSPOSED)
                y_RT = y_RT + plgpu.layout_cast(residual_RT, plgpu.Layout.WGMMA).astype(jnp.float32)
            store_transposed(y_RT.astype(out_smem.dtype), out_smem)
            plgpu.commit_smem()
            for_my_weight(store)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def store(n, row):
            plgpu.copy_smem_to_gmem(out_smem, y_gmems[n].at[_whole(tokens), pl.ds(row, ROWS)])

        @pl.when(lax.axis_index("warpgroup") == 0)
        def _compute():
            if has_bias or has_residual:
                pl.when(part == 0)(lambda: for_my_weight(load_addends))
            sums = pl.run_scoped(multiply, *[plgpu.ACC((ROWS, tokens))] * pieces)
            if parts == 1:
                finish(sums)
            else:
                pl.when(part > 0)(lambda: send(sums))
                pl.when(part == 0)(lambda: finish(add_others(sums)))

    dtype, num_sums = x_TI.dtype, pieces + has_norm
    scratch: dict[str, Any] = dict(
        weights_smem=plgpu.SMEM((stages, pieces, ROWS, depth), dtype),
        tokens_smem=plgpu.SMEM((stages, tokens, depth), dtype),
        out_smem=plgpu.SMEM((tokens, ROWS), dtype),
        full=plgpu.Barrier(num_arrivals=num_sums + 1, num_barriers=stages),
        empty=plgpu.Barrier(num_barriers=stages),
    )
    optional: dict[str, jax.Array] = {}
    if has_norm:
        optional["norm_weight"] = norm_weight_I
        scratch["norm_smem"] = plgpu.SMEM((stages, depth), norm_weight_I.dtype)
        scratch["squares_smem"] = plgpu.SMEM((tokens,), jnp.float32)
    if has_residual:
        optional["residual"] = residual_TO
        scratch["residual_smem"] = plgpu.SMEM((tokens, ROWS), residual_TO.dtype)
    if has_bias:
        optional |= {f"bias{n}": bias_O for n, bias_O in enumerate(biases)}
        scratch["bias_smem"] = plgpu.SMEM((ROWS,), biases[0].dtype)
    if has_bias or has_residual:
        scratch["addends_full"] = plgpu.Barrier(num_arrivals=has_bias + has_residual)
    cluster: dict[str, Any] = {}
    if parts > 1:
        cluster = dict(cluster=(parts,), cluster_names=("part",))
        scratch["parts_smem"] = plgpu.SMEM((parts - 1, num_sums, ROWS, tokens), jnp.float32)
        scratch["parts_full"] = plgpu.Barrier(num_arrivals=(parts - 1) * num_sums)
    results = plgpu.kernel(
        kernel,
        out_type=tuple(jax.ShapeDtypeStruct((x_TI.shape[0], count * ROWS), dtype) for count in tiles),
        grid=(sum(tiles),),
        grid_names=("tile",),
        num_threads=2,
        thread_name="warpgroup",
        kernel_name="matvec",
        scratch_types=scratch,
        compiler_params=COMPILER,
        **cluster,
    )(x_TI, *optional.values(), *weights)
    return tuple(y_TO[:num_tokens, : weight.shape[-2]] for y_TO, weight in zip(results, weights, strict=True))


def _whole(tokens: int):
    """The token tile of an array with perhaps fewer tokens: copies fill with zeros what is missing, or leave it out."""
    return pl.ds(lax.axis_index("warpgroup") * 0, tokens)


def default_settings(x_TI, weights, *, num_sms: int) -> dict[str, int]:
    """As many parts as there are multiprocessors for, each of a few steps."""
    parts = 1
    steps, num_tiles = pl.cdiv(x_TI.shape[1], DEPTH), _num_tiles(weights)
    while (
        2 * parts <= MOST_PARTS
        and 2 * parts * num_tiles <= num_sms
        and 2 * parts * LEAST_STEPS <= steps
        and _sums_bytes(x_TI, weights, 2 * parts) <= SHARED_MEMORY_BYTES // 4
    ):
        parts *= 2
    return _settings(x_TI, weights, parts=parts, depth=DEPTH, num_sms=num_sms)


def _settings(x_TI, weights, *, parts: int, depth: int, num_sms: int) -> dict[str, int]:
    """With a ring that fills a block's share of shared memory, if there is use for it; shorter steps where two do not fit."""
    tokens, gates = padded_tokens(x_TI.shape[0]), _gates(weights)
    resident = min(MOST_RESIDENT, pl.cdiv(_num_tiles(weights) * parts, num_sms))
    share_bytes = SHARED_MEMORY_BYTES // resident - _sums_bytes(x_TI, weights, parts) - 4 * tokens * ROWS - (4 << 10)
    row_bytes = 2 * (gates * ROWS + tokens + 2)  # of a column of a slot
    while depth > SWIZZLED and 2 * depth * row_bytes > share_bytes:
        depth //= 2
    my_steps = pl.cdiv(pl.cdiv(x_TI.shape[1], depth), parts)
    return dict(parts=parts, depth=depth, stages=max(2, min(my_steps, share_bytes // (depth * row_bytes))))


def _num_tiles(weights) -> int:
    return sum(pl.cdiv(weight.shape[-2], ROWS) for weight in weights)


def _gates(weights) -> int:
    return 1 if weights[0].ndim == 2 else weights[0].shape[0]


def _sums_bytes(x_TI, weights, parts: int) -> int:
    """What the first block of a cluster receives from the others, at most."""
    return (parts - 1) * (_gates(weights) + 1) * ROWS * padded_tokens(x_TI.shape[0]) * 4


def candidates(x_TI, weights, **arguments) -> list[dict[str, int]]:
    """Settings worth trying, the default first."""
    num_sms = dispatch.current_device().num_sms
    default = default_settings(x_TI, weights, num_sms=num_sms)
    others = [
        _settings(x_TI, weights, parts=parts, depth=depth, num_sms=num_sms)
        for depth in (64, 128, 256)
        for parts in (1, 2, 4, 8)
        if parts * depth <= x_TI.shape[1] and _sums_bytes(x_TI, weights, parts) <= SHARED_MEMORY_BYTES // 4
    ]
    return [default, *(other for other in others if other != default)]


def shape_key(weights) -> str:
    gates = f" G{weights[0].shape[0]}" if weights[0].ndim == 3 else ""
    return f"I{weights[0].shape[-1]} O{'+'.join(str(weight.shape[-2]) for weight in weights)}{gates}"


def _supports(device: dispatch.Device, x_TI, weights, **arguments) -> str | None:
    if not device.is_hopper:
        return f"it needs a Hopper GPU, and this is {device.kind}"
    for name, array in (("x_TI", x_TI), *(("a weight", weight) for weight in weights)):
        if array.dtype != jnp.bfloat16:
            return f"it multiplies bfloat16, and {name} is {array.dtype}"
    if x_TI.shape[1] % SWIZZLED:
        return f"it reads {SWIZZLED} columns at a time, and x_TI has {x_TI.shape[1]}"
    outs = [weight.shape[-2] for weight in weights]
    if any(out % 16 for out in outs):
        return f"it computes multiples of 16 columns, and the weights have {', '.join(map(str, outs))}"
    if x_TI.shape[0] > MOST_TOKENS:
        return f"it keeps all rows in one tile: at most {MOST_TOKENS}, got {x_TI.shape[0]}"
    return None


IMPLEMENTATION = dispatch.Implementation(NAME, supports=_supports, run=matvec, candidates=candidates)
