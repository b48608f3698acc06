"""Which device computes which expert, planned on the host from measured loads.

Experts are numbered twice: *experts* are the model's, *slots* are places for one expert's weights, `slots` of them on each
device, device after device. A busy expert gets several slots (replicas), and its tokens take turns. The plan enters the
jitted step as arrays (`Tables`), so that rebalancing compiles nothing; only `slots` x devices is fixed.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tables:
    """A plan as arrays, inputs of the jitted step. P slots in all, R at most per expert.

    phys2log_P: the expert in each slot. log2phys_ER: an expert's slots, cyclic after its `replicas_E` real ones.
    Example: expert 1 of 3 in slots 0 and 3 gives `log2phys_ER[1] = [0, 3, 0]`, `replicas_E[1] = 2`.
    """

    phys2log_P: Int[Array | np.ndarray, "P"]
    log2phys_ER: Int[Array | np.ndarray, "E R"]
    replicas_E: Int[Array | np.ndarray, "E"]


def expert_loads(experts_X: np.ndarray, num_experts: int) -> np.ndarray:
    """`[E]`: how often each expert was chosen; entries of -1 (dropped, or padding) do not count.

    Raises:
      ValueError: there are ids outside -1..E-1.
    """
    flat_X = np.asarray(experts_X).reshape(-1)
    if flat_X.size and (flat_X.min() < -1 or flat_X.max() >= num_experts):
        raise ValueError(f"expected experts within -1..{num_experts - 1}, got {flat_X.min()}..{flat_X.max()}")
    return np.bincount(flat_X[flat_X >= 0], minlength=num_experts)


def identity(num_experts: int, *, replicas: int = 1) -> Tables:
    """Every expert in the slot of its own number; the second dimension has room for that many replicas."""
    numbers_E = np.arange(num_experts, dtype=np.int32)
    return Tables(numbers_E, np.repeat(numbers_E[:, None], replicas, axis=1), np.ones(num_experts, np.int32))


def plan(loads_E: np.ndarray, *, devices: int, slots: int | None = None) -> Tables:
    """Slots for experts so that the busiest device has as little as a greedy choice gives.

    Spare slots go, one after another, to the expert whose replicas are busiest; then the busiest replicas are placed
    first, each on the least loaded device that has room and, where possible, not this expert yet (longest processing time
    first). `slots` per device, E / devices rounded up by default. The tables' shapes depend on E, devices and slots only.

    Raises:
      ValueError: loads are negative or not finite, or there are fewer slots than experts.
    """
    loads_E = np.asarray(loads_E, np.float64)
    num_experts = loads_E.size
    slots = -(-num_experts // max(devices, 1)) if slots is None else slots
    if loads_E.ndim != 1 or not np.all(np.isfinite(loads_E)) or (loads_E < 0).any():
        raise ValueError(f"expected one load of at least 0 for every expert, got {loads_E}")
    if devices < 1 or devices * slots < num_experts:
        raise ValueError(
            f"expected room for {num_experts} experts, got {devices} devices of {slots} slots: "
            f"try slots={-(-num_experts // max(devices, 1))}"
        )
    replicas_E = _replicas(loads_E, devices * slots, devices)
    return _placed(loads_E, replicas_E, devices, slots)


def _replicas(loads_E: np.ndarray, slots: int, devices: int) -> np.ndarray:
    """How many slots each expert gets, all slots used; more than one on every device helps nobody."""
    replicas_E = np.ones(loads_E.size, np.int32)
    for _ in range(slots - loads_E.size):
        share_E = np.where(replicas_E < devices, loads_E / replicas_E, -1.0)
        replicas_E[np.argmax(share_E)] += 1
    return replicas_E


def _placed(loads_E: np.ndarray, replicas_E: np.ndarray, devices: int, slots: int) -> Tables:
    shares_E = loads_E / replicas_E
    order = np.argsort(-shares_E, kind="stable")
    held: list[list[int]] = [[] for _ in range(devices)]
    load_N = np.zeros(devices)
    for expert in (int(e) for e in order for _ in range(replicas_E[e])):
        free = [device for device in range(devices) if len(held[device]) < slots]
        device = min(free, key=lambda d: (expert in held[d], load_N[d], len(held[d])))
        held[device].append(expert)
        load_N[device] += shares_E[expert]
    phys2log_P = np.array([expert for experts in held for expert in sorted(experts)], np.int32)
    most = devices * slots - loads_E.size + 1
    log2phys_ER = np.stack([np.resize(np.flatnonzero(phys2log_P == e), most) for e in range(loads_E.size)])
    return Tables(phys2log_P, log2phys_ER.astype(np.int32), replicas_E)


def device_loads(loads_E: np.ndarray, tables: Tables, *, devices: int) -> np.ndarray:
    """`[devices]`: what each computes when an expert's tokens are spread evenly over its replicas."""
    shares_E = np.asarray(loads_E, np.float64) / np.asarray(tables.replicas_E)
    return shares_E[np.asarray(tables.phys2log_P)].reshape(devices, -1).sum(axis=1)


def imbalance(loads_N: np.ndarray) -> float:
    """The busiest device's load against the mean: 1 is perfect, N is everything on one of N."""
    return float(np.max(loads_N) / np.mean(loads_N)) if np.sum(loads_N) else 1.0


def slots_of(experts_TA: Int[Array, "T A"], tables: Tables) -> Int[Array, "T A"]:
    """The slot that computes each choice: a token takes the replica of its own number, so that replicas take turns.

    -1 (dropped) stays -1. This runs inside the jitted step; the schemes then see slots in place of experts.
    """
    token_T1 = jnp.arange(experts_TA.shape[0], dtype=jnp.int32)[:, None]
    expert_TA = jnp.maximum(experts_TA, 0)
    turn_TA = token_T1 % jnp.asarray(tables.replicas_E)[expert_TA]
    slot_TA = jnp.asarray(tables.log2phys_ER)[expert_TA, turn_TA]
    return jnp.where(experts_TA >= 0, slot_TA, experts_TA)


def arranged(weights_EX: Array, tables: Tables) -> Array:
    """Weights slot by slot, `[P, ...]`, from weights expert by expert: what a rebalancing moves."""
    return jnp.take(weights_EX, jnp.asarray(tables.phys2log_P), axis=0)
