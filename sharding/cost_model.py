"""Predicts the time and memory of a step under a split, from counted bytes and FLOPs and a machine's constants.

A roofline for each part (what it must read, what it must multiply, what it costs to start) and latency plus bandwidth for
each collective. Nothing overlaps: parts add up. Constants live in `sharding/machines/*.json` and nowhere else.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np

from sharding import machines
from sharding.account import (
    ALL_GATHER,
    ALL_REDUCE,
    ALL_TO_ALL,
    RAGGED_ALL_TO_ALL,
    Collective,
    local_devices,
    mesh_groups,
)
from sharding.axes import EP_TP
from sharding.describe import ModelShape
from sharding.formulas import Split, mean_visits, moe_collectives
from sharding.machines import Machine
from sharding.strategies import STRATEGIES

ITEM_BYTES = 2  # bfloat16
SMALLEST_COLUMNS = 128  # of an expert on one device: below it, the kernels' tiles are mostly empty
DECODE, PREFILL = "decode", "prefill"


@dataclasses.dataclass(frozen=True)
class Work:
    """What every device does: `batch` requests each, of `context` tokens each.

    A decode step advances every request by a token; a prefill step reads all prompts. imbalance: the busiest device's
    routed rows against the mean, where experts are split (scripts/plan_placement.py measures it).
    """

    phase: str
    batch: int
    context: int
    capacity_factor: float | None = None
    imbalance: float = 1.3

    def __post_init__(self):
        if self.phase not in (DECODE, PREFILL):
            raise ValueError(f"expected phase to be decode or prefill, got {self.phase!r}")
        for name in ("batch", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of at least 1, got {getattr(self, name)}")
        if self.imbalance < 1:
            raise ValueError(f"expected imbalance of at least 1 (busiest against mean), got {self.imbalance}")

    @property
    def tokens(self) -> int:
        """Of one device's requests, in one step."""
        return self.batch * (self.context if self.phase == PREFILL else 1)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device."""

    weights: float
    cache: float
    temporary: float

    @property
    def total(self) -> float:
        return self.weights + self.cache + self.temporary


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One step, in milliseconds; `rest_ms` is embedding, head, dense layers and shared experts."""

    attention_ms: float
    experts_ms: float
    communication_ms: float
    rest_ms: float
    within_bytes: float
    between_bytes: float
    memory: Memory
    tokens_per_s_per_device: float

    @property
    def total_ms(self) -> float:
        return self.attention_ms + self.experts_ms + self.communication_ms + self.rest_ms


def splits(devices: int, strategies: Sequence[str] = tuple(STRATEGIES), *, kv_heads: int = 0) -> list[Split]:
    """Every factorisation of the devices into dp x ep x tp, for every strategy and both kinds of attention.

    Strategies that split over ep and tp alike come once for each product of the two: with tp=1, or where attention is split
    with the ep that divides the key/value heads best (8 devices and 4 heads: ep=4, tp=2; with ep=8 each would hold all 4).
    Those for which the two mean different things come with tp above 1, since without it they are one of the others.

    Raises:
      ValueError: no devices.
    """
    if devices < 1:
        raise ValueError(f"expected at least 1 device, got {devices}")
    found = []
    for name, ep, tp in itertools.product(strategies, _divisors(devices), _divisors(devices)):
        if devices % (ep * tp) or (tp > 1) != _uses_both(name):
            continue
        found.append(Split(name, devices // (ep * tp), ep, tp, "dp"))
        if ep * tp > 1:
            by_heads = ep if tp > 1 else math.gcd(ep, kv_heads)
            found.append(Split(name, devices // (ep * tp), by_heads, ep * tp // by_heads, "tp"))
    return found


def _uses_both(name: str) -> bool:
    """Whether ep and tp mean different things to a strategy."""
    return bool(STRATEGIES[name].experts) and bool(STRATEGIES[name].expert_mlp)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def problems(shape: ModelShape, machine: Machine, split: Split, work: Work) -> list[str]:
    """Why a split cannot run, or should not; empty when it can."""
    found = []
    if split.expert_parts > shape.experts:
        found.append(f"{split.expert_parts} devices for {shape.experts} experts")
    if shape.expert_width % split.column_parts:
        found.append(f"expert width {shape.expert_width} does not divide by {split.column_parts}")
    elif split.column_parts > 1 and shape.expert_width // split.column_parts < SMALLEST_COLUMNS:
        columns = shape.expert_width // split.column_parts
        found.append(f"{columns} columns of an expert on a device, fewer than {SMALLEST_COLUMNS}")
    if split.attention == "tp" and shape.q_heads % split.attention_parts:
        found.append(f"{shape.q_heads} query heads do not divide by {split.attention_parts}")
    room = machine.memory_bytes * machine.memory_fraction
    needed = memory(shape, split, work)
    if needed.total > room:
        parts = (
            f"weights {needed.weights / 1e9:.0f}, cache {needed.cache / 1e9:.0f}, other {needed.temporary / 1e9:.0f}"
        )
        found.append(f"needs {needed.total / 1e9:.0f} GB ({parts}) of {room / 1e9:.0f}")
    return found


def memory(shape: ModelShape, split: Split, work: Work) -> Memory:
    """Bytes of one device. Temporary memory by the largest buffers of one layer, or the logits."""
    expert = shape.expert_parameters * split.local_experts(shape.experts) / split.column_parts
    moe = shape.sparse_layers * (expert + shape.experts * shape.width)
    keys_values, embeddings = shape.layers * shape.key_value_parameters, shape.embedding_parameters
    others = shape.matrix_parameters - keys_values - embeddings
    others -= shape.sparse_layers * shape.experts * (shape.expert_parameters + shape.width)
    parts = split.attention_parts
    around = (
        others / parts + keys_values / split.heads_parts(shape.kv_heads) + embeddings / split.heads_parts(shape.vocab)
    )
    requests = work.batch * parts  # in the devices that share one attention
    cached = requests * work.context * shape.layers * shape.cached / _cache_parts(shape, split)
    tokens = work.tokens * split.copy_devices  # of a copy
    here = tokens if not split.row.tokens or split.row.exchange.__name__ == "gather_scatter" else work.tokens
    rows = tokens * shape.active / split.expert_parts * work.imbalance
    layer = here * shape.width * (2 * ITEM_BYTES + 4) + rows * ITEM_BYTES * (
        2 * shape.width + 3 * shape.expert_width / split.column_parts
    )
    logits = 4 * requests * shape.vocab / split.heads_parts(shape.vocab)
    return Memory(ITEM_BYTES * (moe + around), ITEM_BYTES * cached, max(layer, logits))


def _cache_parts(shape: ModelShape, split: Split) -> int:
    """How often the cache is split when the heads are: not beyond key/value heads, and a latent vector not at all."""
    return split.heads_parts(shape.kv_heads) if shape.has_cache_by_heads else 1


def predict(
    shape: ModelShape,
    machine: Machine,
    split: Split,
    work: Work,
    *,
    moe: Iterable[Collective] | None = None,
    temporary_bytes: float | None = None,
) -> Prediction:
    """One step under a split. `moe`, `temporary_bytes`: as counted in a program, in place of the formulas."""
    tokens = work.tokens * split.copy_devices  # of a copy
    if moe is None:
        moe = moe_collectives(
            split,
            tokens=tokens,
            width=shape.width,
            active=shape.active,
            capacity_factor=work.capacity_factor,
            devices_per_node=machine.devices_per_node,
        )
    moe = [_expected(collective, shape, split) for collective in moe]
    around = attention_collectives(shape, machine, split, work)
    communication_us = shape.sparse_layers * sum(collective_us(each, machine) for each in moe)
    communication_us += shape.layers * sum(collective_us(each, machine) for each in around)
    attention_us = shape.layers * attention_layer_us(shape, machine, split, work)
    experts_us = shape.sparse_layers * experts_layer_us(shape, machine, split, work)
    rest_us = _rest_us(shape, machine, split, work)
    total_s = (communication_us + attention_us + experts_us + rest_us) / 1e6
    estimated = memory(shape, split, work)
    if temporary_bytes is not None:
        estimated = dataclasses.replace(estimated, temporary=temporary_bytes)
    return Prediction(
        attention_ms=attention_us / 1e3,
        experts_ms=experts_us / 1e3,
        communication_ms=communication_us / 1e3,
        rest_ms=rest_us / 1e3,
        within_bytes=sum(each.within_bytes for each in moe) * shape.sparse_layers
        + sum(each.within_bytes for each in around) * shape.layers,
        between_bytes=sum(each.between_bytes for each in moe) * shape.sparse_layers
        + sum(each.between_bytes for each in around) * shape.layers,
        memory=estimated,
        tokens_per_s_per_device=work.tokens / total_s,
    )


def _expected(collective: Collective, shape: ModelShape, split: Split) -> Collective:
    """A ragged exchange has buffers for the worst routing; this many of its rows travel under uniform routing."""
    if collective.kind != RAGGED_ALL_TO_ALL:
        return collective
    devices = split.expert_parts
    fraction = mean_visits(shape.active, devices) / min(shape.active, devices)
    size = fraction * min(collective.in_bytes, collective.out_bytes)
    return dataclasses.replace(collective, in_bytes=size, out_bytes=size)


def attention_collectives(shape: ModelShape, machine: Machine, split: Split, work: Work) -> tuple[Collective, ...]:
    """Around one layer's attention: its sum over the devices that share the heads, and tokens to where experts want them."""
    size = work.tokens * split.copy_devices * shape.width * ITEM_BYTES
    groups = mesh_groups(split.sizes, EP_TP)
    devices, local = groups.shape[1], local_devices(groups, machine.devices_per_node)
    if devices == 1:
        return ()
    gather = Collective(ALL_GATHER, devices, local, size / devices, size)
    wants_all = not split.row.tokens
    if split.attention == "tp":
        reduce = Collective(ALL_REDUCE, devices, local, size, size)
        return (reduce,) if wants_all else (reduce, gather)
    return (gather,) if wants_all else ()


def collective_us(collective: Collective, machine: Machine) -> float:
    """Latency and bandwidth; links inside and between nodes work at the same time."""
    within_s = collective.within_bytes / (machine.within_bytes_per_s * machine.within_fraction)
    between_s = collective.between_bytes / (machine.between_bytes_per_s * machine.between_fraction)
    if collective.kind in (ALL_TO_ALL, RAGGED_ALL_TO_ALL):
        latency_us = machine.peer_us * collective.devices
        latency_us += machine.between_us if collective.nodes > 1 else machine.within_us
    else:
        phases = 2 if collective.kind == ALL_REDUCE else 1
        latency_us = phases * machine.within_us * (collective.local > 1)
        latency_us += phases * machine.between_us * math.log2(collective.nodes)
    return collective.times * latency_us + 1e6 * max(within_s, between_s)


def attention_layer_us(shape: ModelShape, machine: Machine, split: Split, work: Work) -> float:
    """Projections, and attention over the cache (decode) or among the prompt's tokens (prefill)."""
    parts = split.attention_parts
    tokens = work.tokens * parts  # that a device projects, with its part of the heads
    keys_values = shape.key_value_parameters
    parameters = (shape.attention - keys_values) / parts + keys_values / split.heads_parts(shape.kv_heads)
    projections = _dense_us(machine, parameters, tokens)
    if work.phase == DECODE:
        size = ITEM_BYTES * tokens * work.context * shape.cached / _cache_parts(shape, split)
        return projections + machine.attention_us + 1e6 * size / (machine.hbm_bytes_per_s * machine.cache_hbm_fraction)
    flops = 2 * tokens * work.context * shape.q_heads * shape.head_width / parts  # half of the square is masked
    return projections + machine.attention_us + 1e6 * flops / (machine.flops_per_s * machine.prefill_flops_fraction)


def experts_layer_us(shape: ModelShape, machine: Machine, split: Split, work: Work) -> float:
    """The busiest device's experts: the weights of those that are active, its routed rows."""
    tokens = work.tokens * split.copy_devices
    imbalance = work.imbalance if split.expert_parts > 1 else 1.0
    rows = min(imbalance / split.expert_parts, 1.0) * tokens * shape.active
    visited = shape.active_experts(tokens) / split.expert_parts
    visited = min(split.local_experts(shape.experts), max(visited * imbalance, min(1.0, rows)))
    columns = shape.expert_width / split.column_parts
    size = ITEM_BYTES * (visited * 3 * shape.width * columns + rows * (2 * shape.width + 3 * columns))
    return roofline_us(
        size,
        6 * rows * shape.width * columns,
        hbm=machine.hbm_bytes_per_s * machine.expert_hbm_fraction,
        flops_per_s=machine.flops_per_s * machine.expert_flops_fraction,
        start_us=machine.expert_us,
    )


def roofline_us(size: float, flops: float, *, hbm: float, flops_per_s: float, start_us: float) -> float:
    return start_us + 1e6 * max(size / hbm, flops / flops_per_s)


def _rest_us(shape: ModelShape, machine: Machine, split: Split, work: Work) -> float:
    parts = split.attention_parts
    tokens = work.tokens * parts
    head = _dense_us(machine, shape.vocab * shape.width / split.heads_parts(shape.vocab), work.batch * parts)
    dense, shared = (3 * shape.width * width / parts for width in (shape.dense_width, shape.shared_width))
    dense_layers = shape.layers - shape.sparse_layers
    return (
        head
        + (dense_layers * _dense_us(machine, dense, tokens) if dense_layers else 0)
        + (shape.sparse_layers * _dense_us(machine, shared, tokens) if shape.shared_width else 0)
    )


def _dense_us(machine: Machine, parameters: float, tokens: float) -> float:
    return roofline_us(
        ITEM_BYTES * parameters,
        2 * parameters * tokens,
        hbm=machine.hbm_bytes_per_s * machine.dense_hbm_fraction,
        flops_per_s=machine.flops_per_s * machine.dense_flops_fraction,
        start_us=machine.dense_us,
    )


# ---------------------------------------------------------------- calibration


@dataclasses.dataclass(frozen=True)
class ExpertPoint:
    """One measured MoE layer on one device."""

    read_bytes: float
    flops: float
    time_us: float


def fit_experts(machine: Machine, points: Sequence[ExpertPoint], source: str) -> tuple[Machine, float]:
    """The machine with `expert_*` fitted, and the mean relative error that is left (0.1: ten per cent).

    A search over fractions and starting times for the least squared logarithm of predicted over measured, so that short
    and long layers count alike.

    Raises:
      ValueError: fewer than three points, which cannot fix three constants.
    """
    if len(points) < 3:
        raise ValueError(f"expected at least 3 measured layers to fit 3 constants, got {len(points)}")
    fractions = np.arange(0.02, 1.001, 0.02)
    read_FX = 1e6 * np.array([p.read_bytes for p in points]) / (machine.hbm_bytes_per_s * fractions[:, None])
    flops_FX = 1e6 * np.array([p.flops for p in points]) / (machine.flops_per_s * fractions[:, None])
    longest_FFX = np.maximum(read_FX[:, None], flops_FX[None])
    measured_X = np.array([p.time_us for p in points])
    best = (math.inf, 0, 0, 0.0)
    for start_us in np.linspace(0, measured_X.min(), 41):
        error_FF = (np.log((start_us + longest_FFX) / measured_X) ** 2).mean(axis=2)
        row, column = np.unravel_index(error_FF.argmin(), error_FF.shape)
        best = min(best, (float(error_FF[row, column]), int(row), int(column), float(start_us)))
    _, row, column, start_us = best
    fitted = machines.with_constants(
        machine,
        source,
        expert_hbm_fraction=round(float(fractions[row]), 3),
        expert_flops_fraction=round(float(fractions[column]), 3),
        expert_us=round(start_us, 2),
    )
    left_X = (start_us + longest_FFX[row, column]) / measured_X
    return fitted, float(np.exp(np.abs(np.log(left_X))).mean() - 1)


def fit_links(machine: Machine, measured: Sequence[tuple[Collective, float]], source: str) -> Machine:
    """The machine with `within_us` and `within_fraction` fitted to collectives inside a node and their microseconds.

    Raises:
      ValueError: fewer than two, or some that leave the node.
    """
    if len(measured) < 2 or any(collective.nodes > 1 for collective, _ in measured):
        raise ValueError(f"expected at least 2 measured collectives inside one node, got {len(measured)}")
    sizes_X = np.array([collective.within_bytes for collective, _ in measured])
    phases_X = np.array([2 if collective.kind == ALL_REDUCE else 1 for collective, _ in measured])
    times_X = np.array([time_us for _, time_us in measured])
    # Weighted by 1 / time: relative errors, not those of the largest alone.
    system = np.stack([phases_X, 1e6 * sizes_X / machine.within_bytes_per_s], axis=1) / times_X[:, None]
    (start_us, slowness), *_ = np.linalg.lstsq(system, np.ones(len(measured)), rcond=None)
    return machines.with_constants(
        machine,
        source,
        within_us=round(max(float(start_us), 0.0), 2),
        within_fraction=round(1 / max(float(slowness), 1.0), 5),  # noise can make it negative: larger is faster
    )
