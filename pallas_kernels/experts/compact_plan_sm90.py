"""What a block of the compact kernel has to know about the routing, worked out by its warpgroups in shared memory.

Choices are sorted by expert, stably: the place of a choice is the number of choices with a smaller key, a key being
`expert * choices + choice`. Counting all keys below 64 thresholds at a time needs no sort and no scan, which registers know
nothing of. The same count gives the start of each expert. Experts then start at multiples of 8 rows, what a swizzled copy
begins at, and an expert's rows are covered by tiles of a fixed number of rows.

Example with 3 tokens of 2 choices, 4 experts, choices [[0, 3], [3, 2], [0, 3]], tiles of 8 rows: sizes are [2, 0, 1, 3], first
rows [0, 8, 8, 16], tiles 0, 1, 2 are those of experts 0, 2, 3, and token 1's choices are in rows 17 and 8.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

CHUNK = 64  # numbers that are compared with 64 others at a time
GRAIN = 8  # rows that an expert's rows are rounded up to
MATRIX = plgpu.Layout.WGMMA
COLUMNS = plgpu.Layout.WGMMA.reduce(0)  # of a vector along the columns of a matrix
ROWS = plgpu.Layout.WGMMA.reduce(1)
NEVER = (1 << 31) - 1  # key of a choice whose expert is elsewhere


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Static sizes of a plan. `most_tokens`: rows of a tile. `first_expert`, `num_experts`: the range that is local."""

    num_tokens: int
    active: int
    first_expert: int
    num_experts: int
    most_tokens: int
    num_blocks: int

    @property
    def choices(self) -> int:
        return self.num_tokens * self.active

    @property
    def rows(self) -> int:
        """The most rows that choices can take, each expert's rounded up, and the last one's whole tile."""
        padded = self.choices + min(self.num_experts, self.choices) * (GRAIN - 1)
        return pl.cdiv(padded, GRAIN) * GRAIN

    @property
    def tiles(self) -> int:
        return min(self.num_experts, self.choices) + self.choices // self.most_tokens

    @property
    def tokens_per_block(self) -> int:
        return pl.cdiv(self.num_tokens, self.num_blocks)

    @property
    def blocks_with_tokens(self) -> int:
        return pl.cdiv(self.num_tokens, self.tokens_per_block)

    @property
    def key_chunks(self) -> int:
        return pl.cdiv(self.choices, CHUNK)

    @property
    def own_chunks(self) -> int:
        return pl.cdiv(self.tokens_per_block * self.active, CHUNK)

    @property
    def expert_chunks(self) -> int:
        return pl.cdiv(self.num_experts, CHUNK)

    @property
    def tile_chunks(self) -> int:
        return pl.cdiv(self.tiles, CHUNK)

    def scratch(self) -> dict[str, Any]:
        per_expert = plgpu.SMEM(((self.expert_chunks + 1) * CHUNK,), jnp.int32)
        return dict(
            keys_smem=plgpu.SMEM(((self.key_chunks + self.own_chunks + 1) * CHUNK,), jnp.int32),
            places_smem=plgpu.SMEM((self.own_chunks * CHUNK,), jnp.int32),
            starts_smem=per_expert,
            ends_smem=per_expert,
            first_rows_smem=per_expert,
            first_tiles_smem=per_expert,
            end_tiles_smem=per_expert,
            experts_smem=plgpu.SMEM((self.tile_chunks * CHUNK,), jnp.int32),
            loaded=plgpu.Barrier(num_arrivals=self.key_chunks),
        )


@dataclasses.dataclass(frozen=True)
class Plan:
    """A block's plan: functions that fill it, each for one warpgroup, and scalars read from it afterwards.

    keys_smem: of all choices, `NEVER` past the last one. places_smem: of this block's choices among all sorted.
    starts_smem, first_rows_smem, first_tiles_smem: of each expert, and of the end, at `num_experts`.
    ends_smem, end_tiles_smem: the same of each expert's successor. experts_smem: of each tile.
    """

    sizes: Sizes
    experts_gmem: Any
    keys_smem: Any
    places_smem: Any
    starts_smem: Any
    ends_smem: Any
    first_rows_smem: Any
    first_tiles_smem: Any
    end_tiles_smem: Any
    experts_smem: Any
    loaded: Any

    def write_keys(self) -> None:
        """First of all. Keys replace the experts that were copied to their places, with zeros past the last one."""
        sizes = self.sizes

        @pl.loop(0, sizes.key_chunks)
        def _load(chunk):
            plgpu.copy_gmem_to_smem(self.experts_gmem.at[_part(chunk)], self.keys_smem.at[_part(chunk)], self.loaded)

        plgpu.barrier_wait(self.loaded)

        @pl.loop(0, sizes.key_chunks)
        def _chunk(chunk):
            choice = _ids(chunk, ROWS)
            expert = plgpu.load(self.keys_smem.at[_part(chunk)], layout=ROWS, optimized=False) - sizes.first_expert
            plgpu.commit_smem()  # several threads hold the same number: all have read it
            is_local = (expert >= 0) & (expert < sizes.num_experts) & (choice < sizes.choices)
            self.keys_smem[_part(chunk)] = jnp.where(is_local, expert * sizes.choices + choice, NEVER)

        plgpu.commit_smem()

    def write_table(self) -> None:
        """Starts, rows and tiles of all experts, after `write_keys`."""
        sizes = self.sizes
        for start_smem in (self.starts_smem, self.first_rows_smem, self.first_tiles_smem):
            start_smem[_part(0)] = plgpu.layout_cast(jnp.zeros((CHUNK,), jnp.int32), ROWS)
        plgpu.commit_smem()

        @pl.loop(0, sizes.expert_chunks)
        def _ends(rows):
            ends = self._count_keys_below((_ids(rows, ROWS) + 1) * sizes.choices)
            self.ends_smem[_part(rows)] = ends
            self.starts_smem[_successors(rows)] = ends

        plgpu.commit_smem()

        @pl.loop(0, sizes.expert_chunks)
        def _sums(rows):
            def add(chunk, sums):
                is_up_to = _row_ids(rows) >= _column_ids(chunk)
                size = _vector(self.ends_smem, chunk) - _vector(self.starts_smem, chunk)
                padded = lax.div(size + (GRAIN - 1), GRAIN) * GRAIN
                tiles = lax.div(size + (sizes.most_tokens - 1), sizes.most_tokens)
                return [
                    total + jnp.where(is_up_to, _down(part), 0)
                    for total, part in zip(sums, (padded, tiles), strict=True)
                ]

            end_rows, end_tiles = map(_sum, lax.fori_loop(0, rows + 1, add, [_zeros(), _zeros()]))
            self.first_rows_smem[_successors(rows)] = end_rows
            self.end_tiles_smem[_part(rows)] = end_tiles
            self.first_tiles_smem[_successors(rows)] = end_tiles

        plgpu.commit_smem()

        @pl.loop(0, lax.div(self.num_tiles + (CHUNK - 1), CHUNK))
        def _experts(tiles):
            def add(chunk, count):
                return count + (_down(_vector(self.end_tiles_smem, chunk)) <= _row_ids(tiles)).astype(jnp.int32)

            self.experts_smem[_part(tiles)] = _sum(lax.fori_loop(0, sizes.expert_chunks, add, _zeros()))

        plgpu.commit_smem()

    def write_places(self, first_token) -> None:
        """Of this block's tokens, from `first_token`, after `write_keys`."""
        first_choice = first_token * self.sizes.active

        @pl.loop(0, self.sizes.own_chunks)
        def _chunk(chunk):
            own = self.keys_smem.at[pl.ds(first_choice + chunk * CHUNK, CHUNK)]
            keys = plgpu.load(own, layout=ROWS, optimized=False)
            self.places_smem[_part(chunk)] = self._count_keys_below(keys)

        plgpu.commit_smem()

    def _count_keys_below(self, thresholds):
        def add(chunk, count):
            return count + (_down(_vector(self.keys_smem, chunk)) < _across(thresholds)).astype(jnp.int32)

        return _sum(lax.fori_loop(0, self.sizes.key_chunks, add, _zeros()))

    @property
    def num_tiles(self):
        return self.first_tiles_smem[self.sizes.num_experts]

    def expert_of(self, tile):
        return self.experts_smem[tile]

    def rows_of(self, tile):
        """First row of a tile, a multiple of 8 that the compiler knows as one; how many of its rows belong to tokens."""
        expert = self.expert_of(tile)
        earlier = (tile - self.first_tiles_smem[expert]) * self.sizes.most_tokens
        size = self.starts_smem[expert + 1] - self.starts_smem[expert]
        first = lax.div(self.first_rows_smem[expert] + earlier, GRAIN) * GRAIN
        return first, lax.min(size - earlier, self.sizes.most_tokens)

    def row_of(self, token, own_choice, choice: int):
        """The row of a token's choice, -1 if its expert is not local; `own_choice` counts from the block's first."""
        expert = self.experts_gmem[token * self.sizes.active + choice] - self.sizes.first_expert
        is_local = (expert >= 0) & (expert < self.sizes.num_experts)
        there = lax.clamp(0, expert, self.sizes.num_experts - 1)
        row = self.places_smem[own_choice] + self.first_rows_smem[there] - self.starts_smem[there]
        return lax.select(is_local, row, row * 0 - 1)


def _part(chunk):
    return pl.ds(chunk * CHUNK, CHUNK)


def _successors(chunk):
    """Where the ends of a chunk of experts are stored as their successors' starts.

    Stored one further on, not read there: threads read two numbers at a time, and an odd address faults.
    """
    return pl.ds(chunk * CHUNK + 1, CHUNK)


def _vector(ref, chunk):
    return plgpu.load(ref.at[_part(chunk)], layout=COLUMNS, optimized=False)


def _zeros():
    return plgpu.layout_cast(jnp.zeros((CHUNK, CHUNK), jnp.int32), MATRIX)


def _sum(counts):
    """Of each row. Exact in float32, which is what registers can add across threads: all are below 2^24."""
    return jnp.sum(counts.astype(jnp.float32), axis=1).astype(jnp.int32)


def _ids(chunk, layout):
    return plgpu.broadcasted_iota(jnp.int32, (CHUNK,), 0, layout=layout) + chunk * CHUNK


def _row_ids(chunk):
    return plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), 0, layout=MATRIX) + chunk * CHUNK


def _column_ids(chunk):
    return plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), 1, layout=MATRIX) + chunk * CHUNK


def _down(values):
    return lax.broadcast_in_dim(values, (CHUNK, CHUNK), (1,))


def _across(values):
    return lax.broadcast_in_dim(values, (CHUNK, CHUNK), (0,))
