"""Dense projections of up to 64 rows on Hopper, in one launch: weights stream from memory once.

64 rows of a weight are `wgmma`'s A operand, the tokens its N (8 to 64). A block has one such tile, or a part of its
columns: few long tiles are shared by the blocks of a cluster, which send their sums to the cluster's first block; it adds
them in a fixed order.

The norm in front costs no pass over the input: the scale of a token commutes with the product. Tokens are multiplied by
the norm's weight on their way into `wgmma`, their squares summed up beside it, and the products scaled at the end.
"""

from __future__ import annotations

import dataclasses
import functools
import types
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
LEAST_STAGES = 3  # two took up to 16 % longer than more of shorter steps (measured)
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
    out_dtype=None,
    settings: dict[str, Any] | None = None,
) -> tuple[jax.Array, ...]:
    device = dispatch.current_device()
    if settings is None:
        key = shape_key(weights, out_dtype)
        settings = tuning.lookup(f"matvec.{NAME}", key, x_TI.shape[0], tile=padded_tokens)
    if settings is None:
        settings = default_settings(x_TI, weights, num_sms=device.num_sms, out_dtype=out_dtype)
    return _matvec(
        x_TI,
        weights,
        norm_weight_I,
        bias_O,
        residual_TO,
        activation=activation,
        out_dtype=jnp.dtype(out_dtype or x_TI.dtype),
        norm_epsilon=norm_epsilon,
        # The interpreter has no access to the shared memory of other blocks.
        parts=1 if device.is_interpreted else settings["parts"],
        depth=settings["depth"],
        stages=settings["stages"],
    )


@functools.partial(jax.jit, static_argnames=("activation", "out_dtype", "norm_epsilon", "parts", "depth", "stages"))
def _matvec(x_TI, weights, norm_weight_I, biases, residual_TO, *, activation, **static) -> tuple[jax.Array, ...]:
    num_tokens, width = x_TI.shape
    tokens = padded_tokens(num_tokens)
    if num_tokens > 8 and num_tokens % 8:  # copies fill up fewer than 8 rows, or a multiple of 8, with zeros
        x_TI = jnp.pad(x_TI, ((0, tokens - num_tokens), (0, 0)))
        if residual_TO is not None:
            residual_TO = jnp.pad(residual_TO, ((0, tokens - num_tokens), (0, 0)))
    if residual_TO is not None and residual_TO.shape[1] % ROWS:  # as the results: swizzled copies want whole tiles
        residual_TO = jnp.pad(residual_TO, ((0, 0), (0, -residual_TO.shape[1] % ROWS)))
    optional = dict(norm_weight=norm_weight_I, residual=residual_TO)
    if biases is not None:
        optional |= {f"bias{n}": bias_O for n, bias_O in enumerate(biases)}
    sizes = _Sizes(
        tokens=tokens,
        width=width,
        tiles=tuple(pl.cdiv(weight.shape[-2], ROWS) for weight in weights),
        pieces=1 if activation is None else weights[0].shape[0],
        activation=activation,
        has_norm=norm_weight_I is not None,
        has_bias=biases is not None,
        has_residual=residual_TO is not None,
        **static,
    )
    optional = {name: array for name, array in optional.items() if array is not None}
    results = _launch(x_TI, weights, optional, sizes)
    return tuple(y_TO[:num_tokens, : weight.shape[-2]] for y_TO, weight in zip(results, weights, strict=True))


def _launch(x_TI, weights, optional: dict[str, jax.Array], sizes: _Sizes):
    arrays = dict(x=x_TI, **optional, **{f"weight{n}": weight for n, weight in enumerate(weights)})
    outputs = {
        f"y{n}": jax.ShapeDtypeStruct((x_TI.shape[0], count * ROWS), sizes.out_dtype)
        for n, count in enumerate(sizes.tiles)
    }

    def kernel(*refs, **scratch):
        gmem = dict(zip((*arrays, *outputs), refs, strict=True))
        _Block(sizes, types.SimpleNamespace(**gmem), types.SimpleNamespace(**scratch)).run()

    cluster: dict[str, Any] = {}
    if sizes.parts > 1:
        cluster = dict(cluster=(sizes.parts,), cluster_names=("part",))
    return plgpu.kernel(
        kernel,
        out_type=tuple(outputs.values()),
        grid=(sum(sizes.tiles),),
        grid_names=("tile",),
        num_threads=2,
        thread_name="warpgroup",
        kernel_name="matvec",
        scratch_types=_scratch(sizes, x_TI.dtype, optional),
        compiler_params=COMPILER,
        **cluster,
    )(*arrays.values())


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """What the kernel is compiled for.

    tokens: of a tile. width: of the input. tiles: of 64 rows, in each weight. pieces: products of a tile, two with a gate.
    parts: blocks that share a tile's columns. depth: columns of a step. stages: slots of the ring.
    """

    tokens: int
    width: int
    tiles: tuple[int, ...]
    pieces: int
    activation: str | None
    has_norm: bool
    has_bias: bool
    has_residual: bool
    out_dtype: Any
    norm_epsilon: float
    parts: int
    depth: int
    stages: int

    @property
    def steps(self) -> int:
        """Of a tile."""
        return pl.cdiv(self.width, self.depth)

    @property
    def num_sums(self) -> int:
        """What a block sums up: products, and beside a norm the squares."""
        return self.pieces + self.has_norm

    @property
    def num_addends(self) -> int:
        return self.has_bias + self.has_residual


def _scratch(sizes: _Sizes, dtype, optional: dict[str, jax.Array]) -> dict[str, Any]:
    stages, tokens = sizes.stages, sizes.tokens
    scratch: dict[str, Any] = dict(
        weights_smem=plgpu.SMEM((stages, sizes.pieces, ROWS, sizes.depth), dtype),
        tokens_smem=plgpu.SMEM((stages, tokens, sizes.depth), dtype),
        out_smem=plgpu.SMEM((tokens, ROWS), sizes.out_dtype),
        full=plgpu.Barrier(num_arrivals=sizes.num_sums + 1, num_barriers=stages),
        empty=plgpu.Barrier(num_barriers=stages),
    )
    if sizes.has_norm:
        scratch["norm_smem"] = plgpu.SMEM((stages, sizes.depth), optional["norm_weight"].dtype)
        scratch["squares_smem"] = plgpu.SMEM((tokens,), jnp.float32)
    if sizes.has_residual:
        scratch["residual_smem"] = plgpu.SMEM((tokens, ROWS), optional["residual"].dtype)
    if sizes.has_bias:
        scratch["bias_smem"] = plgpu.SMEM((ROWS,), optional["bias0"].dtype)
    if sizes.num_addends:
        scratch["addends_full"] = plgpu.Barrier(num_arrivals=sizes.num_addends)
    if sizes.parts > 1:
        others = sizes.parts - 1
        scratch["parts_smem"] = plgpu.SMEM((others, sizes.num_sums, ROWS, tokens), jnp.float32)
        scratch["parts_full"] = plgpu.Barrier(num_arrivals=others * sizes.num_sums)
    return scratch


class _Block:
    """One block's part of a tile: a warp that streams weights and tokens, a warpgroup that multiplies and finishes."""

    def __init__(self, sizes: _Sizes, gmem, scratch):
        self.sizes, self.gmem, self.scratch = sizes, gmem, scratch
        self.tile = lax.axis_index("tile")
        self.part = lax.axis_index("part") if sizes.parts > 1 else 0
        self.first_step = sizes.steps * self.part // sizes.parts
        self.count = sizes.steps * (self.part + 1) // sizes.parts - self.first_step

    def run(self) -> None:
        on_producer_warp(lambda: self.for_my_weight(self.stream), warpgroup=1)
        pl.when(lax.axis_index("warpgroup") == 0)(self.compute)

    def compute(self) -> None:
        sizes = self.sizes
        if sizes.num_addends:
            pl.when(self.part == 0)(lambda: self.for_my_weight(self.load_addends))
        sums = pl.run_scoped(self.multiply, *[plgpu.ACC((ROWS, sizes.tokens))] * sizes.pieces)
        if sizes.parts == 1:
            self.finish(sums)
        else:
            pl.when(self.part > 0)(lambda: self.send(sums))
            pl.when(self.part == 0)(lambda: self.finish(self.add_others(sums)))

    def for_my_weight(self, body) -> None:
        """Calls `body(n, row)` with the weight that the tile belongs to, and the tile's first row in it."""
        tile, tiles = self.tile, self.sizes.tiles
        for n in range(len(tiles)):
            first = sum(tiles[:n])

            @pl.when((tile >= first) & (tile < first + tiles[n]))
            def _(n=n, first=first):
                body(n, (tile - first) * ROWS)

    def stream(self, n: int, row) -> None:
        sizes, gmem, scratch = self.sizes, self.gmem, self.scratch
        weight_gmem = getattr(gmem, f"weight{n}")

        def load(j):
            slot, columns = lax.rem(j, sizes.stages), pl.ds((self.first_step + j) * sizes.depth, sizes.depth)
            full = scratch.full.at[slot]
            for piece in range(sizes.pieces):
                matrix_gmem = weight_gmem if sizes.activation is None else weight_gmem.at[piece]
                tile_gmem = matrix_gmem.at[pl.ds(row, ROWS), columns]
                plgpu.copy_gmem_to_smem(tile_gmem, scratch.weights_smem.at[slot, piece], full)
            tokens_gmem = gmem.x.at[_whole(sizes.tokens), columns]
            plgpu.copy_gmem_to_smem(tokens_gmem, scratch.tokens_smem.at[slot], full)
            if sizes.has_norm:
                plgpu.copy_gmem_to_smem(gmem.norm_weight.at[columns], scratch.norm_smem.at[slot], full)

        fill_ring(self.count, sizes.stages, scratch.empty, load)

    def load_addends(self, n: int, row) -> None:
        """Starts to load what `finish` adds to the products."""
        gmem, scratch, rows = self.gmem, self.scratch, pl.ds(row, ROWS)
        if self.sizes.has_bias:
            bias_gmem = getattr(gmem, f"bias{n}").at[rows]
            plgpu.copy_gmem_to_smem(bias_gmem, scratch.bias_smem, scratch.addends_full)
        if self.sizes.has_residual:
            residual_gmem = gmem.residual.at[_whole(self.sizes.tokens), rows]
            plgpu.copy_gmem_to_smem(residual_gmem, scratch.residual_smem, scratch.addends_full)

    # Multiplying this block's columns.

    def multiply(self, *accs):
        """The products, `[64, T]` each, and with a norm the tokens' squares for every row."""
        sizes, scratch = self.sizes, self.scratch

        def step(j, squares_CT=None):
            slot = lax.rem(j, sizes.stages)
            plgpu.barrier_wait(scratch.full.at[slot])
            if sizes.has_norm:
                squares_CT = self.weigh_tokens(slot, squares_CT)
            for piece, acc in enumerate(accs):
                plgpu.wgmma(acc, scratch.weights_smem.at[slot, piece], scratch.tokens_smem.at[slot].T)
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(scratch.empty.at[slot])
            return squares_CT

        if not sizes.has_norm:
            pl.loop(0, self.count)(step)
            return [acc[...] for acc in accs]
        zeros_CT = plgpu.layout_cast(jnp.zeros((CHUNK, sizes.tokens), jnp.float32), plgpu.Layout.WGMMA_TRANSPOSED)
        squares_CT = lax.fori_loop(0, self.count, step, zeros_CT)
        return [*(acc[...] for acc in accs), self.sum_for_every_row(squares_CT)]

    def weigh_tokens(self, slot, squares_CT):
        """Multiplies the slot's columns of the tokens by the norm's weight, in place, and adds their squares."""
        tokens_smem = self.scratch.tokens_smem
        for chunk in range(self.sizes.depth // CHUNK):
            columns = pl.ds(chunk * CHUNK, CHUNK)
            x_smem = tokens_smem.at[slot, :, columns].T
            x_CT = plgpu.load(x_smem, layout=plgpu.Layout.WGMMA_TRANSPOSED).astype(jnp.float32)
            norm_smem = self.scratch.norm_smem.at[slot, columns]
            weight_C = plgpu.load(norm_smem, layout=plgpu.Layout.WGMMA_TRANSPOSED.reduce(1)).astype(jnp.float32)
            weighted_CT = x_CT * lax.broadcast_in_dim(weight_C, x_CT.shape, (0,))
            x_smem[...] = weighted_CT.astype(tokens_smem.dtype)
            squares_CT = squares_CT + x_CT * x_CT
        plgpu.commit_smem()
        return squares_CT

    def sum_for_every_row(self, squares_CT):
        """The sums over columns, as the products are laid out in registers."""
        squares_smem = self.scratch.squares_smem
        squares_smem[...] = jnp.sum(squares_CT, axis=0)
        plgpu.commit_smem()
        sums_T = plgpu.load(squares_smem, layout=plgpu.Layout.WGMMA.reduce(0))
        return plgpu.layout_cast(lax.broadcast_in_dim(sums_T, (ROWS, self.sizes.tokens), (1,)), plgpu.Layout.WGMMA)

    # Between the blocks of a cluster.

    def send(self, sums) -> None:
        """To the first block."""
        for n, total in enumerate(sums):
            plgpu.async_store_smem(
                total,
                self.scratch.parts_smem.at[self.part - 1, n],
                self.scratch.parts_full,
                cluster_idx=jnp.int32(0),
                cluster_dim="part",
                optimized=False,
            )

    def add_others(self, sums):
        plgpu.barrier_wait(self.scratch.parts_full)
        for other in range(self.sizes.parts - 1):
            theirs_smem = [self.scratch.parts_smem.at[other, n] for n in range(self.sizes.num_sums)]
            theirs = [plgpu.load(smem, layout=plgpu.Layout.WGMMA, optimized=False) for smem in theirs_smem]
            sums = [total + their for total, their in zip(sums, theirs, strict=True)]
        return sums

    # From the sums to the result.

    def finish(self, sums) -> None:
        sizes, out_smem = self.sizes, self.scratch.out_smem
        products = self.normalised(sums) if sizes.has_norm else sums
        y_RT = products[0] if sizes.activation is None else activate(products, sizes.activation)
        if sizes.num_addends:
            y_RT = self.plus_addends(y_RT)
        store_transposed(y_RT.astype(out_smem.dtype), out_smem)
        plgpu.commit_smem()
        self.for_my_weight(self.store)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def normalised(self, sums):
        """The products, scaled by the norm of the tokens that went into them."""
        *products, squares_RT = sums
        scale_RT = lax.rsqrt(squares_RT * (1.0 / self.sizes.width) + self.sizes.norm_epsilon)
        return [product * scale_RT for product in products]

    def plus_addends(self, y_RT):
        plgpu.barrier_wait(self.scratch.addends_full)
        if self.sizes.has_bias:
            y_RT = add_to_rows(y_RT, self.scratch.bias_smem)
        if self.sizes.has_residual:
            residual_RT = plgpu.load(self.scratch.residual_smem.T, layout=plgpu.Layout.WGMMA_TRANSPOSED)
            y_RT = y_RT + plgpu.layout_cast(residual_RT, plgpu.Layout.WGMMA).astype(jnp.float32)
        return y_RT

    def store(self, n: int, row) -> None:
        y_gmem = getattr(self.gmem, f"y{n}").at[_whole(self.sizes.tokens), pl.ds(row, ROWS)]
        plgpu.copy_smem_to_gmem(self.scratch.out_smem, y_gmem)


def _whole(tokens: int):
    """The token tile of an array with perhaps fewer tokens: copies fill with zeros what is missing, or leave it out."""
    return pl.ds(lax.axis_index("warpgroup") * 0, tokens)


def default_settings(x_TI, weights, *, num_sms: int, out_dtype=None) -> dict[str, int]:
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
    return _settings(x_TI, weights, parts=parts, depth=DEPTH, num_sms=num_sms, out_dtype=out_dtype)


def _settings(x_TI, weights, *, parts: int, depth: int, num_sms: int, out_dtype) -> dict[str, int]:
    """With a ring that fills a block's share of shared memory, if there is use for it; shorter steps where few would fit."""
    tokens, gates = padded_tokens(x_TI.shape[0]), _gates(weights)
    resident = min(MOST_RESIDENT, pl.cdiv(_num_tiles(weights) * parts, num_sms))
    result_bytes = tokens * ROWS * (jnp.dtype(out_dtype or x_TI.dtype).itemsize + x_TI.dtype.itemsize)  # and a residual
    share_bytes = SHARED_MEMORY_BYTES // resident - _sums_bytes(x_TI, weights, parts) - result_bytes - (4 << 10)
    row_bytes = 2 * (gates * ROWS + tokens + 2)  # of a column of a slot
    while depth > SWIZZLED and LEAST_STAGES * depth * row_bytes > share_bytes:
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


def candidates(x_TI, weights, *, out_dtype=None, **arguments) -> list[dict[str, int]]:
    """Settings worth trying, the default first."""
    num_sms = dispatch.current_device().num_sms
    default = default_settings(x_TI, weights, num_sms=num_sms, out_dtype=out_dtype)
    others = [
        _settings(x_TI, weights, parts=parts, depth=depth, num_sms=num_sms, out_dtype=out_dtype)
        for depth in (64, 128, 256)
        for parts in (1, 2, 4, 8)
        if parts * depth <= x_TI.shape[1] and _sums_bytes(x_TI, weights, parts) <= SHARED_MEMORY_BYTES // 4
    ]
    return [default, *(other for other in others if other != default)]


def shape_key(weights, out_dtype=None) -> str:
    gates = f" G{weights[0].shape[0]}" if weights[0].ndim == 3 else ""
    out = "" if out_dtype is None else f" {jnp.dtype(out_dtype)}"
    return f"I{weights[0].shape[-1]} O{'+'.join(str(weight.shape[-2]) for weight in weights)}{gates}{out}"


def _supports(device: dispatch.Device, x_TI, weights, *, bias_O=None, **arguments) -> str | None:
    if not device.is_hopper:
        return f"it needs a Hopper GPU, and this is {device.kind}"
    for name, array in (("x_TI", x_TI), *(("a weight", weight) for weight in weights)):
        if array.dtype != jnp.bfloat16:
            return f"it multiplies bfloat16, and {name} is {array.dtype}"
    if x_TI.shape[1] % SWIZZLED:
        return f"it reads {SWIZZLED} columns at a time, and x_TI has {x_TI.shape[1]}"
    outs = [weight.shape[-2] for weight in weights]
    grain = 8 if bias_O is None else 16  # rows that are swizzled together; numbers of a copy
    if any(out % grain for out in outs):
        return f"it computes multiples of {grain} columns, and the weights have {', '.join(map(str, outs))}"
    if x_TI.shape[0] > MOST_TOKENS:
        return f"it keeps all rows in one tile: at most {MOST_TOKENS}, got {x_TI.shape[0]}"
    return None


IMPLEMENTATION = dispatch.Implementation(NAME, supports=_supports, run=matvec, candidates=candidates)
