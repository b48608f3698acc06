"""The collectives of one MoE layer, by formula: what the traced and compiled programs are held against.

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

ROUTING_BYTES = 4  # of a weight (float32) or an expert's number (int32)


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How one strategy places experts and tokens. `experts` and `columns`: axes that split E and F."""

    experts: tuple[str, ...]
    columns: tuple[str, ...]
    is_sharded: bool  # every device has tokens of its own


SCHEMES = {
    "tp": Scheme((), ("ep", "tp"), is_sharded=False),
    "ep_psum": Scheme(("ep", "tp"), (), is_sharded=False),
    "eptp_psum": Scheme(("ep",), ("tp",), is_sharded=False),
    "ep_agrs": Scheme(("ep", "tp"), (), is_sharded=True),
    "ep_a2a": Scheme(("ep", "tp"), (), is_sharded=True),
    "ep_ragged": Scheme(("ep", "tp"), (), is_sharded=True),
    "eptp_dp": Scheme(("ep",), ("tp",), is_sharded=True),
}


@dataclasses.dataclass(frozen=True)
class Split:
    """A strategy on a mesh. `attention`: "dp" (whole, every device its own requests) or "tp" (heads over ep and tp)."""

    strategy: str
    dp: int = 1
    ep: int = 1
    tp: int = 1
    attention: str = "dp"

    @property
    def devices(self) -> int:
        return self.dp * self.ep * self.tp

    @property
    def copy_devices(self) -> int:
        """That share one copy of the experts."""
        return self.ep * self.tp

    @property
    def sizes(self) -> dict[str, int]:
        return {"dp": self.dp, "ep": self.ep, "tp": self.tp}

    @property
    def scheme(self) -> Scheme:
        return SCHEMES[self.strategy]

    @property
    def expert_parts(self) -> int:
        return math.prod(self.sizes[axis] for axis in self.scheme.experts)

    @property
    def column_parts(self) -> int:
        return math.prod(self.sizes[axis] for axis in self.scheme.columns)

    def name(self) -> str:
        parts = [f"{axis}={size}" for axis, size in self.sizes.items() if size > 1]
        return f"{self.strategy} {','.join(parts) or 'one device'}"

    def tensorrt_name(self) -> str:
        """What TensorRT-LLM would call it: attention (D or T), then TP and EP of the experts."""
        head = self.attention[0].upper()
        tp, ep = self.column_parts, self.expert_parts
        return head + (f"TP{tp}" if tp > 1 or ep == 1 else "") + (f"EP{ep}" if ep > 1 else "")


def capacity(tokens: int, experts: int, active: int, factor: float | None) -> int:
    """Rows that a device may send to one expert: `factor` times an even share, at least 1; all its tokens when None."""
    return tokens if factor is None else min(tokens, max(1, math.ceil(tokens * active * factor / experts)))


def moe_collectives(
    split: Split,
    *,
    tokens: int,
    width: int,
    experts: int,
    active: int,
    capacity_factor: float | None = None,
    item_bytes: int = 2,
    devices_per_node: int = 8,
) -> tuple[Collective, ...]:
    """The collectives of one MoE layer in one copy, for `tokens` tokens of that copy.

    Raises:
      ValueError: an unknown strategy.
    """
    if split.strategy not in SCHEMES:
        raise ValueError(f"expected strategy to be one of {', '.join(SCHEMES)}, got {split.strategy!r}")
    both, own = ("ep", "tp"), tokens // split.copy_devices
    row_bytes = width * item_bytes
    all_bytes, own_bytes = tokens * row_bytes, own * row_bytes

    def one(kind: str, axes: tuple[str, ...], in_bytes: float, out_bytes: float) -> Collective:
        groups = mesh_groups(split.sizes, axes)
        return Collective(kind, groups.shape[1], local_devices(groups, devices_per_node), in_bytes, out_bytes)

    def exchange(axes: tuple[str, ...]) -> Collective:
        sent = experts * capacity(own, experts, active, capacity_factor) * row_bytes
        return one(ALL_TO_ALL, axes, sent, sent)

    if split.strategy in ("tp", "ep_psum", "eptp_psum"):
        found = [one(ALL_REDUCE, both, all_bytes, all_bytes)]
    elif split.strategy == "ep_agrs":
        routing = active * ROUTING_BYTES
        found = [
            one(ALL_GATHER, both, own_bytes, all_bytes),
            *[one(ALL_GATHER, both, own * routing, tokens * routing)] * 2,  # weights and numbers
            one(REDUCE_SCATTER, both, all_bytes, own_bytes),
        ]
    elif split.strategy == "ep_a2a":
        found = [exchange(both)] * 2
    elif split.strategy == "ep_ragged":
        counts, rows = experts * ROUTING_BYTES, own * active * row_bytes
        found = [
            one(ALL_GATHER, both, counts, split.copy_devices * counts),
            *[one(RAGGED_ALL_TO_ALL, both, rows, rows)] * 2,
        ]
    else:
        over_ep = exchange(("ep",))
        inside = over_ep.in_bytes
        found = [
            over_ep,
            one(ALL_GATHER, ("tp",), inside, split.tp * inside),
            one(REDUCE_SCATTER, ("tp",), split.tp * inside, inside),
            over_ep,
        ]
    return tuple(collective for collective in found if collective.devices > 1)
