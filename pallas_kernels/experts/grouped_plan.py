"""Where the grouped algorithm puts each choice: rows sorted by expert, and the tiles that cover them.

Every expert's rows start at a multiple of 64 (what one warpgroup multiplies), so that no 64 rows belong to two
experts; the rows between are never written and never read. Example with 2 tokens, 3 choices each, 4 experts, sizes
[2, 0, 1, 3]: rows 0 and 1 are expert 0's, row 64 is expert 2's, rows 128, 129, 130 are expert 3's; three tiles, of
experts 0, 2 and 3.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from pallas_kernels.route.api import Places

BLOCK = 64  # tokens whose ranks are counted together; also what starts of experts are rounded to


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GroupedPlan:
    """Rows and tiles. `X` is the largest number of tiles there can be, of which the first `num_tiles_1[0]` exist.

    rows_TA: the row of each choice, or -1 where its expert is not local.
    expert_X, start_X, end_X: a tile's local expert, its first row and the end of its rows, both multiples of 64.
    size_X: how many of its rows belong to tokens.
    """

    rows_TA: Int[Array, "T A"]
    expert_X: Int[Array, "X"]
    start_X: Int[Array, "X"]
    end_X: Int[Array, "X"]
    size_X: Int[Array, "X"]
    num_tiles_1: Int[Array, "1"]


def num_rows(num_choices: int, num_experts: int) -> int:
    """The most rows that `num_choices` choices can take, each expert's rounded up to 64."""
    return round_up(num_choices + min(num_experts, num_choices) * (BLOCK - 1), BLOCK)


def plan(
    experts_TA: Int[Array, "T A"],
    *,
    num_experts: int,
    first_expert: int = 0,
    tile_rows: int = 128,
    places: Places | None = None,
) -> GroupedPlan:
    """Plans the choices of experts `first_expert` up to `first_expert + num_experts`, `tile_rows` rows a tile."""
    num_choices = experts_TA.size
    local_TA = experts_TA - first_expert
    ranks_TA, counts_BE = local_places(experts_TA, places, num_experts=num_experts, first_expert=first_expert)
    sums_BE = sums_over_blocks(counts_BE)
    before_BE, sizes_E = sums_BE[:-1], sums_BE[-1]
    padded_E = round_up(sizes_E, BLOCK)
    tiles_E = round_up(padded_E, tile_rows) // tile_rows
    starts_E, first_tiles_E = _sums_of_earlier(jnp.stack([padded_E, tiles_E]))

    is_local_TA = (local_TA >= 0) & (local_TA < num_experts)
    safe_TA = jnp.clip(local_TA, 0, num_experts - 1)
    block_T1 = jnp.arange(experts_TA.shape[0])[:, None] // BLOCK
    rows_TA = jnp.where(is_local_TA, (starts_E + before_BE)[block_T1, safe_TA] + ranks_TA, -1)

    tile_X1 = jnp.arange(max_tiles(num_choices, num_experts, tile_rows), dtype=jnp.int32)[:, None]
    is_of_XE = (first_tiles_E <= tile_X1) & (tile_X1 < first_tiles_E + tiles_E)
    # What tiles know of their expert, picked by sums: one fusion, where gathers and a search would be four.
    per_expert = (jnp.arange(num_experts), starts_E, sizes_E, first_tiles_E, tiles_E)
    picked = jnp.where(is_of_XE, jnp.stack(per_expert)[:, None], 0).sum(axis=2, dtype=jnp.int32)
    expert_X, first_row_X, size_X, first_tile_X, tiles_X = picked
    start_X, end_X = share_of_rows(size_X, tile_X1[:, 0] - first_tile_X, tiles_X)
    return GroupedPlan(
        rows_TA,
        expert_X,
        first_row_X + start_X,
        first_row_X + end_X,
        jnp.minimum(size_X, end_X) - start_X,
        tiles_E.sum(dtype=jnp.int32)[None],
    )


def max_tiles(num_choices: int, num_experts: int, tile_rows: int) -> int:
    return num_choices // tile_rows + min(num_experts, num_choices)


def share_of_rows(size, index, tiles):
    """Start and end, counted from its expert's first row, of tile `index` of `tiles` that share `size` rows evenly."""
    blocks, tiles = lax.div(size + (BLOCK - 1), BLOCK), jnp.maximum(tiles, 1)
    return lax.div(index * blocks, tiles) * BLOCK, lax.div((index + 1) * blocks, tiles) * BLOCK


def local_places(
    experts_TA, places: Places | None, *, num_experts: int, first_expert: int
) -> tuple[jax.Array, jax.Array]:
    """Ranks and counts of `places`, or made here, of the experts that are local."""
    if places is None:
        return _ranks_in_blocks(experts_TA - first_expert, num_experts)
    return places.ranks_TA, places.counts_BE[:, first_expert : first_expert + num_experts]


def _ranks_in_blocks(local_TA, num_experts: int) -> tuple[jax.Array, jax.Array]:
    """How many earlier tokens of the same 64 chose the same expert; how many tokens of each 64 chose each expert."""
    num_tokens, active = local_TA.shape
    num_blocks = -(-num_tokens // BLOCK)
    padded_TA = jnp.pad(local_TA, ((0, num_blocks * BLOCK - num_tokens), (0, 0)), constant_values=-1)
    is_chosen_TE = (padded_TA[:, :, None] == jnp.arange(num_experts)).any(axis=1)
    is_chosen_BZE = is_chosen_TE.reshape(num_blocks, BLOCK, num_experts).astype(jnp.bfloat16)
    # Sums of at most 64 ones: exact in bfloat16 products accumulated in float32.
    is_before_ZZ = np.tri(BLOCK, k=-1).astype(jnp.bfloat16)
    ranks_BZE = jnp.einsum("ZY,BYE->BZE", is_before_ZZ, is_chosen_BZE, preferred_element_type=jnp.float32)
    ranks_TE = ranks_BZE.reshape(-1, num_experts)[:num_tokens]
    rank_TA = jnp.take_along_axis(ranks_TE, jnp.clip(local_TA, 0, num_experts - 1), axis=1)
    return rank_TA.astype(jnp.int32), is_chosen_BZE.sum(axis=1, dtype=jnp.float32).astype(jnp.int32)


def sums_over_blocks(counts_BE) -> jax.Array:
    """The sums of the blocks before each one, and last that of all."""
    # Counts of at most 64: exact in bfloat16 products accumulated in float32.
    is_before_BB = np.tri(counts_BE.shape[0] + 1, counts_BE.shape[0], k=-1).astype(jnp.bfloat16)
    sums_BE = jnp.dot(is_before_BB, counts_BE.astype(jnp.bfloat16), preferred_element_type=jnp.float32)
    return sums_BE.astype(jnp.int32)


def _sums_of_earlier(values_XE) -> jax.Array:
    """Exclusive cumulative sums, written as masked sums: one small fusion, where `cumsum` is a chain of launches."""
    experts_E = jnp.arange(values_XE.shape[1])
    return jnp.where(experts_E < experts_E[:, None], values_XE[:, None, :], 0).sum(axis=2, dtype=jnp.int32)


def round_up(value, multiple: int):
    return (value + multiple - 1) // multiple * multiple
