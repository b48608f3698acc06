"""Which block does what in the compact kernel: items of two sizes, dealt out so that all blocks load about as much."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax import lax
from jax.experimental import pallas as pl

ITEMS_PER_BLOCK = 12  # of the down phase, at least: the busiest block is then a few percent above the mean
SMALLEST_CHUNK = 512  # columns of a sum's part, whose result is stored and read once more


@dataclasses.dataclass(frozen=True)
class Deal:
    """One block's items: `num_up` of the up phase, then `num_down` of down; `up(i)` and `down(i)` are their indices.

    Items of up are dealt in turn. Blocks that got one fewer than the others are then served alone for `head_starts` rounds
    of down, about as many as one item of up is worth; after that all blocks are dealt in turn, those first again. Both
    phases begin with their lowest indices, so that what the first items of down wait for was done long before.
    """

    num_up: Any
    num_down: Any
    turn: Any
    behind: Any
    head_starts: Any
    num_head_starts: Any
    block: Any
    num_blocks: int

    @classmethod
    def of(cls, up_items, down_items, *, head_starts: int, block, num_blocks: int) -> Deal:
        """head_starts: how many items of down take as long as one of up."""
        num_up = lax.div(up_items - block + (num_blocks - 1), num_blocks)
        ahead = lax.rem(up_items, num_blocks)  # blocks that got one item more
        behind = num_blocks - ahead
        turn = lax.rem(block - ahead + num_blocks, num_blocks)
        rounds = lax.select(ahead > 0, ahead * 0 + head_starts, ahead * 0)
        alone = lax.min(lax.div(lax.max(down_items - turn + (behind - 1), 0), behind), rounds)
        num_head_starts = lax.select(turn < behind, alone, alone * 0)
        together = lax.div(lax.max(down_items - rounds * behind - turn + (num_blocks - 1), 0), num_blocks)
        num_down = num_head_starts + together
        return cls(num_up, num_down, turn, behind, rounds, num_head_starts, block, num_blocks)

    def up(self, i):
        return self.block + i * self.num_blocks

    def down(self, i):
        alone = i * self.behind + self.turn
        together = self.head_starts * self.behind + (i - self.num_head_starts) * self.num_blocks + self.turn
        return lax.select(i < self.num_head_starts, alone, together)


def chunks_of_down(steps: int, tiles: int, *, depth: int, num_blocks: int) -> int:
    """In how many parts to cut the sums of the down phase, of `steps` steps each, so that there are items enough to deal.

    tiles: of weights times tiles of tokens, of all experts together.
    """
    wanted = pl.cdiv(ITEMS_PER_BLOCK * num_blocks, tiles)
    return max(1, min(wanted, steps * depth // SMALLEST_CHUNK))
