"""Strategies: which axes of the mesh split the experts, their hidden width and the tokens, and how tokens meet experts.

`dp` splits requests under every strategy: along it the experts are replicated, and nothing is exchanged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from sharding import expert_parallel
from sharding.axes import EP, EP_TP, NONE, TP, Axes


@dataclasses.dataclass(frozen=True)
class Strategy:
    """A row of the table below.

    experts, expert_mlp: the axes that split whole experts, and each expert's hidden width.
    tokens: the axes that split a layer's tokens, besides `dp`. Empty: the devices of a `dp` slice all have its tokens.
    exchange: a function of `sharding.expert_parallel`.
    """

    name: str
    experts: Axes
    expert_mlp: Axes
    tokens: Axes
    exchange: Callable[..., Any]

    @property
    def has_capacity(self) -> bool:
        """Whether a capacity factor means something."""
        return self.exchange is expert_parallel.all_to_all


STRATEGIES: dict[str, Strategy] = {
    row.name: row
    for row in (
        Strategy("tp", NONE, EP_TP, NONE, expert_parallel.all_reduce),
        Strategy("ep_psum", EP_TP, NONE, NONE, expert_parallel.all_reduce),
        Strategy("eptp_psum", EP, TP, NONE, expert_parallel.all_reduce),
        Strategy("ep_agrs", EP_TP, NONE, EP_TP, expert_parallel.gather_scatter),
        Strategy("ep_a2a", EP_TP, NONE, EP_TP, expert_parallel.all_to_all),
        Strategy("ep_ragged", EP_TP, NONE, EP_TP, expert_parallel.ragged_all_to_all),
        Strategy("eptp_dp", EP, TP, EP_TP, expert_parallel.all_to_all),
    )
}

# Everything but the experts: attention, dense layers, shared experts, embedding and head.
# `tp` splits their matrices (and the cache by heads); `dp` splits the requests (and the cache with them).
ATTENTION: dict[str, dict[str, Axes]] = {
    "tp": {"q_heads": EP_TP, "kv_heads": EP_TP, "mlp": EP_TP, "vocab": EP_TP},
    "dp": {},
}
