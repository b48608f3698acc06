"""The collectives of one MoE layer, by formula: what traced and compiled programs are held against, and predictions use.

N = ep x tp devices share one copy of the experts; `dp` copies serve different requests. T tokens enter a copy in a step.
"""

from __future__ import annotations

import dataclasses
import math

from sharding.account import (
    ALL_GATHER,
    ALL_REDUCE,
    ALL_TO_ALL,
    RAGGED_ALL_TO_ALL,
    REDUCE_SCATTER,
    Collective,
    local_devices,
    mesh_groups,
)
from sharding.axes import Axes
from sharding.expert_parallel import capacity
from sharding.strategies import STRATEGIES, Strategy

CHOICE_BYTES = 4  # an expert's number (int32), or its weight (float32)


@dataclasses.dataclass(frozen=True)
class Split:
    """A strategy on a mesh. `attention`: "dp" (whole, every device its own requests) or "tp" (heads over ep and tp)."""

    strategy: str
    dp: int = 1
    ep: int = 1
    tp: int = 1
    attention: str = "dp"

    def __post_init__(self):
        if self.strategy not in STRATEGIES:
            raise ValueError(f"expected strategy to be one of {', '.join(STRATEGIES)}, got {self.strategy!r}")
        if self.attention not in ("dp", "tp"):
            raise ValueError(f'expected attention to be "dp" or "tp", got {self.attention!r}')

    @property
    def row(self) -> Strategy:
        return STRATEGIES[self.strategy]

    @property
    def sizes(self) -> dict[str, int]:
        return {"dp": self.dp, "ep": self.ep, "tp": self.tp}

    @property
    def devices(self) -> int:
        return self.dp * self.ep * self.tp

    @property
    def copy_devices(self) -> int:
        """That share one copy of the experts."""
        return self.ep * self.tp

    @property
    def expert_parts(self) -> int:
        return self.size(self.row.experts)

    @property
    def column_parts(self) -> int:
        return self.size(self.row.expert_mlp)

    @property
    def attention_parts(self) -> int:
        return self.copy_devices if self.attention == "tp" else 1

    def heads_parts(self, entries: int) -> int:
        """Over how many devices attention splits this many key/value heads, or words: as `Layout.dividing`, over ep and tp
        or over ep alone as far as they divide them. On the other devices there are copies."""
        if self.attention == "dp":
            return 1
        return max(parts for parts in (1, self.ep, self.ep * self.tp) if entries % parts == 0)

    def size(self, axes: Axes) -> int:
        return math.prod(self.sizes[axis] for axis in axes)

    def local_experts(self, experts: int) -> int:
        """Of one device; where the devices do not divide the experts, the last ones have empty slots."""
        return -(-experts // self.expert_parts)

    @property
    def mesh(self) -> str:
        """As `load(mesh=...)` takes it."""
        return ",".join(f"{axis}={size}" for axis, size in self.sizes.items() if size > 1) or "ep=1"

    @property
    def tensorrt_name(self) -> str:
        """TensorRT-LLM's letters: D or T for the attention, then how the experts are split. DTP4EP8, TEP8."""
        experts = (f"TP{self.column_parts}" if self.column_parts > 1 else "") + (
            f"EP{self.expert_parts}" if self.expert_parts > 1 else ""
        )
        return self.attention[0].upper() + (experts or "P1")


def moe_collectives(
    split: Split,
    *,
    tokens: int,
    width: int,
    active: int,
    capacity_factor: float | None = None,
    item_bytes: int = 2,
    devices_per_node: int = 8,
) -> tuple[Collective, ...]:
    """The collectives of one MoE layer in one copy, for `tokens` tokens of that copy, buffers at their static sizes."""
    both: Axes = ("ep", "tp")
    own = tokens // split.size(split.row.tokens)
    row_bytes, choices_bytes = width * item_bytes, active * CHOICE_BYTES

    def one(kind: str, axes: Axes, in_bytes: float, out_bytes: float) -> Collective:
        groups = mesh_groups(split.sizes, axes)
        return Collective(kind, groups.shape[1], local_devices(groups, devices_per_node), in_bytes, out_bytes)

    def gather(axes: Axes, in_bytes: float) -> Collective:
        return one(ALL_GATHER, axes, in_bytes, split.size(axes) * in_bytes)

    def scatter(axes: Axes, out_bytes: float) -> Collective:
        return one(REDUCE_SCATTER, axes, split.size(axes) * out_bytes, out_bytes)

    def exchange(axes: Axes, sent_bytes: float) -> Collective:
        return one(ALL_TO_ALL, axes, sent_bytes, sent_bytes)

    name = split.row.exchange.__name__
    if name == "all_reduce":
        found = [one(ALL_REDUCE, (*split.row.experts, *split.row.expert_mlp), tokens * row_bytes, tokens * row_bytes)]
    elif name == "gather_scatter":
        found = [
            gather(both, own * row_bytes),
            *[gather(both, own * choices_bytes)] * 2,
            scatter(both, own * row_bytes),
        ]
    elif name == "ragged_all_to_all":
        sent = own * min(active, split.copy_devices) * row_bytes
        ragged = one(RAGGED_ALL_TO_ALL, both, sent, sent)
        found = [*[gather(both, own * choices_bytes)] * 2, ragged, ragged]
    else:
        ep, tp = split.row.experts, split.row.expert_mlp
        parts = split.size(ep)
        rows = parts * capacity(own, active, devices=parts, factor=capacity_factor)
        packed = (rows * row_bytes, rows * choices_bytes, rows * choices_bytes)
        found = [exchange(ep, sent) for sent in packed] + [gather(tp, sent) for sent in packed]
        found += [scatter(tp, rows * row_bytes), exchange(ep, rows * row_bytes)]
    return tuple(collective for collective in found if collective.devices > 1)


def mean_visits(active: int, devices: int) -> float:
    """How many devices a token's experts are on, on average, under uniform routing. Example: 8 choices, 8 devices: 5.25."""
    return devices * (1 - (1 - 1 / devices) ** active)
