"""The expert layer for tens to hundreds of tokens on Hopper: an expert's few tokens against its weights, read once.

Choices are sorted by expert as in `grouped`. There tokens are `wgmma`'s A operand, 64 rows at least; here the weights are,
and an expert's tokens are N: 8, 16, 32, 64 or 128 columns, as many as it has. So memory streams weights and little else.
Each launch is persistent, and the second starts to load weights while the first still runs.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch, tuning
from pallas_kernels.experts import grouped_plan, grouped_plan_sm90, grouped_rows_sm90
from pallas_kernels.experts.decode_sm90 import shape_key
from pallas_kernels.experts.grouped_matmul_sm90 import activate
from pallas_kernels.experts.plan import padded_tokens
from pallas_kernels.experts.reference import adding_residual
from pallas_kernels.experts.streaming_sm90 import (
    COMPILER,
    PIECES,
    ROWS,
    WeightTiles,
    add_to_rows,
    are_swizzled,
    fill_ring,
    let_next_launch_start,
    load_pieces,
    on_producer_warp,
    store_transposed,
    wait_for_previous_launch,
)
from pallas_kernels.route.api import Routing

NAME = "compact"
TOKEN_TILES = (8, 16, 32, 64, 128)
MOST_TOKENS_OF_AN_EXPERT = 40  # on average; with more, tokens load as many bytes as weights, and `grouped` does better


@dataclasses.dataclass(frozen=True)
class Tile:
    """depth: columns of a weight tile, a step of the sum. stages: of the ring."""

    depth: int
    stages: int


@adding_residual
def experts(
    x_TD,
    routing: Routing,
    up_EGFD,
    down_EDF,
    *,
    activation,
    up_bias_EGF=None,
    down_bias_ED=None,
    first_expert=0,
    settings: dict[str, Any] | None = None,
):
    device = dispatch.current_device()
    if settings is None:
        settings = tuning.lookup(f"experts.{NAME}", shape_key(routing, up_EGFD), x_TD.shape[0], tile=_token_tile)
    if settings is None:
        settings = default_settings(x_TD)
    return _experts(
        x_TD,
        routing,
        up_EGFD,
        down_EDF,
        up_bias_EGF,
        down_bias_ED,
        activation=activation,
        first_expert=first_expert,
        up_tile=Tile(settings["up_depth"], settings["up_stages"]),
        down_tile=Tile(settings["down_depth"], settings["down_stages"]),
        num_sms=device.num_sms,
        is_interpreted=device.is_interpreted,
    )


@functools.partial(
    jax.jit,
    static_argnames=("activation", "first_expert", "up_tile", "down_tile", "num_sms", "is_interpreted"),
)
def _experts(
    x_TD,
    routing: Routing,
    up_EGFD,
    down_EDF,
    up_bias_EGF,
    down_bias_ED,
    *,
    activation,
    first_expert,
    up_tile,
    down_tile,
    num_sms,
    is_interpreted,
):
    num_experts = up_EGFD.shape[0]
    most = _token_tile(len(x_TD))
    plan = grouped_plan_sm90.plan(
        routing.experts_TA,
        num_experts=num_experts,
        first_expert=first_expert,
        tile_rows=max(most, ROWS),
        places=routing.places,
    )
    num_rows = grouped_plan.num_rows(routing.experts_TA.size, num_experts)
    rows_MD = grouped_rows_sm90.spread(x_TD, plan.rows_TA, num_rows=num_rows, num_sms=num_sms)
    multiply = functools.partial(_matmul, plan=plan, most_tokens=most, num_sms=num_sms, is_interpreted=is_interpreted)
    hidden_MF = multiply(
        rows_MD,
        up_EGFD,
        up_bias_EGF,
        finish=lambda parts: activate(parts, activation),
        dtype=x_TD.dtype,
        tile=up_tile,
        is_second=False,
    )
    out_MD = multiply(
        hidden_MF,
        down_EDF[:, None],
        None if down_bias_ED is None else down_bias_ED[:, None],
        finish=lambda parts: parts[0],
        dtype=jnp.dtype("float32"),
        tile=down_tile,
        is_second=True,
    )
    return _combine(out_MD, plan.rows_TA, routing.weights_TA).astype(x_TD.dtype)


def _combine(out_MD, rows_TA, weights_TA):
    """`[T, D]`: the weighted sum of each token's rows; a row of -1 adds nothing."""
    weighted_TAD = weights_TA[:, :, None] * out_MD[jnp.maximum(rows_TA, 0)]
    return jnp.where((rows_TA >= 0)[:, :, None], weighted_TAD, 0.0).sum(axis=1)


def _matmul(
    rows_MI,
    weights_EGOI,
    bias_EGO,
    *,
    plan,
    finish,
    dtype,
    tile: Tile,
    most_tokens: int,
    num_sms: int,
    is_interpreted: bool,
    is_second: bool,
):
    """`[M, O]`: `finish` of the products of each gate, `[64, tokens]` each, for the rows of every expert."""
    _, gates, width, inner = weights_EGOI.shape
    weights = WeightTiles.of(weights_EGOI)
    rows, stages = weights.rows, tile.stages
    token_tiles = [tokens for tokens in TOKEN_TILES if tokens <= most_tokens]
    steps = pl.cdiv(inner, tile.depth)  # of one item: a tile of tokens and a tile of weights
    weight_tiles = pl.cdiv(width, rows)

    def kernel(rows_gmem, expert_gmem, start_gmem, size_gmem, num_tiles_gmem, weights_gmem, *rest, **scratch):
        *bias_gmem, out_gmem = rest
        rows_smem, weights_smem, out_smem = scratch["rows_smem"], scratch["weights_smem"], scratch["out_smem"]
        full, empty = scratch["full"], scratch["empty"]
        block = lax.axis_index("block")
        if not is_second:
            wait_for_previous_launch(is_interpreted)
            let_next_launch_start(is_interpreted)
        num_items = num_tiles_gmem[0] * weight_tiles
        my_items = pl.cdiv(lax.max(num_items - block, 0), num_sms)

        def item_of(i):
            item = block + i * num_sms
            return item // weight_tiles, lax.rem(item, weight_tiles) * rows

        def places_of_bias(row):
            return [(n, row) if gates == PIECES else (0, row + n * ROWS) for n in range(PIECES)]

        def with_token_tile(size, do) -> None:
            """`do` with the smallest tile that holds `size` tokens."""
            for lower, tokens in zip((0, *token_tiles), token_tiles, strict=False):
                pl.when((size > lower) & (size <= tokens))(functools.partial(do, tokens))

        def stream():
            def place_of(j):
                tile_index, row = item_of(j // steps)
                return tile_index, row, pl.ds(lax.rem(j, steps) * tile.depth, tile.depth), lax.rem(j, stages)

            def load_weights(j):
                tile_index, row, columns, slot = place_of(j)
                places = weights.places(expert_gmem[tile_index], row)
                slot_smem = weights_smem.at[slot]
                load_pieces(weights_gmem, places, columns, slot_smem, full.at[slot], in_one_copy=weights.follow)

            def load_rows(j):
                tile_index, _, columns, slot = place_of(j)

                def load(tokens):
                    window = rows_gmem.at[pl.ds(start_gmem[tile_index] // ROWS * ROWS, tokens), columns]
                    plgpu.copy_gmem_to_smem(window, rows_smem.at[slot, pl.ds(0, tokens)], full.at[slot])

                with_token_tile(size_gmem[tile_index], load)

            def load_both(j):
                load_weights(j)
                load_rows(j)

            ahead = 0
            if is_second:
                ahead = lax.min(my_items * steps, stages)
                pl.loop(0, ahead)(load_weights)
                wait_for_previous_launch(is_interpreted)
                pl.loop(0, ahead)(load_rows)
            fill_ring(my_items * steps, stages, empty, load_both, start=ahead)

        on_producer_warp(stream, warpgroup=1)

        def compute_item(i):
            tile_index, row = item_of(i)
            if bias_gmem:
                for n, (gate, first) in enumerate(places_of_bias(row)):
                    window = bias_gmem[0].at[expert_gmem[tile_index], gate, pl.ds(first, ROWS)]
                    plgpu.copy_gmem_to_smem(window, scratch["bias_smem"].at[n], scratch["bias_full"])

            def compute(tokens):
                def multiply(*accumulators):
                    @pl.loop(0, steps)
                    def step(k):
                        slot = lax.rem(i * steps + k, stages)
                        plgpu.barrier_wait(full.at[slot])
                        tokens_smem = rows_smem.at[slot, pl.ds(0, tokens)].T
                        for piece, acc in enumerate(accumulators):
                            plgpu.wgmma(acc, weights_smem.at[slot, piece], tokens_smem)
                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(empty.at[slot])

                    return [acc[...] for acc in accumulators]

                parts = pl.run_scoped(multiply, *[plgpu.ACC((ROWS, tokens))] * PIECES)
                if bias_gmem:
                    plgpu.barrier_wait(scratch["bias_full"])
                    parts = [add_to_rows(part, scratch["bias_smem"].at[n]) for n, part in enumerate(parts)]
                results = [finish(parts)] if gates == PIECES else [finish([part]) for part in parts]
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                for n, result in enumerate(results):
                    store_transposed(result.astype(dtype), out_smem.at[n, pl.ds(0, tokens)])
                plgpu.commit_smem()
                first_token = start_gmem[tile_index] // ROWS * ROWS
                for n in range(len(results)):
                    target = out_gmem.at[pl.ds(first_token, tokens), pl.ds(row + n * ROWS, ROWS)]
                    plgpu.copy_smem_to_gmem(out_smem.at[n, pl.ds(0, tokens)], target)

            with_token_tile(size_gmem[tile_index], compute)

        @pl.when(lax.axis_index("warpgroup") == 0)
        def compute_all():
            pl.loop(0, my_items)(compute_item)
            plgpu.wait_smem_to_gmem(0)

    scratch = dict(
        rows_smem=plgpu.SMEM((stages, most_tokens, tile.depth), rows_MI.dtype),
        weights_smem=plgpu.SMEM((stages, PIECES, ROWS, tile.depth), weights_EGOI.dtype),
        out_smem=plgpu.SMEM((rows // ROWS, most_tokens, ROWS), dtype),
        full=plgpu.Barrier(num_arrivals=2 if weights.follow else 1 + PIECES, num_barriers=stages),
        empty=plgpu.Barrier(num_barriers=stages),
    )
    operands = [rows_MI, plan.expert_X, plan.start_X, plan.size_X, plan.num_tiles_1, weights.stack_XRI]
    if bias_EGO is not None:
        operands.append(bias_EGO)
        scratch |= dict(
            bias_smem=plgpu.SMEM((PIECES, ROWS), bias_EGO.dtype), bias_full=plgpu.Barrier(num_arrivals=PIECES)
        )
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((rows_MI.shape[0], width), dtype),
        grid=(num_sms,),
        grid_names=("block",),
        num_threads=2,
        thread_name="warpgroup",
        kernel_name="experts_compact_down" if is_second else "experts_compact_up",
        scratch_types=scratch,
        compiler_params=COMPILER,
    )(*operands)


def _token_tile(num_tokens: int) -> int:
    """The most tokens of an expert that one item multiplies."""
    return min(padded_tokens(num_tokens), TOKEN_TILES[-1])


def default_settings(x_TD) -> dict[str, int]:
    """Rings that fill shared memory beside the results, which leave it in float32 the second time."""
    tokens = _token_tile(len(x_TD))
    return _settings(128 if tokens <= 64 else 64, tokens)


def _settings(depth: int, tokens: int) -> dict[str, int]:
    slot_bytes = 2 * depth * (PIECES * ROWS + tokens)
    up_bytes, down_bytes = 222 << 10, (222 << 10) - PIECES * ROWS * tokens * 4
    return dict(
        up_depth=depth,
        up_stages=(up_bytes - PIECES * ROWS * tokens * 2) // slot_bytes,
        down_depth=depth,
        down_stages=down_bytes // slot_bytes,
    )


def candidates(x_TD, routing: Routing, up_EGFD, down_EDF, **arguments) -> list[dict[str, int]]:
    """Settings worth trying, the default first."""
    default, tokens = default_settings(x_TD), _token_tile(len(x_TD))
    return [default, _settings(192 - default["up_depth"], tokens)]


def _supports(device: dispatch.Device, x_TD, routing: Routing, up_EGFD, down_EDF, **arguments) -> str | None:
    if not device.is_hopper:
        return f"it needs a Hopper GPU, and this is {device.kind}"
    dtypes = dict(x_TD=x_TD.dtype, up_EGFD=up_EGFD.dtype, down_EDF=down_EDF.dtype)
    for name, dtype in dtypes.items():
        if dtype != jnp.bfloat16:
            return f"it multiplies bfloat16, and {name} is {dtype}"
    width, model_width = up_EGFD.shape[2:]
    if not (are_swizzled(model_width) and are_swizzled(width)):
        return (
            f"it copies 64 columns at a time: widths are multiples, or 16, 32, 48; these are D={model_width}, F={width}"
        )
    if grouped_rows_sm90.box(model_width) is None:
        return f"it copies rows as rectangles of at most 256 x 256, and D={model_width} is none"
    tokens_of_an_expert = routing.experts_TA.size / routing.logits_TE.shape[1]
    if tokens_of_an_expert > MOST_TOKENS_OF_AN_EXPERT:
        return (
            f"it streams weights past a few tokens: at most {MOST_TOKENS_OF_AN_EXPERT} for each expert on average, "
            f"and here are {tokens_of_an_expert:.0f}"
        )
    return None


IMPLEMENTATION = dispatch.Implementation(NAME, supports=_supports, run=experts, candidates=candidates)
