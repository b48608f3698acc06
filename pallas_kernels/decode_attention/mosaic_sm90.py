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

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch
from pallas_kernels.experts.streaming_sm90 import COMPILER, fill_ring, on_producer_warp

NAME = "mosaic_sm90"
POSITIONS = 64  # of a tile: wgmma's M
MOST_QUERIES = 16
WIDTHS = (32, 64, 96, 128, 192, 256)
MOST_WORKERS = 4
MOST_SPLITS = 8  # the largest portable cluster
LEAST_TILES = 4  # of a block that has only a part of the positions
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
        settings = default_settings(
            q_BQ,
            k_BKSH,
            window=window,
            norms_whole=q_norm_weight is not None and q_norm_weight.size > k_BKSH.shape[3],
            num_sms=device.num_sms,
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


def _launch(
    q_XH,
    k_XH,
    v_XH,
    cos_BR,
    sin_BR,
    positions_B,
    k_ref,
    v_ref,
    weights,
    *,
    kv_heads,
    norm_epsilon,
    clip,
    window,
    splits,
    workers,
    stages,
):
    width, half, dtype = q_XH.shape[1], q_XH.shape[1] // 2, q_XH.dtype
    pack = _pack(width)
    batch, capacity = positions_B.shape[0], k_ref.shape[1] * pack
    query_heads = q_XH.shape[0] // batch
    group = query_heads // kv_heads
    queries = pl.cdiv(group, 8) * 8  # a head's, padded
    norms_whole = bool(weights) and weights[0].ndim == 2
    rows_layout, halves = _rows_layout(half), [pl.ds(n * half, half) for n in range(2)]
    scores_layout = _rows_layout(POSITIONS)
    # A partial result: maxima and sums of exponentials, the same in all rows, and attended values in chunks of 64 columns.
    chunks = [pl.ds(n * POSITIONS, POSITIONS) for n in range(pack * width // POSITIONS)]
    num_arrays, tile_shape = 2 + len(chunks), (POSITIONS, queries)

    def kernel(q_gmem, k_gmem, v_gmem, cos_gmem, sin_gmem, positions_gmem, k_cache_gmem, v_cache_gmem, *rest, **smem):
        weights_gmem, out_gmem = rest[:-1], rest[-1]
        head, split = lax.axis_index("head"), lax.axis_index("split") if splits > 1 else 0
        worker = lax.axis_index("warpgroup")
        request = head // kv_heads
        kv_head = lax.rem(head, kv_heads)
        # Mosaic tiles an array in shared memory by as many rows as its copies go by, and swizzles tiles of fewer than 8 rows
        # wrongly (seen on an H200). Where it cannot tell that a slice begins with a tile, it leaves the array as it is.
        unknown_zero = head // (batch * kv_heads)
        plain_halves = [pl.ds(unknown_zero + n * half, half) for n in range(2)]
        q_rows_smem, k_rows_smem, out_smem = (smem[f"{name}_smem"] for name in ("q_rows", "k_rows", "out"))

        def span():
            """What this block reads: (first position it may see, first one that is not in the cache, tiles from, to)."""
            new = lax.min(positions_gmem[request], capacity)
            oldest = 0 if window is None else lax.max(new - window + 1, 0)
            first_tile = oldest // (POSITIONS * pack)
            all_tiles = lax.max(pl.cdiv(new, POSITIONS * pack) - first_tile, 0)
            return oldest, new, *(first_tile + all_tiles * n // splits for n in (split, split + 1))

        def tile_of(cache_gmem, tile):
            """Where a tile of the head's positions is: the one place to change for pages."""
            return cache_gmem.at[head, pl.ds(tile * POSITIONS, POSITIONS)]

        def load_rows():
            ready = smem["rows_full"]
            plgpu.copy_gmem_to_smem(q_gmem.at[pl.ds(head * group, queries)], q_rows_smem, ready)
            plgpu.copy_gmem_to_smem(k_gmem.at[head], smem["k_raw_smem"], ready)
            plgpu.copy_gmem_to_smem(v_gmem.at[head], smem["v_smem"].at[pl.ds(0, width)], ready)
            plgpu.copy_gmem_to_smem(cos_gmem.at[request], smem["cos_smem"], ready)
            plgpu.copy_gmem_to_smem(sin_gmem.at[request], smem["sin_smem"], ready)
            if weights and not norms_whole:
                for weight_gmem, name in zip(weights_gmem, ("q_weight_smem", "k_weight_smem"), strict=True):
                    plgpu.copy_gmem_to_smem(weight_gmem, smem[name], ready)
            if norms_whole:
                q_weight_gmem, k_weight_gmem = weights_gmem
                q_weight_gmem = q_weight_gmem.at[pl.ds(kv_head * group, queries)]
                plgpu.copy_gmem_to_smem(q_weight_gmem, smem["q_weight_smem"], ready)
                plgpu.copy_gmem_to_smem(k_weight_gmem.at[kv_head], smem["k_weight_smem"], ready)
                all_q_gmem = q_gmem.at[pl.ds(request * query_heads, query_heads)]
                plgpu.copy_gmem_to_smem(all_q_gmem, smem["all_q_smem"], ready)
                all_k_gmem = k_gmem.at[pl.ds(request * kv_heads, kv_heads)]
                plgpu.copy_gmem_to_smem(all_k_gmem, smem["all_k_smem"], ready)

        def stream():
            load_rows()
            _, _, begin, end = span()

            def load(j):
                slot = lax.rem(j, stages)
                plgpu.copy_gmem_to_smem(
                    tile_of(k_cache_gmem, begin + j), smem["k_smem"].at[slot], smem["k_full"].at[slot]
                )
                plgpu.copy_gmem_to_smem(
                    tile_of(v_cache_gmem, begin + j), smem["v_tiles_smem"].at[slot], smem["v_full"].at[slot]
                )

            fill_ring(end - begin, stages, smem["empty"], load)

        on_producer_warp(stream, warpgroup=workers)

        def halves_of(rows_smem):
            """The two halves of each row, in float32; of a single row as often as there are queries."""
            if len(rows_smem.shape) == 2:
                layout, slices = rows_layout, [rows_smem.at[:, each] for each in plain_halves]
            else:
                layout, slices = rows_layout.reduce(0), [rows_smem.at[each] for each in halves]
            loaded = [plgpu.load(each, layout=layout, optimized=False).astype(jnp.float32) for each in slices]
            return loaded if len(rows_smem.shape) == 2 else [_to_rows(each, queries) for each in loaded]

        def mean_square_of(all_smem):
            size = math.prod(all_smem.shape)
            layout = plgpu.Layout.WG_STRIDED(all_smem.shape, vec_size=min(8, size // 128))
            values = plgpu.load(all_smem, layout=layout, optimized=False).astype(jnp.float32)
            return jnp.sum(values * values) * (1.0 / size)

        def rounded(values):
            return [each.astype(dtype).astype(jnp.float32) for each in values]

        def rotated(values, name):
            """Halves of rows after norm, clip and rotation."""
            if weights:
                if norms_whole:
                    scale = lax.rsqrt(mean_square_of(smem[f"all_{name}_smem"]) + norm_epsilon)
                else:
                    squares = sum(jnp.sum(each * each, axis=1) for each in values)
                    scale = lax.rsqrt(squares * (1.0 / width) + norm_epsilon)
                    scale = lax.broadcast_in_dim(scale, values[0].shape, (0,))
                factors = halves_of(smem[f"{name}_weight_smem"])
                values = rounded(each * scale * factor for each, factor in zip(values, factors, strict=True))
            if clip is not None:
                values = rounded(jnp.clip(each, -clip, clip) for each in values)
            first, second = values
            tables = [
                plgpu.load(smem[each], layout=rows_layout.reduce(0), optimized=False)
                for each in ("cos_smem", "sin_smem")
            ]
            cos, sin = (_to_rows(each, queries) for each in tables)
            return rounded([first * cos - second * sin, second * cos + first * sin])

        def store_rows(values, rows_smem):
            for each, columns in zip(values, plain_halves, strict=True):
                rows_smem.at[:, columns][...] = each.astype(dtype)

        def prepare():
            """Queries into `wgmma`'s operand; the new key and its scores into shared memory."""
            plgpu.barrier_wait(smem["rows_full"])
            q_values = rotated(halves_of(q_rows_smem), "q")
            store_rows(q_values, q_rows_smem)
            plgpu.commit_smem()
            smem["q_smem"][...] = plgpu.load(q_rows_smem, layout=_rows_layout(width), optimized=False)
            plgpu.commit_smem()
            plgpu.barrier_arrive(smem["q_ready"])
            k_values = rotated(halves_of(smem["k_raw_smem"]), "k")
            store_rows(k_values, k_rows_smem)
            smem["scores_smem"][...] = sum(jnp.sum(q * k, axis=1) for q, k in zip(q_values, k_values, strict=True))
            plgpu.commit_smem()

        def attend_tiles():
            """The partial result of this worker's tiles."""
            oldest, new, begin, end = span()
            columns = plgpu.broadcasted_iota(jnp.int32, (queries, POSITIONS), 1, layout=scores_layout)
            rows = plgpu.broadcasted_iota(jnp.int32, tile_shape, 0, layout=MATRIX)
            p_smems = [smem["p_smem"].at[worker, place] for place in range(pack)]
            s_smems = [smem["s_smem"].at[worker, place] for place in range(pack)]
            m_smem, l_smem = (smem[f"{name}_smem"].at[pl.ds(worker * queries, queries)] for name in "ml")

            def store_scores(slot):
                """One product for the positions at each place in their rows of the cache, transposed on their way."""
                k_smem = smem["k_smem"].at[slot]
                for place, s_smem in enumerate(s_smems):
                    keys_smem = k_smem if pack == 1 else k_smem.at[:, pl.ds(place * width, width)]
                    scores = _product(keys_smem, smem["q_smem"].T, tile_shape)
                    s_smem.T[...] = plgpu.layout_cast(scores, plgpu.Layout.WGMMA_TRANSPOSED)
                plgpu.commit_smem()

            def load_scores(tile):
                """A query in half a warp: maxima need no exchange between warps, for which Mosaic has one place in all."""
                scores = []
                for place, s_smem in enumerate(s_smems):
                    position = (columns + tile * POSITIONS) * pack + place
                    is_visible = position < new
                    if window is not None:
                        is_visible = is_visible & (position >= oldest)
                    loaded = plgpu.load(s_smem, layout=scores_layout, optimized=False)
                    scores.append(jnp.where(is_visible, loaded * (LOG2_E * width**-0.5), NOTHING))
                return scores

            def attended(slot, chunk):
                """Values of 64 columns of the cache's rows, each times the probabilities of its place."""
                columns, first = chunks[chunk], chunk * POSITIONS
                v_smem, result = smem["v_tiles_smem"].at[slot, :, columns], None
                for place in range(first // width, (first + POSITIONS - 1) // width + 1):
                    product = _product(v_smem.T, p_smems[place].T, tile_shape)
                    is_before = rows + first < place * width
                    result = product if result is None else jnp.where(is_before, result, product)
                return result

            def attend(j, part):
                m, l, *values = part
                turn = j * workers + worker
                slot = lax.rem(turn, stages)
                plgpu.barrier_wait(smem["k_full"].at[slot])
                store_scores(slot)
                scores = load_scores(begin + turn)
                new_m = functools.reduce(jnp.maximum, [m, *(jnp.max(each, axis=1) for each in scores)])
                kept = jnp.exp2(m - new_m)
                p = [jnp.exp2(each - lax.broadcast_in_dim(new_m, each.shape, (0,))) for each in scores]
                for p_smem, each in zip(p_smems, p, strict=True):
                    p_smem[...] = each.astype(dtype)
                m_smem[...] = kept
                plgpu.commit_smem()
                kept_C = plgpu.load(m_smem, layout=BY_COLUMN, optimized=False)
                plgpu.barrier_wait(smem["v_full"].at[slot])
                added = [attended(slot, chunk) for chunk in range(len(chunks))]
                plgpu.barrier_arrive(smem["empty"].at[slot])
                l = functools.reduce(jnp.add, [l * kept, *(jnp.sum(each, axis=1) for each in p)])
                kept_RC = _to_rows(kept_C, POSITIONS)
                return new_m, l, *(o * kept_RC + more for o, more in zip(values, added, strict=True))

            nothing = _zeros(queries, layout=scores_layout.reduce(1))
            values = [_zeros(*tile_shape)] * len(chunks)
            plgpu.barrier_wait(smem["q_ready"])
            count = (end - begin - worker + workers - 1) // workers
            m, l, *values = lax.fori_loop(0, count, attend, (nothing + NOTHING, nothing, *values))
            plgpu.commit_smem()  # no warp still reads what it kept in the last turn
            m_smem[...] = m
            l_smem[...] = l
            plgpu.commit_smem()
            stats = [plgpu.load(each, layout=BY_COLUMN, optimized=False) for each in (m_smem, l_smem)]
            return *(_to_rows(each, POSITIONS) for each in stats), *values

        def new_token():
            """The partial result of the new position, which no tile holds."""
            scores = plgpu.load(smem["scores_smem"], layout=BY_COLUMN, optimized=False)
            values = []
            rows = plgpu.broadcasted_iota(jnp.int32, tile_shape, 0, layout=MATRIX)
            for n, chunk in enumerate(chunks):
                v_smem = smem["v_smem"].at[chunk]
                value = plgpu.load(v_smem, layout=BY_ROW, optimized=False).astype(jnp.float32)
                if clip is not None:
                    (value,) = rounded([jnp.clip(value, -clip, clip)])
                    v_smem[...] = value.astype(dtype)
                value = plgpu.layout_cast(lax.broadcast_in_dim(value, tile_shape, (0,)), MATRIX)
                values.append(value if pack == 1 else jnp.where(rows + n * POSITIONS < width, value, 0.0))
            ones = _zeros(*tile_shape) + 1.0
            return _to_rows(scores, POSITIONS) * (LOG2_E * width**-0.5), ones, *values

        def finish(parts):
            _, l, *values = _merged(parts)
            sums_smem = out_smem if pack == 1 else smem["places_smem"]
            for n, value in enumerate(values):
                chunk = pl.ds(unknown_zero + n * POSITIONS, POSITIONS)
                out = (value / l).astype(sums_smem.dtype)
                sums_smem.at[:, chunk].T[...] = plgpu.layout_cast(out, plgpu.Layout.WGMMA_TRANSPOSED)
            if pack > 1:
                plgpu.commit_smem()
                places = [sums_smem.at[:, pl.ds(n * width, width)] for n in range(pack)]
                loaded = [plgpu.load(each, layout=_rows_layout(width), optimized=False) for each in places]
                out_smem.at[:, pl.ds(unknown_zero, width)][...] = functools.reduce(jnp.add, loaded).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(0, group)], out_gmem.at[pl.ds(head * group, group)])
            row, columns = positions_gmem[request] // pack, pl.ds(lax.rem(positions_gmem[request], pack) * width, width)
            k_row_gmem, v_row_gmem = (
                cache_gmem.at[head, pl.ds(row, 1), columns] for cache_gmem in (k_cache_gmem, v_cache_gmem)
            )
            plgpu.copy_smem_to_gmem(k_rows_smem.at[pl.ds(0, 1)], k_row_gmem)
            plgpu.copy_smem_to_gmem(smem["v_smem"].at[pl.ds(0, width)], v_row_gmem.at[0])
            plgpu.wait_smem_to_gmem(0)

        def send(part):
            for n, each in enumerate(part):
                plgpu.async_store_smem(
                    each,
                    smem["splits_smem"].at[split - 1, n],
                    smem["splits_full"],
                    cluster_idx=jnp.int32(0),
                    cluster_dim="split",
                    optimized=False,
                )

        def load_parts(name, count):
            plgpu.barrier_wait(smem[f"{name}_full"])
            refs = [[smem[f"{name}_smem"].at[part, n] for n in range(num_arrays)] for part in range(count)]
            return [[plgpu.load(ref, layout=MATRIX, optimized=False) for ref in part] for part in refs]

        if workers > 1:

            @pl.when((worker > 0) & (worker < workers))
            def _help():
                for n, each in enumerate(attend_tiles()):
                    smem["workers_smem"].at[worker - 1, n][...] = each
                plgpu.commit_smem()
                plgpu.barrier_arrive(smem["workers_full"])

        @pl.when(worker == 0)
        def _lead():
            prepare()
            parts = [attend_tiles()]
            if workers > 1:
                parts += load_parts("workers", workers - 1)
            if splits == 1:
                finish([*parts, new_token()])
            else:
                pl.when(split > 0)(lambda: send(_merged(parts)))
                pl.when(split == 0)(lambda: finish([_merged(parts), *load_parts("splits", splits - 1), new_token()]))

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
        rows_full=plgpu.Barrier(num_arrivals=5 + len(weights) * (2 if norms_whole else 1)),
        q_ready=plgpu.Barrier(),
        k_full=plgpu.Barrier(num_barriers=stages),
        v_full=plgpu.Barrier(num_barriers=stages),
        empty=plgpu.Barrier(num_barriers=stages),
    )
    if pack > 1:
        scratch["places_smem"] = plgpu.SMEM((queries, pack * width), jnp.float32)
    if norms_whole:
        scratch["q_weight_smem"] = plgpu.SMEM((queries, width), weights[0].dtype)
        scratch["k_weight_smem"] = plgpu.SMEM((width,), weights[1].dtype)
        scratch["all_q_smem"] = plgpu.SMEM((query_heads, width), dtype)
        scratch["all_k_smem"] = plgpu.SMEM((kv_heads, width), dtype)
    elif weights:
        scratch["q_weight_smem"] = plgpu.SMEM((width,), weights[0].dtype)
        scratch["k_weight_smem"] = plgpu.SMEM((width,), weights[1].dtype)
    for name, others in (("workers", workers - 1), ("splits", splits - 1)):
        if others:
            scratch[f"{name}_smem"] = plgpu.SMEM((others, num_arrays, *tile_shape), jnp.float32)
    if workers > 1:
        scratch["workers_full"] = plgpu.Barrier(num_arrivals=workers - 1)
    cluster: dict[str, Any] = {}
    if splits > 1:
        cluster = dict(cluster=(splits,), cluster_names=("split",))
        scratch["splits_full"] = plgpu.Barrier(num_arrivals=num_arrays * (splits - 1))
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(q_XH.shape, dtype),
        grid=(batch * kv_heads,),
        grid_names=("head",),
        num_threads=workers + 1,
        thread_name="warpgroup",
        kernel_name="decode_attention",
        scratch_types=scratch,
        compiler_params=COMPILER,
        **cluster,
    )(q_XH, k_XH, v_XH, cos_BR, sin_BR, positions_B, k_ref, v_ref, *weights)


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
    """Two small blocks on a multiprocessor if there is work for them, so that clusters always find room; else one large one."""
    batch, kv_heads, capacity, width = k_BKSH.shape
    rows = POSITIONS * _pack(width)
    tiles = pl.cdiv(capacity if window is None else min(capacity, window + rows), rows)
    heads, splits = batch * kv_heads, 1
    while 2 * splits <= MOST_SPLITS and 2 * splits * heads <= 2 * num_sms and 2 * splits * LEAST_TILES <= tiles:
        splits *= 2
    resident = 2 if heads * splits > num_sms else 1
    my_tiles = pl.cdiv(tiles, splits)
    workers = min(MOST_WORKERS // resident, my_tiles)
    queries, packed = pl.cdiv(q_BQ.shape[1], kv_heads * width * 8) * 8, _pack(width) * width
    parts_bytes = (workers + splits - 2) * (packed + 2 * POSITIONS) * queries * 4
    rows_bytes = queries * (8 * packed + 6 * workers * POSITIONS * _pack(width)) + 16 * width
    whole_bytes = 2 * (q_BQ.shape[1] + kv_heads * width) if norms_whole else 0
    share_bytes = SHARED_MEMORY_BYTES // resident - parts_bytes - rows_bytes - whole_bytes - (8 << 10)
    stages = max(1, min(my_tiles, share_bytes // (4 * POSITIONS * packed)))
    workers = min(workers, stages)
    return dict(splits=splits, workers=workers, stages=stages // workers * workers)


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


IMPLEMENTATION = dispatch.Implementation(NAME, supports=_supports, run=decode_attention)
