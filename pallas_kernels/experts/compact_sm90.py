"""The expert layer for tens to hundreds of tokens on Hopper: an expert's few tokens against its weights, read once.

Choices are sorted by expert as in `grouped`. There tokens are `wgmma`'s A operand, 64 rows at least; here the weights are,
and an expert's tokens are N: 8, 16, 32, 64 or 128 columns, as many as it has. So memory streams weights and little else.
Each launch is persistent, and the second starts to load weights while the first still runs.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable
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
    sizes = _Sizes(
        gates=gates,
        width=width,
        inner=inner,
        weights=weights,
        has_bias=bias_EGO is not None,
        finish=finish,
        tile=tile,
        most_tokens=most_tokens,
        num_sms=num_sms,
        is_interpreted=is_interpreted,
        is_second=is_second,
    )
    arrays = dict(
        rows=rows_MI,
        expert=plan.expert_X,
        start=plan.start_X,
        size=plan.size_X,
        num_tiles=plan.num_tiles_1,
        weights=weights.stack_XRI,
    )
    if bias_EGO is not None:
        arrays["bias"] = bias_EGO

    def kernel(*refs, **scratch):
        gmem = dict(zip((*arrays, "out"), refs, strict=True))
        _Block(sizes, types.SimpleNamespace(**gmem), types.SimpleNamespace(**scratch)).run()

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((rows_MI.shape[0], width), dtype),
        grid=(num_sms,),
        grid_names=("block",),
        num_threads=2,
        thread_name="warpgroup",
        kernel_name="experts_compact_down" if is_second else "experts_compact_up",
        scratch_types=_scratch(sizes, arrays, dtype),
        compiler_params=COMPILER,
    )(*arrays.values())


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """What a launch is compiled for. An item of its work is a tile of tokens and a tile of weights."""

    gates: int
    width: int
    inner: int
    weights: WeightTiles
    has_bias: bool
    finish: Callable
    tile: Tile
    most_tokens: int
    num_sms: int
    is_interpreted: bool
    is_second: bool

    @property
    def steps(self) -> int:
        """Of one item."""
        return pl.cdiv(self.inner, self.tile.depth)

    @property
    def weight_tiles(self) -> int:
        return pl.cdiv(self.width, self.weights.rows)

    @property
    def token_tiles(self) -> list[int]:
        return [tokens for tokens in TOKEN_TILES if tokens <= self.most_tokens]


def _scratch(sizes: _Sizes, arrays: dict[str, jax.Array], dtype) -> dict[str, Any]:
    stages, depth, weights = sizes.tile.stages, sizes.tile.depth, sizes.weights
    scratch = dict(
        rows_smem=plgpu.SMEM((stages, sizes.most_tokens, depth), arrays["rows"].dtype),
        weights_smem=plgpu.SMEM((stages, PIECES, ROWS, depth), arrays["weights"].dtype),
        out_smem=plgpu.SMEM((weights.rows // ROWS, sizes.most_tokens, ROWS), dtype),
        full=plgpu.Barrier(num_arrivals=2 if weights.follow else 1 + PIECES, num_barriers=stages),
        empty=plgpu.Barrier(num_barriers=stages),
    )
    if sizes.has_bias:
        scratch["bias_smem"] = plgpu.SMEM((PIECES, ROWS), arrays["bias"].dtype)
        scratch["bias_full"] = plgpu.Barrier(num_arrivals=PIECES)
    return scratch


class _Block:
    """One block's items: a warp that streams weights and tokens, a warpgroup that multiplies and stores."""

    def __init__(self, sizes: _Sizes, gmem, scratch):
        self.sizes, self.gmem, self.scratch = sizes, gmem, scratch
        self.block = lax.axis_index("block")

    def run(self) -> None:
        sizes = self.sizes
        if not sizes.is_second:
            wait_for_previous_launch(sizes.is_interpreted)
            let_next_launch_start(sizes.is_interpreted)
        num_items = self.gmem.num_tiles[0] * sizes.weight_tiles
        my_items = pl.cdiv(lax.max(num_items - self.block, 0), sizes.num_sms)
        on_producer_warp(functools.partial(self.stream, my_items), warpgroup=1)

        @pl.when(lax.axis_index("warpgroup") == 0)
        def _compute():
            pl.loop(0, my_items)(self.compute_item)
            plgpu.wait_smem_to_gmem(0)

    def item(self, i):
        """Of this block's i-th item: the tile of tokens, and the first row of weights."""
        item = self.block + i * self.sizes.num_sms
        weight_tiles = self.sizes.weight_tiles
        return item // weight_tiles, lax.rem(item, weight_tiles) * self.sizes.weights.rows

    def with_token_tile(self, size, do) -> None:
        """`do` with the smallest tile that holds `size` tokens."""
        token_tiles = self.sizes.token_tiles
        for lower, tokens in zip((0, *token_tiles), token_tiles, strict=False):
            pl.when((size > lower) & (size <= tokens))(functools.partial(do, tokens))

    # The stream of weights and tokens.

    def stream(self, my_items) -> None:
        steps, stages, is_interpreted = self.sizes.steps, self.sizes.tile.stages, self.sizes.is_interpreted
        ahead: int | jax.Array = 0
        if self.sizes.is_second:  # weights do not depend on the first launch, tokens do
            ahead = lax.min(my_items * steps, stages)
            pl.loop(0, ahead)(self.load_weights)
            wait_for_previous_launch(is_interpreted)
            pl.loop(0, ahead)(self.load_rows)
        fill_ring(my_items * steps, stages, self.scratch.empty, self.load_both, start=ahead)

    def load_both(self, j) -> None:
        self.load_weights(j)
        self.load_rows(j)

    def load_weights(self, j) -> None:
        tile_index, row, columns, slot = self.place_of(j)
        weights, slot_smem, full = self.sizes.weights, self.scratch.weights_smem.at[slot], self.scratch.full.at[slot]
        places = weights.places(self.gmem.expert[tile_index], row)
        load_pieces(self.gmem.weights, places, columns, slot_smem, full, in_one_copy=weights.follow)

    def load_rows(self, j) -> None:
        gmem, scratch = self.gmem, self.scratch
        tile_index, _, columns, slot = self.place_of(j)

        def load(tokens):
            window = gmem.rows.at[self.rows_of(tile_index, tokens), columns]
            plgpu.copy_gmem_to_smem(window, scratch.rows_smem.at[slot, pl.ds(0, tokens)], scratch.full.at[slot])

        self.with_token_tile(gmem.size[tile_index], load)

    def place_of(self, j):
        """Of load j: the tile of tokens, the first row of weights, the columns, and the slot."""
        steps, tile = self.sizes.steps, self.sizes.tile
        tile_index, row = self.item(j // steps)
        return tile_index, row, pl.ds(lax.rem(j, steps) * tile.depth, tile.depth), lax.rem(j, tile.stages)

    def rows_of(self, tile_index, tokens: int):
        # Divided and multiplied so that the compiler knows a multiple of 64: swizzled copies want that.
        return pl.ds(self.gmem.start[tile_index] // ROWS * ROWS, tokens)

    # From an item's products to its results.

    def compute_item(self, i) -> None:
        tile_index, row = self.item(i)
        if self.sizes.has_bias:
            self.load_bias(tile_index, row)
        self.with_token_tile(self.gmem.size[tile_index], functools.partial(self.compute, i, tile_index, row))

    def compute(self, i, tile_index, row, tokens: int) -> None:
        is_gated, finish = self.sizes.gates == PIECES, self.sizes.finish
        parts = self.multiply(i, tokens)
        if self.sizes.has_bias:
            parts = self.plus_bias(parts)
        results = [finish(parts)] if is_gated else [finish([part]) for part in parts]
        self.store(results, tile_index, row, tokens)

    def multiply(self, i, tokens: int):
        """Two `[64, tokens]` products."""
        scratch, steps = self.scratch, self.sizes.steps

        def loop(*accumulators):
            @pl.loop(0, steps)
            def _step(k):
                slot = lax.rem(i * steps + k, self.sizes.tile.stages)
                plgpu.barrier_wait(scratch.full.at[slot])
                tokens_smem = scratch.rows_smem.at[slot, pl.ds(0, tokens)].T
                for piece, acc in enumerate(accumulators):
                    plgpu.wgmma(acc, scratch.weights_smem.at[slot, piece], tokens_smem)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(scratch.empty.at[slot])

            return [acc[...] for acc in accumulators]

        return pl.run_scoped(loop, *[plgpu.ACC((ROWS, tokens))] * PIECES)

    def load_bias(self, tile_index, row) -> None:
        is_gated, scratch = self.sizes.gates == PIECES, self.scratch
        places = [(n, row) if is_gated else (0, row + n * ROWS) for n in range(PIECES)]
        for n, (gate, first) in enumerate(places):
            window = self.gmem.bias.at[self.gmem.expert[tile_index], gate, pl.ds(first, ROWS)]
            plgpu.copy_gmem_to_smem(window, scratch.bias_smem.at[n], scratch.bias_full)

    def plus_bias(self, parts):
        plgpu.barrier_wait(self.scratch.bias_full)
        return [add_to_rows(part, self.scratch.bias_smem.at[n]) for n, part in enumerate(parts)]

    def store(self, results, tile_index, row, tokens: int) -> None:
        out_smem = self.scratch.out_smem
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for n, result in enumerate(results):
            store_transposed(result.astype(out_smem.dtype), out_smem.at[n, pl.ds(0, tokens)])
        plgpu.commit_smem()
        rows = self.rows_of(tile_index, tokens)
        for n in range(len(results)):
            target = self.gmem.out.at[rows, pl.ds(row + n * ROWS, ROWS)]
            plgpu.copy_smem_to_gmem(out_smem.at[n, pl.ds(0, tokens)], target)


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
