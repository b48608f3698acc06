"""How one model lies on one mesh: strategies for prefill and decode, attention, and what follows for arrays and layers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sharding.axes import DIMENSIONS, EP_TP, Axes
from sharding.expert_parallel import NO_EXPERT, ExpertFn
from sharding.placement import Tables, slots_of
from sharding.strategies import ATTENTION, STRATEGIES, Strategy

DEFAULT_STRATEGY = "eptp_psum"

# These are split over as many of the axes as divide them, first axes first, and replicated over the rest: there may be
# fewer key/value heads than devices, and vocabularies are odd. Others have to divide.
MAY_REPLICATE = ("kv_heads", "vocab")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where parameters, caches and tokens of a model go. Hashable: part of what a program is compiled for."""

    mesh: Mesh | AbstractMesh
    prefill: Strategy
    decode: Strategy
    attention: str
    capacity_factor: float | None = None

    @property
    def requests(self) -> Axes:
        """The axes that split requests outside of the experts."""
        return ("dp",) if self.attention == "tp" else ("dp", *EP_TP)

    def axes_of(self, dimension: str | None) -> Axes:
        """The axes that split a parameter's dimension."""
        table = {"experts": self.decode.experts, "expert_mlp": self.decode.expert_mlp, **ATTENTION[self.attention]}
        return table.get(dimension, ()) if dimension is not None else ()

    def parts(self, axes: Axes) -> int:
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def placement(self, name: str, dimensions: tuple[str | None, ...], shape: tuple[int, ...]) -> Placement:
        """Where a parameter goes.

        Raises:
          ValueError: an unknown dimension, or one that the mesh does not divide (with what to try).
        """
        spec: list[Axes | None] = []
        padded = list(shape)
        for place, (dimension, size) in enumerate(zip(dimensions, shape, strict=True)):
            if dimension is not None and dimension not in DIMENSIONS:
                raise ValueError(f"{name}: unknown dimension {dimension!r}, expected one of {', '.join(DIMENSIONS)}")
            axes = self.axes_of(dimension)
            if dimension in MAY_REPLICATE:
                axes = self.dividing(axes, size)
            parts = self.parts(axes)
            if dimension == "experts":
                padded[place] = -(-size // parts) * parts
            elif size % parts:
                raise ValueError(f"{name}: {self._refusal(str(dimension), size, axes)}")
            spec.append(axes or None)
        return Placement(NamedSharding(self.mesh, P(*spec)), shape, tuple(padded))

    def dividing(self, axes: Axes, size: int) -> Axes:
        """The longest beginning of `axes` whose devices divide `size`."""
        return next(axes[:n] for n in range(len(axes), -1, -1) if size % self.parts(axes[:n]) == 0)

    def _refusal(self, dimension: str, size: int, axes: Axes) -> str:
        remedy = 'or attention="dp"' if dimension in ATTENTION["tp"] else "or a strategy that splits whole experts"
        return (
            f"{dimension} has {size} entries, which {self.parts(axes)} devices ({' x '.join(axes)}) do not divide; "
            f"try mesh sizes whose product divides {size}, {remedy}"
        )

    def exchange(self) -> Exchange:
        return Exchange(self.mesh, self.prefill, self.decode, self.capacity_factor)

    def settled(self, tree: Any, *, is_cache: Callable[[Any], bool]) -> Any:
        """Inside jit: caches split as attention wants them, everything else on every device, so that any host can read it."""
        settle = lambda part: jax.tree.map(self._cached if is_cache(part) else self._replicated, part)  # noqa: E731
        return jax.tree.map(settle, tree, is_leaf=is_cache)

    def cache_sharding(self, shape: tuple[int, ...]) -> NamedSharding:
        """Of keys or values `[B, K, S, H]`, split by requests and by heads as far as they divide; or of positions `[B]`."""
        axes = [self.dividing(self.requests, shape[0])]
        if len(shape) > 1:
            axes.append(self.dividing(self.axes_of("kv_heads"), shape[1]))
        return NamedSharding(self.mesh, P(*(each or None for each in axes)))

    def split_logits(self, logits_XV: jax.Array) -> jax.Array:
        """Inside jit: logits as the head's matrix is split, which XLA would otherwise gather whole to give them whole."""
        axes = [
            self.dividing(self.requests, logits_XV.shape[0]),
            self.dividing(self.axes_of("vocab"), logits_XV.shape[-1]),
        ]
        rows, columns = (each or None for each in axes)
        spec = P(rows, *(None,) * (logits_XV.ndim - 2), columns)
        return lax.with_sharding_constraint(logits_XV, NamedSharding(self.mesh, spec))

    def _cached(self, x_BX: jax.Array) -> jax.Array:
        return lax.with_sharding_constraint(x_BX, self.cache_sharding(x_BX.shape))

    def _replicated(self, x: jax.Array) -> jax.Array:
        return lax.with_sharding_constraint(x, NamedSharding(self.mesh, P()))


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a parameter goes, and its shape there: experts are filled up with zeros to a multiple of the devices.

    Example: 6 experts over 4 devices become 8, and the last device has only empty ones.
    """

    sharding: NamedSharding
    shape: tuple[int, ...]
    padded_shape: tuple[int, ...]

    @property
    def loading(self) -> NamedSharding:
        """Where to load it before it is filled up: split along any dimension that allows it."""
        if self.shape == self.padded_shape:
            return self.sharding
        is_padded = [here != there for here, there in zip(self.shape, self.padded_shape, strict=True)]
        spec = [None if padded else axes for padded, axes in zip(is_padded, self.sharding.spec, strict=True)]
        mesh = self.sharding.mesh
        parts = math.prod(mesh.shape[axis] for axis in EP_TP)
        if not any(spec):
            split = next((place for place, size in enumerate(self.shape) if size % parts == 0), None)
            spec = [EP_TP if place == split else None for place in range(len(spec))]
        return NamedSharding(mesh, P(*spec))

    def filled_up(self, values: jax.Array) -> jax.Array:
        if self.shape == self.padded_shape:
            return values
        widths = [(0, there - here) for here, there in zip(self.shape, self.padded_shape, strict=True)]
        return jax.jit(lambda x: jnp.pad(x, widths), out_shardings=self.sharding)(values)

    def cut_back(self, values: jax.Array) -> jax.Array:
        """The parameter as checkpoints have it."""
        if self.shape == self.padded_shape:
            return values
        return jax.jit(lambda x: lax.slice(x, (0,) * x.ndim, self.shape), out_shardings=self.loading)(values)


@dataclasses.dataclass(frozen=True)
class Exchange:
    """A sparse layer's way over the mesh. One token per request is decoding; more are prefill."""

    mesh: Mesh | AbstractMesh
    prefill: Strategy
    decode: Strategy
    capacity_factor: float | None = None

    def strategy(self, *, is_decode: bool) -> Strategy:
        return self.decode if is_decode else self.prefill

    def tokenwise(self, fn: Callable[..., Any], x_TD: jax.Array, *replicated: Any, is_decode: bool) -> Any:
        """`fn(x_TD, *replicated)` by each device on the tokens that it has; results have a row for each token."""
        tokens = P(self._token_axes(is_decode))
        split = self._sharded(fn, (tokens, *(P() for _ in replicated)), tokens)
        return self._on_even_rows(lambda x_TD: split(x_TD, *replicated), (x_TD,), (0,), is_decode)

    def experts(
        self,
        expert_fn: Callable[..., jax.Array],
        x_TD: jax.Array,
        experts_TA: jax.Array,
        weights_TA: jax.Array,
        *parameters: jax.Array,
        dimensions: Iterable[tuple[str | None, ...]],
        is_decode: bool,
        tables: Tables | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """The expert layer over the mesh: y_TD, and which choices were computed, `[T, A]`.

        Args:
          expert_fn: `expert_fn(x_TD, experts_TA, weights_TA, *parameters) -> y_TD` on one device's tokens and experts;
            see `sharding.expert_parallel`.
          parameters: arrays over all experts, whose dimensions `dimensions` names.
          tables: where each expert's weights are, when `parameters` are arrays over slots; see `sharding.placement`.
        """
        if tables is not None:
            experts_TA = slots_of(experts_TA, tables)
        strategy, tokens = self.strategy(is_decode=is_decode), P(self._token_axes(is_decode))
        axes = {"experts": strategy.experts, "expert_mlp": strategy.expert_mlp}
        dimensions = tuple(dimensions)
        specs = tuple(P(*(axes.get(str(each)) or None for each in names)) for names in dimensions)
        place = dimensions[0].index("experts")

        def body(x_TD, experts_TA, weights_TA, *parameters):
            run: ExpertFn = lambda *rows: expert_fn(*rows, *parameters)  # noqa: E731
            return strategy.exchange(
                run,
                x_TD,
                experts_TA,
                weights_TA,
                num_local=parameters[0].shape[place],
                ep=strategy.experts,
                tp=strategy.expert_mlp,
                capacity_factor=self.capacity_factor,
            )

        split = self._sharded(body, (tokens, tokens, tokens, *specs), (tokens, tokens))
        rows = (x_TD, experts_TA, weights_TA)
        return self._on_even_rows(lambda *rows: split(*rows, *parameters), rows, (0, NO_EXPERT, 0), is_decode)

    def _token_axes(self, is_decode: bool) -> Axes:
        return ("dp", *self.strategy(is_decode=is_decode).tokens)

    def _sharded(self, fn, in_specs, out_specs):
        return jax.shard_map(fn, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def _on_even_rows(self, fn, rows: tuple[jax.Array, ...], empty: tuple[int, ...], is_decode: bool):
        """Fills up the rows to a multiple of the devices that share them, and drops what was filled up from the results."""
        T = rows[0].shape[0]
        parts = math.prod(self.mesh.shape[axis] for axis in self._token_axes(is_decode))
        missing = -T % parts
        if not missing:
            return fn(*rows)
        filled = (
            jnp.pad(each, ((0, missing), (0, 0)), constant_values=value)
            for each, value in zip(rows, empty, strict=True)
        )
        return jax.tree.map(lambda y: y[:T], fn(*filled))


def plan_layout(
    mesh: Mesh | AbstractMesh,
    *,
    strategy: str | None = None,
    attention: str | None = None,
    capacity_factor: float | None = None,
) -> Layout:
    """Checks a choice of strategies.

    Args:
      strategy: one of `STRATEGIES`, or two for prefill and decode, "ep_agrs/ep_psum"; "eptp_psum" by default.
      attention: "tp" or "dp"; by default "dp" where the decode strategy splits tokens, else "tp".
      capacity_factor: of `ep_a2a` and `eptp_dp`: see `expert_parallel.all_to_all`. None drops nothing.

    Raises:
      ValueError: unknown names, two strategies that place weights differently, or a factor that nothing uses.
    """
    names = (strategy or DEFAULT_STRATEGY).split("/")
    unknown = [name for name in names if name not in STRATEGIES]
    if unknown or len(names) > 2:
        raise ValueError(
            f"expected strategy to be one of {', '.join(STRATEGIES)}, or two of them for prefill and decode like "
            f"'ep_agrs/ep_psum', got {strategy!r}"
        )
    prefill, decode = STRATEGIES[names[0]], STRATEGIES[names[-1]]
    if _weight_axes(mesh, prefill) != _weight_axes(mesh, decode):
        alike = [each.name for each in STRATEGIES.values() if _weight_axes(mesh, each) == _weight_axes(mesh, prefill)]
        raise ValueError(
            f"strategy {strategy!r}: on this mesh {prefill.name} and {decode.name} keep different weights on a device; "
            f"beside {prefill.name} decode can use {', '.join(alike)}"
        )
    attention = attention or ("dp" if decode.tokens else "tp")
    if attention not in ATTENTION:
        raise ValueError(f"expected attention to be one of {', '.join(ATTENTION)}, got {attention!r}")
    if capacity_factor is not None:
        _check_capacity(capacity_factor, (prefill, decode))
    return Layout(mesh, prefill, decode, attention, capacity_factor)


def _weight_axes(mesh: Mesh | AbstractMesh, strategy: Strategy) -> tuple[Axes, Axes]:
    """What decides which weights a device keeps: axes of one device split nothing."""
    of_experts, of_width = (
        tuple(axis for axis in axes if mesh.shape[axis] > 1) for axes in (strategy.experts, strategy.expert_mlp)
    )
    return of_experts, of_width


def _check_capacity(factor: float, strategies: tuple[Strategy, ...]) -> None:
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < math.inf:
        raise ValueError(f"expected capacity_factor to be a positive number, or None for lossless, got {factor!r}")
    if not any(each.has_capacity for each in strategies):
        able = ", ".join(each.name for each in STRATEGIES.values() if each.has_capacity)
        raise ValueError(f"capacity_factor={factor} has no use: only {able} have a capacity, got {strategies[0].name}")
