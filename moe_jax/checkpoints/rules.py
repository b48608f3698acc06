"""Weight tables: which tensors of a checkpoint fill which parameter, in both directions.

A family lists one `Rule` per kind of tensor, the hub's spelling first:

    Rule("model.layers.{layer}.self_attn.q_proj.weight", "layers.{layer}.attention.q_NHD", "(n h) d -> n h d")
    Rule("model.layers.{layer}.mlp.experts.{expert}.up_proj.weight", "layers.{layer}.moe.up_EGFD", at=("{expert}", 1))

The first reshapes one tensor into one parameter; the second fills slice `[expert, 1]` of a stacked parameter, whose
other slices other tensors fill. `load` accepts whichever spelling the files have, `save` writes the first.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Rule:
    """The tensor named `hf` fills the parameter at path `ours`, or the slice `at` of it.

    `{layer}`, `{expert}` and other names in braces stand for numbers. `rearrange` tells how the tensor's dimensions
    become those of the parameter (of the slice, with `at`): names in parentheses are folded into one dimension, and
    only there, on the left.

    Rules for one parameter that follow each other with different `at` belong to one spelling and fill it together.

    Raises:
      ValueError: `rearrange` does not name the same dimensions left and right, or a number in `hf` is determined by
        neither `ours` nor `at`.
    """

    hf: str
    ours: str
    rearrange: str | None = None
    at: tuple[str | int, ...] = ()

    def __post_init__(self) -> None:
        known = _placeholders(self.ours) | {entry[1:-1] for entry in self.at if isinstance(entry, str)}
        if unknown := _placeholders(self.hf) - known:
            raise ValueError(f"{self.hf}: expected {sorted(unknown)} to occur in {self.ours!r} or in at={self.at}")
        if self.rearrange is not None:
            _parsed(self.rearrange)

    def tensor_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that the tensor must have, from that of the whole parameter."""
        shape = shape[len(self.at) :]
        if self.rearrange is None:
            return shape
        groups, names = _parsed(self.rearrange)
        if len(names) != len(shape):
            raise ValueError(f"{self.ours}: {self.rearrange!r} makes {len(names)} dimensions, got shape {list(shape)}")
        sizes = dict(zip(names, shape, strict=True))
        return tuple(math.prod(sizes[name] for name in group) for group in groups)

    def to_ours(self, tensor: Any, shape: tuple[int, ...]) -> Any:
        """The tensor as (a slice of) the parameter of that shape. Of a memory map it is a view: nothing is read."""
        if self.rearrange is None:
            return tensor
        groups, names = _parsed(self.rearrange)
        sizes = dict(zip(names, shape[len(self.at) :], strict=True))
        order = [name for group in groups for name in group]
        return tensor.reshape([sizes[name] for name in order]).transpose([order.index(name) for name in names])

    def to_hf(self, values: Any) -> Any:
        """The inverse of `to_ours`: the tensor of a parameter, or of the slice `at`."""
        if self.rearrange is None:
            return values
        groups, names = _parsed(self.rearrange)
        order = [name for group in groups for name in group]
        sizes = dict(zip(names, values.shape, strict=True))
        return values.transpose([names.index(name) for name in order]).reshape(
            [math.prod(sizes[name] for name in group) for group in groups]
        )


@dataclasses.dataclass(frozen=True)
class Ignored:
    """A tensor that some checkpoints carry and that says nothing, such as a buffer computed from the config."""

    hf: str
    why: str

    def matches(self, name: str) -> bool:
        return _pattern(self.hf).fullmatch(name) is not None


@dataclasses.dataclass(frozen=True)
class Copy:
    """A tensor that some checkpoints carry although it is tied to a parameter: its bits must equal the parameter's own.

    Where the parameter's own tensor is absent, the copy fills it: writers that drop duplicates keep either name.
    """

    hf: str
    ours: str


Rules = Iterable[Rule | Ignored | Copy]


@dataclasses.dataclass(frozen=True)
class Part:
    """One tensor's place: `name` fills slice `[*at]` of a parameter (all of it where `at` is empty)."""

    name: str
    at: tuple[int, ...]
    rule: Rule


def spellings(path: str, shape: tuple[int, ...], rules: Rules) -> list[list[Part]]:
    """The ways a checkpoint may hold a parameter, the hub's first: each lists the tensors that fill it together.

    Raises:
      ValueError: no rule fills the parameter, or a spelling does not fill every slice exactly once.
    """
    found: list[list[Rule]] = []
    for rule in rules:
        if isinstance(rule, Rule) and _pattern(rule.ours).fullmatch(path):
            is_continued = found and rule.at and all(other.at and other.at != rule.at for other in found[-1])
            if is_continued:
                found[-1].append(rule)
            else:
                found.append([rule])
    if not found:
        raise ValueError(f"no rule fills the parameter {path}")
    return [_parts(path, shape, spelling) for spelling in found]


def copies(path: str, rules: Rules) -> list[str]:
    """Names of tensors that may duplicate the parameter."""
    return [
        rule.hf.format(**match.groupdict())
        for rule in rules
        if isinstance(rule, Copy) and (match := _pattern(rule.ours).fullmatch(path))
    ]


def _parts(path: str, shape: tuple[int, ...], spelling: list[Rule]) -> list[Part]:
    parts = [part for rule in spelling for part in _parts_of(rule, path, shape)]
    slices = {part.at for part in parts}
    expected = math.prod(shape[: len(spelling[0].at)])
    if not len(slices) == len(parts) == expected:
        names = ", ".join(rule.hf for rule in spelling)
        raise ValueError(
            f"{path} {list(shape)}: expected {expected} slices to be filled once, got {len(parts)} by {names}"
        )
    return parts


def _parts_of(rule: Rule, path: str, shape: tuple[int, ...]) -> Iterable[Part]:
    match = _pattern(rule.ours).fullmatch(path)
    assert match is not None
    choices = [range(size) if isinstance(entry, str) else (entry,) for entry, size in zip(rule.at, shape, strict=False)]
    for at in itertools.product(*choices):
        numbers = {entry[1:-1]: number for entry, number in zip(rule.at, at, strict=True) if isinstance(entry, str)}
        yield Part(rule.hf.format(**match.groupdict(), **numbers), at, rule)


def _placeholders(template: str) -> set[str]:
    return set(re.findall(r"{(\w+)}", template))


@functools.cache
def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\d+)", re.escape(template)))


@functools.cache
def _parsed(rearrange: str) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]:
    """Left side as groups of names, right side as names: "(n h) d -> n h d" gives ((n, h), (d,)) and (n, h, d)."""
    left, _, right = rearrange.partition("->")
    groups = tuple(tuple((group or name).split()) for group, name in re.findall(r"\(([^()]*)\)|(\w+)", left))
    names = tuple(right.split())
    flat = [name for group in groups for name in group]
    is_nested = re.sub(r"\([^()]*\)|\w+|\s", "", left) != ""
    if is_nested or len(set(flat)) != len(flat) or sorted(flat) != sorted(names):
        raise ValueError(f'expected the same names on both sides, like "(n h) d -> n h d", got {rearrange!r}')
    return groups, names
