"""Chooses an implementation of an op for the arguments at hand, and says why the others were passed over.

Every op keeps a tuple of `Implementation`s, fastest first. Each says once, in one sentence, why it cannot run a call
(`supports` returns that sentence, or None when it can); choosing, error messages, tests and `explain` all use it.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Device:
    """What a kernel needs to know of the device that will run it.

    `is_interpreted`: a CPU pretends to be it (`interpret.interpreting`), without what the interpreter does not model.
    `is_partitioned`: it is one of several, and XLA splits the computation over them, which it cannot do with a kernel. Inside
      `shard_map` a computation is one device's own, and kernels run.
    """

    platform: str
    kind: str
    num_sms: int = 0
    is_interpreted: bool = False
    is_partitioned: bool = False

    @property
    def is_hopper(self) -> bool:
        """Whether Hopper kernels can run on it."""
        is_one = any(name in self.kind for name in ("H100", "H200", "H800", "H20", "GH200"))
        return is_one and self.platform == "gpu" and not self.is_partitioned


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    `supports(device, *args, **kwargs)` gets the op's own arguments and returns None, or the reason why it cannot run
    them. It looks at shapes, dtypes and static arguments only. `run(*args, **kwargs)` computes.
    `candidates(*args, **kwargs)` lists the settings worth trying, the default first, each a value for `run`'s
    additional argument `settings`; None where there is nothing to tune.
    """

    name: str
    supports: Callable[..., str | None]
    run: Callable[..., Any]
    candidates: Callable[..., list[dict[str, Any]]] | None = None


_compiling_for: contextvars.ContextVar[Device | None] = contextvars.ContextVar("compiling_for", default=None)


def current_device() -> Device:
    """The device that computations go to by default, or the one named by `compiling_for`."""
    mesh = jax.sharding.get_abstract_mesh()
    device = _compiling_for.get() or _default_device()
    if mesh.size <= 1 or mesh.are_all_axes_manual:
        return device
    kind = f"{device.kind} (one of {mesh.size} that XLA splits this computation over)"
    return dataclasses.replace(device, kind=kind, is_partitioned=True)


def _default_device() -> Device:
    device = jax.config.jax_default_device or jax.devices()[0]
    if isinstance(device, str):
        device = jax.devices(device)[0]
    return Device(device.platform, device.device_kind, int(getattr(device, "core_count", 0) or 0))


@contextlib.contextmanager
def compiling_for(device: Device) -> Iterator[None]:
    """Chooses implementations for `device` inside the context, for compiling ahead of time on another machine."""
    token = _compiling_for.set(device)
    try:
        yield
    finally:
        _compiling_for.reset(token)


def choose(
    op: str, implementations: Sequence[Implementation], *args: Any, implementation: str | None = None, **kwargs: Any
) -> Implementation:
    """The first implementation that supports the arguments, or the one named.

    Raises:
      ValueError: no implementation has that name, or the named one cannot run these arguments (with its reason).
    """
    device = current_device()
    if implementation is None:
        for candidate in implementations:
            if candidate.supports(device, *args, **kwargs) is None:
                return candidate
        raise ValueError(f"{op}: nothing runs these arguments.\n{_table(explain(implementations, *args, **kwargs))}")
    for candidate in implementations:
        if candidate.name == implementation:
            reason = candidate.supports(device, *args, **kwargs)
            if reason is not None:
                raise ValueError(
                    f"{op}: implementation {implementation!r} cannot run this call: {reason}. "
                    "Pass implementation=None to take the fastest that can."
                )
            return candidate
    names = ", ".join(repr(candidate.name) for candidate in implementations)
    raise ValueError(f"{op}: expected implementation to be None or one of {names}, got {implementation!r}")


def explain(implementations: Sequence[Implementation], *args: Any, **kwargs: Any) -> list[tuple[str, str | None]]:
    """Each implementation's name with None (it can run this call) or the reason why it cannot, fastest first."""
    device = current_device()
    return [(candidate.name, candidate.supports(device, *args, **kwargs)) for candidate in implementations]


def _table(rows: list[tuple[str, str | None]]) -> str:
    return "\n".join(f"  {name}: {reason or 'can run'}" for name, reason in rows)
