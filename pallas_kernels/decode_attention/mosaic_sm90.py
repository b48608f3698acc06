"""Attention in decoding on Hopper, in one launch from the rows of the projections to the attended heads.

A block has one key/value head of one request, or a part of its positions. One warp streams tiles of 64 keys and values
through a ring in shared memory; other warpgroups take turns at them: keys are `wgmma`'s A operand and the head's queries
its N (8 or 16), so that few queries waste little, and values transposed are A of the second product. While the first tiles
are on their way, the first warpgroup normalises, clips and rotates queries and the new key.

The new token needs no place in a tile: it is one more partial result beside those of the warpgroups, which are merged in a
fixed order. With few heads, the blocks of a cluster share one, and the first of them merges. It also writes the new key and
value to the cache, last of all: other blocks may be reading the tile they go to, but mask that row.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch, tuning
from pallas_kernels.experts.streaming_sm90 import COMPILER, fill_ring, on_producer_warp

NAME = "mosaic_sm90"
POSITIONS = 64  # of a tile: wgmma's M
MOST_QUERIES = 16
WIDTHS = (32, 64, 96, 128, 192, 256)
MOST_WORKERS = 4
MOST_SPLITS = 8  # the largest portable cluster
LEAST_TILES = 4  # of a block that has only a part of the positions
MANY_BLOCKS = 4  # on a multiprocessor, one after the other: more than these have one warpgroup each
ROOM_FOR_CLUSTERS = 0.8  # of the multiprocessors
LEAST_STAGES = 2  # with one, no tile is on its way while another is read
SHARED_MEMORY_BYTES = 227 << 10
NOTHING = -1e30  # the maximum of no scores
LOG2_E = 1.4426950408889634

MATRIX = plgpu.Layout.WGMMA
BY_ROW = MATRIX.reduce(1)
BY_COLUMN = MATRIX.reduce(0)


def decode_attention(
    q_BQ,
    k_BX,
    v_BX,
    cos_BR,
    sin_BR,
    k_BKSH,
    v_BKSH,
    positions_B,
    *,
    q_norm_weight=None,
    k_norm_weight=None,
    norm_epsilon=1e-6,
    clip=None,
    window=None,
    settings: dict[str, int] | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    device = dispatch.current_device()
    if settings is None:
        key = shape_key(q_BQ, k_BKSH, q_norm_weight=q_norm_weight, window=window)
        # As many blocks as are good for 8 requests may be too many for 16.
        settings = tuning.lookup(f"decode_attention.{NAME}", key, len(q_BQ), tile=int.bit_length)
    if settings is None:
        settings = default_settings(
            q_BQ, k_BKSH, window=window, norms_whole=_norms_whole(q_norm_weight, k_BKSH), num_sms=device.num_sms
        )
    # Always the same worker waits for a slot: each counts the slot's phases by its own waits.
    assert settings["stages"] % settings["workers"] == 0, settings
    return _decode_attention(
        q_BQ,
        k_BX,
        v_BX,
        cos_BR,
        sin_BR,
        k_BKSH,
        v_BKSH,
        positions_B,
        q_norm_weight,
        k_norm_weight,
        norm_epsilon=norm_epsilon,
        clip=clip,
        window=window,
        # The interpreter has no access to the shared memory of other blocks.
        splits=1 if device.is_interpreted else settings["splits"],
        workers=settings["workers"],
        stages=settings["stages"],
    )


@functools.partial(jax.jit, static_argnames=("norm_epsilon", "clip", "window", "splits", "workers", "stages"))
def _decode_attention(
    q_BQ, k_BX, v_BX, cos_BR, sin_BR, k_BKSH, v_BKSH, positions_B, q_norm_weight, k_norm_weight, **static
):
    B, K, S, H = k_BKSH.shape
    weights = () if q_norm_weight is None else (q_norm_weight, k_norm_weight)
    if weights and weights[0].size > H:
        weights = tuple(weight.reshape(-1, H) for weight in weights)
    pack = _pack(H)
    k_ref, v_ref = (jax.new_ref(each.reshape(B * K, S // pack, pack * H)) for each in (k_BKSH, v_BKSH))
    rows = [each.reshape(-1, H) for each in (q_BQ, k_BX, v_BX)]
    out_XH = _launch(*rows, cos_BR, sin_BR, positions_B.astype(jnp.int32), k_ref, v_ref, weights, kv_heads=K, **static)
    return out_XH.reshape(q_BQ.shape), *(jax.freeze(ref).reshape(k_BKSH.shape) for ref in (k_ref, v_ref))


def _launch(q_XH, k_XH, v_XH, cos_BR, sin_BR, positions_B, k_ref, v_ref, weights, *, kv_heads, **static):
    batch, width = positions_B.shape[0], q_XH.shape[1]
    arrays = dict(q=q_XH, k=k_XH, v=v_XH, cos=cos_BR, sin=sin_BR, positions=positions_B, k_cache=k_ref, v_cache=v_ref)
    if weights:
        arrays["q_weight"], arrays["k_weight"] = weights
    sizes = _Sizes(
        batch=batch,
        kv_heads=kv_heads,
        group=q_XH.shape[0] // (batch * kv_heads),
        width=width,
        capacity=k_ref.shape[1] * _pack(width),
        norm=None if not weights else "head" if weights[0].ndim == 1 else "projection",
        dtype=q_XH.dtype,
        **static,
    )

    def kernel(*refs, **scratch):
        gmem = dict(zip((*arrays, "out"), refs, strict=True))
        _Block(sizes, types.SimpleNamespace(**gmem), types.SimpleNamespace(**scratch)).run()

    cluster: dict[str, Any] = {}
    if sizes.splits > 1:
        cluster = dict(cluster=(sizes.splits,), cluster_names=("split",))
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(q_XH.shape, sizes.dtype),
        grid=(batch * kv_heads,),
        grid_names=("head",),
        num_threads=sizes.workers + 1,
        thread_name="warpgroup",
        kernel_name="decode_attention",
        scratch_types=_scratch(sizes, weights),
        compiler_params=COMPILER,
        **cluster,
    )(*arrays.values())


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """What the kernel is compiled for.

    group: query heads of a key/value head. capacity: positions in the cache. norm: over a head of queries or keys, or over
    the whole projection. splits: blocks that share a key/value head. workers: warpgroups of a block that attend. stages:
    slots of the ring.
    """

    batch: int
    kv_heads: int
    group: int
    width: int
    capacity: int
    norm: Literal["head", "projection"] | None
    dtype: Any
    norm_epsilon: float
    clip: float | None
    window: int | None
    splits: int
    workers: int
    stages: int

    @property
    def half(self) -> int:
        return self.width // 2

    @property
    def pack(self) -> int:
        return _pack(self.width)

    @property
    def query_heads(self) -> int:
        """Of one request."""
        return self.kv_heads * self.group

    @property
    def queries(self) -> int:
        """A key/value head's, padded."""
        return pl.cdiv(self.group, 8) * 8

    @property
    def chunks(self) -> int:
        """Tiles of 64 columns in a row of the cache."""
        return self.pack * self.width // POSITIONS

    @property
    def tile_shape(self) -> tuple[int, int]:
        """Of each array of a partial result: 64 columns of the cache's rows, for each query."""
        return POSITIONS, self.queries

    @property
    def num_arrays(self) -> int:
        """Of a partial result: maxima and sums of exponentials, the same in all rows, and attended values in chunks."""
        return 2 + self.chunks


def _scratch(sizes: _Sizes, weights) -> dict[str, Any]:
    width, half, pack, dtype = sizes.width, sizes.half, sizes.pack, sizes.dtype
    queries, workers, stages = sizes.queries, sizes.workers, sizes.stages
    scratch: dict[str, Any] = dict(
        k_smem=plgpu.SMEM((stages, POSITIONS, pack * width), dtype),
        v_tiles_smem=plgpu.SMEM((stages, POSITIONS, pack * width), dtype),
        q_rows_smem=plgpu.SMEM((queries, width), dtype),
        k_raw_smem=plgpu.SMEM((width,), dtype),
        k_rows_smem=plgpu.SMEM((queries, width), dtype),
        v_smem=plgpu.SMEM((pack * width,), dtype),
        cos_smem=plgpu.SMEM((half,), jnp.float32),
        sin_smem=plgpu.SMEM((half,), jnp.float32),
        q_smem=plgpu.SMEM((queries, width), dtype),
        p_smem=plgpu.SMEM((workers, pack, queries, POSITIONS), dtype),
        s_smem=plgpu.SMEM((workers, pack, queries, POSITIONS), jnp.float32),
        m_smem=plgpu.SMEM((workers * queries,), jnp.float32),
        l_smem=plgpu.SMEM((workers * queries,), jnp.float32),
        scores_smem=plgpu.SMEM((queries,), jnp.float32),
        out_smem=plgpu.SMEM((queries, width), dtype),
        rows_full=plgpu.Barrier(num_arrivals=5 + len(weights) * (2 if sizes.norm == "projection" else 1)),
        q_ready=plgpu.Barrier(),
        k_full=plgpu.Barrier(num_barriers=stages),
        v_full=plgpu.Barrier(num_barriers=stages),
        empty=plgpu.Barrier(num_barriers=stages),
    )
    if pack > 1:
        scratch["places_smem"] = plgpu.SMEM((queries, pack * width), jnp.float32)
    if sizes.norm is not None:
        q_weight, k_weight = weights
        is_whole = sizes.norm == "projection"
        scratch["q_weight_smem"] = plgpu.SMEM((queries, width) if is_whole else (width,), q_weight.dtype)
        scratch["k_weight_smem"] = plgpu.SMEM((width,), k_weight.dtype)
    if sizes.norm == "projection":
        scratch["all_q_smem"] = plgpu.SMEM((sizes.query_heads, width), dtype)
        scratch["all_k_smem"] = plgpu.SMEM((sizes.kv_heads, width), dtype)
    for name, others in (("workers", workers - 1), ("splits", sizes.splits - 1)):
        if others:
            scratch[f"{name}_smem"] = plgpu.SMEM((others, sizes.num_arrays, *sizes.tile_shape), jnp.float32)
    if workers > 1:
        scratch["workers_full"] = plgpu.Barrier(num_arrivals=workers - 1)
    if sizes.splits > 1:
        scratch["splits_full"] = plgpu.Barrier(num_arrivals=sizes.num_arrays * (sizes.splits - 1))
    return scratch


class _Block:
    """One block's part of a head: a warp that streams tiles, warpgroups that attend to them, and the first that finishes."""

    def __init__(self, sizes: _Sizes, gmem, scratch):
        self.sizes, self.gmem, self.scratch = sizes, gmem, scratch
        self.head = lax.axis_index("head")
        self.split = lax.axis_index("split") if sizes.splits > 1 else 0
        self.worker = lax.axis_index("warpgroup")
        self.request = self.head // sizes.kv_heads
        self.kv_head = lax.rem(self.head, sizes.kv_heads)
        # Mosaic tiles an array in shared memory by as many rows as its copies go by, and swizzles tiles of fewer than 8 rows
        # wrongly (seen on an H200). Where it cannot tell that a slice begins with a tile, it leaves the array as it is.
        self.unknown_zero = self.head // (sizes.batch * sizes.kv_heads)
        self.plain_halves = [pl.ds(self.unknown_zero + n * sizes.half, sizes.half) for n in range(2)]

    def run(self) -> None:
        workers = self.sizes.workers
        on_producer_warp(self.stream, warpgroup=workers)
        if workers > 1:
            pl.when((self.worker > 0) & (self.worker < workers))(self.help)
        pl.when(self.worker == 0)(self.lead)

    def help(self) -> None:
        for n, each in enumerate(_Worker(self).attend_all()):
            self.scratch.workers_smem.at[self.worker - 1, n][...] = each
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.scratch.workers_full)

    def lead(self) -> None:
        self.prepare()
        parts = [_Worker(self).attend_all()]
        workers, splits = self.sizes.workers, self.sizes.splits
        if workers > 1:
            parts += self.load_parts("workers", workers - 1)
        if splits == 1:
            self.finish([*parts, self.new_token()])
        else:
            pl.when(self.split > 0)(lambda: self.send(_merged(parts)))
            pl.when(self.split == 0)(
                lambda: self.finish([_merged(parts), *self.load_parts("splits", splits - 1), self.new_token()])
            )

    # What is read.

    def span(self):
        """(first position that this block may see, first one that is not in the cache, tiles from, to)."""
        sizes, positions = self.sizes, POSITIONS * self.sizes.pack
        new = lax.min(self.gmem.positions[self.request], sizes.capacity)
        oldest = 0 if sizes.window is None else lax.max(new - sizes.window + 1, 0)
        first_tile = oldest // positions
        all_tiles = lax.max(pl.cdiv(new, positions) - first_tile, 0)
        return oldest, new, *(first_tile + all_tiles * n // sizes.splits for n in (self.split, self.split + 1))

    def tile_of(self, cache_gmem, tile):
        """Where a tile of the head's positions is: the one place to change for pages."""
        return cache_gmem.at[self.head, pl.ds(tile * POSITIONS, POSITIONS)]

    def stream(self) -> None:
        self.load_rows()
        _, _, begin, end = self.span()
        gmem, scratch, stages = self.gmem, self.scratch, self.sizes.stages

        def load(j):
            slot = lax.rem(j, stages)
            k_tile, v_tile = scratch.k_smem.at[slot], scratch.v_tiles_smem.at[slot]
            plgpu.copy_gmem_to_smem(self.tile_of(gmem.k_cache, begin + j), k_tile, scratch.k_full.at[slot])
            plgpu.copy_gmem_to_smem(self.tile_of(gmem.v_cache, begin + j), v_tile, scratch.v_full.at[slot])

        fill_ring(end - begin, stages, scratch.empty, load)

    def load_rows(self) -> None:
        """Starts to load what `prepare` needs."""
        sizes, gmem, scratch = self.sizes, self.gmem, self.scratch
        self.load_row(gmem.q.at[pl.ds(self.head * sizes.group, sizes.queries)], scratch.q_rows_smem)
        self.load_row(gmem.k.at[self.head], scratch.k_raw_smem)
        self.load_row(gmem.v.at[self.head], scratch.v_smem.at[pl.ds(0, sizes.width)])
        self.load_row(gmem.cos.at[self.request], scratch.cos_smem)
        self.load_row(gmem.sin.at[self.request], scratch.sin_smem)
        if sizes.norm == "head":
            self.load_row(gmem.q_weight, scratch.q_weight_smem)
            self.load_row(gmem.k_weight, scratch.k_weight_smem)
        elif sizes.norm == "projection":
            q_weight_gmem = gmem.q_weight.at[pl.ds(self.kv_head * sizes.group, sizes.queries)]
            self.load_row(q_weight_gmem, scratch.q_weight_smem)
            self.load_row(gmem.k_weight.at[self.kv_head], scratch.k_weight_smem)
            all_q_gmem = gmem.q.at[pl.ds(self.request * sizes.query_heads, sizes.query_heads)]
            self.load_row(all_q_gmem, scratch.all_q_smem)
            all_k_gmem = gmem.k.at[pl.ds(self.request * sizes.kv_heads, sizes.kv_heads)]
            self.load_row(all_k_gmem, scratch.all_k_smem)

    def load_row(self, row_gmem, row_smem) -> None:
        plgpu.copy_gmem_to_smem(row_gmem, row_smem, self.scratch.rows_full)

    # The queries and the new key: norm, clip and rotation.

    def prepare(self) -> None:
        """Queries into `wgmma`'s operand; the new key and its scores into shared memory."""
        scratch = self.scratch
        plgpu.barrier_wait(scratch.rows_full)
        q_values = self.rotated(self.halves_of(scratch.q_rows_smem), "q")
        self.store_rows(q_values, scratch.q_rows_smem)
        plgpu.commit_smem()
        layout = _rows_layout(self.sizes.width)
        scratch.q_smem[...] = plgpu.load(scratch.q_rows_smem, layout=layout, optimized=False)
        plgpu.commit_smem()
        plgpu.barrier_arrive(scratch.q_ready)
        k_values = self.rotated(self.halves_of(scratch.k_raw_smem), "k")
        self.store_rows(k_values, scratch.k_rows_smem)
        scratch.scores_smem[...] = sum(jnp.sum(q * k, axis=1) for q, k in zip(q_values, k_values, strict=True))
        plgpu.commit_smem()

    def rotated(self, values, name: str):
        """Halves of rows after norm, clip and rotation."""
        sizes, scratch = self.sizes, self.scratch
        if sizes.norm is not None:
            values = self.normalised(values, name)
        if sizes.clip is not None:
            values = self.rounded(jnp.clip(each, -sizes.clip, sizes.clip) for each in values)
        first, second = values
        layout = _rows_layout(sizes.half).reduce(0)
        tables = [plgpu.load(each, layout=layout, optimized=False) for each in (scratch.cos_smem, scratch.sin_smem)]
        cos, sin = (_to_rows(each, sizes.queries) for each in tables)
        return self.rounded([first * cos - second * sin, second * cos + first * sin])

    def normalised(self, values, name: str):
        sizes = self.sizes
        if sizes.norm == "projection":
            scale = lax.rsqrt(_mean_square(getattr(self.scratch, f"all_{name}_smem")) + sizes.norm_epsilon)
        else:
            squares = sum(jnp.sum(each * each, axis=1) for each in values)
            scale = lax.rsqrt(squares * (1.0 / sizes.width) + sizes.norm_epsilon)
            scale = lax.broadcast_in_dim(scale, values[0].shape, (0,))
        factors = self.halves_of(getattr(self.scratch, f"{name}_weight_smem"))
        return self.rounded(each * scale * factor for each, factor in zip(values, factors, strict=True))

    def rounded(self, values):
        """Wherever the definition has an array of the dtype."""
        return [each.astype(self.sizes.dtype).astype(jnp.float32) for each in values]

    def halves_of(self, rows_smem):
        """The two halves of each row, in float32; of a single row as often as there are queries."""
        half, is_single = self.sizes.half, len(rows_smem.shape) == 1
        layout = _rows_layout(half)
        if is_single:
            layout, slices = layout.reduce(0), [rows_smem.at[pl.ds(n * half, half)] for n in range(2)]
        else:
            slices = [rows_smem.at[:, each] for each in self.plain_halves]
        loaded = [plgpu.load(each, layout=layout, optimized=False).astype(jnp.float32) for each in slices]
        return [_to_rows(each, self.sizes.queries) for each in loaded] if is_single else loaded

    def store_rows(self, values, rows_smem) -> None:
        for each, columns in zip(values, self.plain_halves, strict=True):
            rows_smem.at[:, columns][...] = each.astype(self.sizes.dtype)

    # Partial results from elsewhere, and what becomes of them all.

    def new_token(self):
        """The partial result of the new position, which no tile holds."""
        sizes, shape = self.sizes, self.sizes.tile_shape
        scores = plgpu.load(self.scratch.scores_smem, layout=BY_COLUMN, optimized=False)
        values = []
        rows = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=MATRIX)
        for n in range(sizes.chunks):
            v_smem = self.scratch.v_smem.at[pl.ds(n * POSITIONS, POSITIONS)]
            value = plgpu.load(v_smem, layout=BY_ROW, optimized=False).astype(jnp.float32)
            if sizes.clip is not None:
                (value,) = self.rounded([jnp.clip(value, -sizes.clip, sizes.clip)])
                v_smem[...] = value.astype(sizes.dtype)
            value = plgpu.layout_cast(lax.broadcast_in_dim(value, shape, (0,)), MATRIX)
            values.append(value if sizes.pack == 1 else jnp.where(rows + n * POSITIONS < sizes.width, value, 0.0))
        ones = _zeros(*shape) + 1.0
        return _to_rows(scores, POSITIONS) * (LOG2_E * sizes.width**-0.5), ones, *values

    def load_parts(self, name: str, count: int):
        """What the other workers have stored, or the other blocks sent."""
        plgpu.barrier_wait(getattr(self.scratch, f"{name}_full"))
        parts_smem = getattr(self.scratch, f"{name}_smem")
        refs = [[parts_smem.at[part, n] for n in range(self.sizes.num_arrays)] for part in range(count)]
        return [[plgpu.load(ref, layout=MATRIX, optimized=False) for ref in part] for part in refs]

    def send(self, part) -> None:
        """To the first block of the cluster."""
        for n, each in enumerate(part):
            plgpu.async_store_smem(
                each,
                self.scratch.splits_smem.at[self.split - 1, n],
                self.scratch.splits_full,
                cluster_idx=jnp.int32(0),
                cluster_dim="split",
                optimized=False,
            )

    def finish(self, parts) -> None:
        """The attended heads out, then the new key and value into the cache."""
        _, l, *values = _merged(parts)
        self.store_heads(l, values)
        plgpu.commit_smem()
        gmem, scratch, group = self.gmem, self.scratch, self.sizes.group
        out_gmem = gmem.out.at[pl.ds(self.head * group, group)]
        plgpu.copy_smem_to_gmem(scratch.out_smem.at[pl.ds(0, group)], out_gmem)
        width, pack, position = self.sizes.width, self.sizes.pack, gmem.positions.at[self.request]
        row, columns = position[...] // pack, pl.ds(lax.rem(position[...], pack) * width, width)
        k_row_gmem, v_row_gmem = (cache.at[self.head, pl.ds(row, 1), columns] for cache in (gmem.k_cache, gmem.v_cache))
        plgpu.copy_smem_to_gmem(scratch.k_rows_smem.at[pl.ds(0, 1)], k_row_gmem)
        plgpu.copy_smem_to_gmem(scratch.v_smem.at[pl.ds(0, width)], v_row_gmem.at[0])
        plgpu.wait_smem_to_gmem(0)

    def store_heads(self, l, values) -> None:
        """Values over their sums of exponentials, with heads as rows; those of each place in a row of the cache added up."""
        width, pack, out_smem = self.sizes.width, self.sizes.pack, self.scratch.out_smem
        sums_smem = out_smem if pack == 1 else self.scratch.places_smem
        for n, value in enumerate(values):
            chunk = pl.ds(self.unknown_zero + n * POSITIONS, POSITIONS)
            out = (value / l).astype(sums_smem.dtype)
            sums_smem.at[:, chunk].T[...] = plgpu.layout_cast(out, plgpu.Layout.WGMMA_TRANSPOSED)
        if pack > 1:
            plgpu.commit_smem()
            places = [sums_smem.at[:, pl.ds(n * width, width)] for n in range(pack)]
            loaded = [plgpu.load(each, layout=_rows_layout(width), optimized=False) for each in places]
            row = pl.ds(self.unknown_zero, width)
            out_smem.at[:, row][...] = functools.reduce(jnp.add, loaded).astype(self.sizes.dtype)


class _Worker:
    """One warpgroup's turns at its block's tiles."""

    def __init__(self, block: _Block):
        sizes, scratch, worker = block.sizes, block.scratch, block.worker
        self.sizes, self.scratch, self.worker = sizes, scratch, worker
        self.oldest, self.new, self.begin, self.end = block.span()
        self.scores_layout = _rows_layout(POSITIONS)
        scores_shape = (sizes.queries, POSITIONS)
        self.columns = plgpu.broadcasted_iota(jnp.int32, scores_shape, 1, layout=self.scores_layout)
        self.rows = plgpu.broadcasted_iota(jnp.int32, sizes.tile_shape, 0, layout=MATRIX)
        # One array for the positions at each place in their rows of the cache.
        self.p_smems = [scratch.p_smem.at[worker, place] for place in range(sizes.pack)]
        self.s_smems = [scratch.s_smem.at[worker, place] for place in range(sizes.pack)]
        self.m_smem, self.l_smem = (
            smem.at[pl.ds(worker * sizes.queries, sizes.queries)] for smem in (scratch.m_smem, scratch.l_smem)
        )

    def attend_all(self):
        """The partial result of this worker's tiles."""
        sizes = self.sizes
        nothing = _zeros(sizes.queries, layout=self.scores_layout.reduce(1))
        values = [_zeros(*sizes.tile_shape)] * sizes.chunks
        plgpu.barrier_wait(self.scratch.q_ready)
        count = (self.end - self.begin - self.worker + sizes.workers - 1) // sizes.workers
        m, l, *values = lax.fori_loop(0, count, self.attend, (nothing + NOTHING, nothing, *values))
        plgpu.commit_smem()  # no warp still reads what it kept in the last turn
        self.m_smem[...] = m
        self.l_smem[...] = l
        plgpu.commit_smem()
        stats = [plgpu.load(each, layout=BY_COLUMN, optimized=False) for each in (self.m_smem, self.l_smem)]
        return *(_to_rows(each, POSITIONS) for each in stats), *values

    def attend(self, j, part):
        """The partial result with one more tile."""
        m, l, *values = part
        turn = j * self.sizes.workers + self.worker
        slot = lax.rem(turn, self.sizes.stages)
        plgpu.barrier_wait(self.scratch.k_full.at[slot])
        self.store_scores(slot)
        scores = self.load_scores(self.begin + turn)
        new_m = functools.reduce(jnp.maximum, [m, *(jnp.max(each, axis=1) for each in scores)])
        kept = jnp.exp2(m - new_m)
        p = [jnp.exp2(each - lax.broadcast_in_dim(new_m, each.shape, (0,))) for each in scores]
        for p_smem, each in zip(self.p_smems, p, strict=True):
            p_smem[...] = each.astype(self.sizes.dtype)
        self.m_smem[...] = kept
        plgpu.commit_smem()
        kept_C = plgpu.load(self.m_smem, layout=BY_COLUMN, optimized=False)
        plgpu.barrier_wait(self.scratch.v_full.at[slot])
        added = [self.attended(slot, chunk) for chunk in range(self.sizes.chunks)]
        plgpu.barrier_arrive(self.scratch.empty.at[slot])
        l = functools.reduce(jnp.add, [l * kept, *(jnp.sum(each, axis=1) for each in p)])
        kept_RC = _to_rows(kept_C, POSITIONS)
        return new_m, l, *(o * kept_RC + more for o, more in zip(values, added, strict=True))

    def store_scores(self, slot) -> None:
        """One product for the positions at each place in their rows of the cache, transposed on their way."""
        k_smem, width = self.scratch.k_smem.at[slot], self.sizes.width
        for place, s_smem in enumerate(self.s_smems):
            keys_smem = k_smem if self.sizes.pack == 1 else k_smem.at[:, pl.ds(place * width, width)]
            scores = _product(keys_smem, self.scratch.q_smem.T, self.sizes.tile_shape)
            s_smem.T[...] = plgpu.layout_cast(scores, plgpu.Layout.WGMMA_TRANSPOSED)
        plgpu.commit_smem()

    def load_scores(self, tile):
        """A query in half a warp: maxima need no exchange between warps, for which Mosaic has one place in all."""
        scores = []
        for place, s_smem in enumerate(self.s_smems):
            position = (self.columns + tile * POSITIONS) * self.sizes.pack + place
            is_visible = position < self.new
            if self.sizes.window is not None:
                is_visible = is_visible & (position >= self.oldest)
            loaded = plgpu.load(s_smem, layout=self.scores_layout, optimized=False)
            scores.append(jnp.where(is_visible, loaded * (LOG2_E * self.sizes.width**-0.5), NOTHING))
        return scores

    def attended(self, slot, chunk: int):
        """Values of 64 columns of the cache's rows, each times the probabilities of its place."""
        first, width = chunk * POSITIONS, self.sizes.width
        v_smem, result = self.scratch.v_tiles_smem.at[slot, :, pl.ds(first, POSITIONS)], None
        for place in range(first // width, (first + POSITIONS - 1) // width + 1):
            product = _product(v_smem.T, self.p_smems[place].T, self.sizes.tile_shape)
            is_before = self.rows + first < place * width
            result = product if result is None else jnp.where(is_before, result, product)
        return result


def _pack(width: int) -> int:
    """Positions in a row of the cache as the kernel sees it: `wgmma` wants 64 columns of values at a time."""
    return math.lcm(width, POSITIONS) // width


def _rows_layout(columns: int):
    """A row in half a warp, eight rows in a warpgroup."""
    vector = next(size for size in (8, 4, 2, 1) if columns % (16 * size) == 0)
    tiling = plgpu.Tiling(((8, 16 * vector), (2, 16 * vector), (vector,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


def _product(a_smem, b_smem, shape):
    def multiply(acc):
        plgpu.wgmma(acc, a_smem, b_smem)
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC(shape))


def _mean_square(all_smem):
    size = math.prod(all_smem.shape)
    layout = plgpu.Layout.WG_STRIDED(all_smem.shape, vec_size=min(8, size // 128))
    values = plgpu.load(all_smem, layout=layout, optimized=False).astype(jnp.float32)
    return jnp.sum(values * values) * (1.0 / size)


def _zeros(*shape: int, layout=MATRIX):
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)


def _to_rows(values_C, rows: int):
    return lax.broadcast_in_dim(values_C, (rows, values_C.shape[0]), (1,))


def _merged(parts):
    """The partial result of the positions of all parts together."""
    most = functools.reduce(jnp.maximum, [part[0] for part in parts])
    weighted = [[each * jnp.exp2(part[0] - most) for each in part[1:]] for part in parts]
    return most, *(functools.reduce(jnp.add, arrays) for arrays in zip(*weighted, strict=True))


def default_settings(q_BQ, k_BKSH, *, window: int | None, norms_whole: bool, num_sms: int) -> dict[str, int]:
    """As many blocks as find room at once, if each keeps a ring of two tiles or more beside partial results.

    On an H200, 8 x 4095 positions took 22.2 us with three blocks for a head of qwen3, 30.4 with four; 11.5 and 20.9 with two
    and four at tinymistral. Clusters lie within groups of multiprocessors, some of which have fewer: of three blocks and more,
    not as many find room as there are multiprocessors.
    """
    heads, tiles = k_BKSH.shape[0] * k_BKSH.shape[1], _most_tiles(k_BKSH, window)

    def settings(splits: int) -> dict[str, int]:
        blocks = heads * splits
        resident = 2 if blocks > num_sms else 1
        workers = 1 if blocks > MANY_BLOCKS * num_sms else MOST_WORKERS // resident
        return _settings(
            q_BQ, k_BKSH, tiles, norms_whole=norms_whole, splits=splits, resident=resident, most_workers=workers
        )

    def fits(splits: int) -> bool:
        room = num_sms if splits <= 2 else num_sms * ROOM_FOR_CLUSTERS
        is_long_enough = splits * LEAST_TILES <= tiles
        return heads * splits <= room and is_long_enough and settings(splits)["stages"] >= LEAST_STAGES

    return settings(next((splits for splits in range(MOST_SPLITS, 1, -1) if fits(splits)), 1))


def _settings(
    q_BQ, k_BKSH, tiles: int, *, norms_whole: bool, splits: int, resident: int, most_workers: int
) -> dict[str, int]:
    """With a ring that fills a block's share of shared memory, if there is use for it."""
    kv_heads, width = k_BKSH.shape[1], k_BKSH.shape[3]
    my_tiles = pl.cdiv(tiles, splits)
    workers = min(most_workers, my_tiles)
    queries, packed = pl.cdiv(q_BQ.shape[1], kv_heads * width * 8) * 8, _pack(width) * width
    parts_bytes = (workers + splits - 2) * (packed + 2 * POSITIONS) * queries * 4
    rows_bytes = queries * (8 * packed + 6 * workers * POSITIONS * _pack(width)) + 16 * width
    whole_bytes = 2 * (q_BQ.shape[1] + kv_heads * width) if norms_whole else 0
    share_bytes = SHARED_MEMORY_BYTES // resident - parts_bytes - rows_bytes - whole_bytes - (8 << 10)
    stages = max(1, min(my_tiles, share_bytes // (4 * POSITIONS * packed)))
    workers = min(workers, stages)
    return dict(splits=splits, workers=workers, stages=stages // workers * workers)


def candidates(q_BQ, k_BX, v_BX, cos_BR, sin_BR, k_BKSH, v_BKSH, positions_B, **arguments) -> list[dict[str, int]]:
    """Settings worth trying, the default first: from one wave of large blocks to several small ones on a multiprocessor."""
    window = arguments.get("window")
    norms_whole = _norms_whole(arguments.get("q_norm_weight"), k_BKSH)
    num_sms, tiles = dispatch.current_device().num_sms, _most_tiles(k_BKSH, window)
    default = default_settings(q_BQ, k_BKSH, window=window, norms_whole=norms_whole, num_sms=num_sms)
    offered = [
        _settings(
            q_BQ, k_BKSH, tiles, norms_whole=norms_whole, splits=splits, resident=resident, most_workers=most_workers
        )
        for splits in range(1, min(MOST_SPLITS, tiles) + 1)
        for resident, most_workers in ((1, 4), (1, 2), (2, 2), (2, 1), (3, 1))
    ]
    useful = [each for each in offered if each["stages"] >= LEAST_STAGES]
    return [default, *(each for each in useful if each != default)]


def shape_key(q_BQ, k_BKSH, *, q_norm_weight=None, window: int | None = None) -> str:
    """Heads, and the capacity of the cache rounded down to a power of two: "N32 K4 H128 S4096 norm"."""
    _, kv_heads, capacity, width = k_BKSH.shape
    norm = "" if q_norm_weight is None else " whole norm" if _norms_whole(q_norm_weight, k_BKSH) else " norm"
    seen = "" if window is None else f" W{window}"
    power = 1 << (capacity.bit_length() - 1)
    return f"N{q_BQ.shape[1] // width} K{kv_heads} H{width} S{power}{seen}{norm}"


def _norms_whole(q_norm_weight, k_BKSH) -> bool:
    """Whether a norm is over the whole projection, not over each head."""
    return q_norm_weight is not None and q_norm_weight.size > k_BKSH.shape[3]


def _most_tiles(k_BKSH, window: int | None) -> int:
    """Tiles of a head's positions that a step reads, at most."""
    capacity, rows = k_BKSH.shape[2], POSITIONS * _pack(k_BKSH.shape[3])
    return pl.cdiv(capacity if window is None else min(capacity, window + rows), rows)


def _supports(
    device: dispatch.Device, q_BQ, k_BX, v_BX, cos_BR, sin_BR, k_BKSH, v_BKSH, positions_B, **arguments
) -> str | None:
    if not device.is_hopper:
        return f"it needs a Hopper GPU, and this is {device.kind}"
    for name, array in dict(q_BQ=q_BQ, k_BX=k_BX, v_BX=v_BX, k_BKSH=k_BKSH, v_BKSH=v_BKSH).items():
        if array.dtype != jnp.bfloat16:
            return f"it multiplies bfloat16, and {name} is {array.dtype}"
    _, kv_heads, capacity, width = k_BKSH.shape
    if width not in WIDTHS:
        return f"its heads are {', '.join(map(str, WIDTHS))} wide, and these {width}"
    group = q_BQ.shape[1] // (kv_heads * width)
    if group > MOST_QUERIES:
        return f"it keeps up to {MOST_QUERIES} query heads of a key/value head in a tile, and there are {group}"
    if capacity % (8 * _pack(width)):
        multiple = 8 * _pack(width)
        return f"it reads the cache by {multiple} positions, and there are {capacity}"
    return None


IMPLEMENTATION = dispatch.Implementation(NAME, supports=_supports, run=decode_attention, candidates=candidates)
