"""What `matvec` is tested, compiled and measured on: projections of real checkpoints, and cases chosen to be awkward."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax

from pallas_kernels.experts.api import Activation


@dataclasses.dataclass(frozen=True)
class Projection:
    """From a width of `width` to each of `outs`, and what is around. `gates`: the weight's G, beside an activation."""

    width: int
    outs: tuple[int, ...]
    has_norm: bool = False
    has_bias: bool = False
    has_residual: bool = False
    activation: Activation | None = None
    gates: int = 2
    out_dtype: Literal["float32"] | None = None

    @property
    def weight_bytes(self) -> int:
        return 2 * self.width * sum(self.outs) * (self.gates if self.activation else 1)


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    tokens: int
    projection: Projection
    dtype: Literal["bfloat16", "float32"] = "bfloat16"


AWKWARD: tuple[Case, ...] = (
    Case("several_rows", 5, Projection(192, (64,))),
    Case("one_row", 1, Projection(128, (128,))),
    Case("off_the_tile", 13, Projection(64, (48,))),
    Case("a_whole_tile", 64, Projection(128, (80,))),
    Case("longer_than_the_ring", 3, Projection(1216, (64,))),
    Case("query_key_value", 4, Projection(128, (128, 64, 16))),
    Case("norm", 3, Projection(192, (80,), has_norm=True)),
    Case("norm_of_many_rows", 33, Projection(128, (64,), has_norm=True)),
    Case("residual", 12, Projection(64, (144,), has_residual=True)),
    Case("biases_and_norm", 6, Projection(128, (64, 80), has_norm=True, has_bias=True)),
    Case("bias_and_residual", 9, Projection(128, (64,), has_bias=True, has_residual=True)),
    Case("gated", 5, Projection(128, (80,), activation="silu")),
    Case("gated_norm", 8, Projection(256, (64,), has_norm=True, activation="gelu_tanh")),
    Case("gated_clamped_bias_residual", 1, Projection(128, (64,), False, True, True, activation="swiglu_clamped")),
    Case("relu_without_gate", 7, Projection(64, (32,), activation="relu", gates=1)),
    Case("logits", 3, Projection(128, (104,), has_norm=True, out_dtype="float32")),
    Case("residual_of_odd_width", 9, Projection(64, (72,), has_residual=True)),
    Case("float32", 7, Projection(64, (32,)), dtype="float32"),
)
PROJECTIONS: dict[str, Projection] = {
    "square-2048": Projection(2048, (2048,)),
    "wide-6144": Projection(2048, (6144,)),
    "square-4096": Projection(4096, (4096,)),
    "qwen3-30b-query-key-value": Projection(2048, (4096, 512, 512), has_norm=True),
    "qwen3-30b-out": Projection(4096, (2048,), has_residual=True),
    "qwen3-30b-head": Projection(2048, (151936,), has_norm=True, out_dtype="float32"),
    "gpt-oss-query-key-value": Projection(2880, (4096, 512, 512), has_norm=True, has_bias=True),
    "gpt-oss-out": Projection(4096, (2880,), has_bias=True, has_residual=True),
    "qwen1.5-shared-up": Projection(2048, (5632,), activation="silu"),
    "deepseek-v3-shared-up": Projection(7168, (2048,), has_norm=True, activation="silu"),
}
TOKENS = (1, 16, 64)
REAL: tuple[Case, ...] = tuple(
    Case(f"{name}-{tokens}", tokens, projection) for name, projection in PROJECTIONS.items() for tokens in TOKENS
)


def arguments(case: Case, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The case's positional and keyword arguments: random, scaled so that values stay of unit size."""
    projection = case.projection
    keys = iter(jax.random.split(jax.random.key(seed, impl="rbg"), 3 + 2 * len(projection.outs)))

    def uniform(*shape: int, scale: float = 1.0, mean: float = 0.0) -> jax.Array:
        bound = 3**0.5 * scale  # of variance scale squared
        return jax.random.uniform(next(keys), shape, case.dtype, minval=mean - bound, maxval=mean + bound)

    gates = (projection.gates,) if projection.activation else ()
    width, outs = projection.width, projection.outs
    operands = (
        uniform(case.tokens, width),
        tuple(uniform(*gates, out, width, scale=width**-0.5) for out in outs),
    )
    return operands, dict(
        norm_weight_I=uniform(width, scale=0.25, mean=1.0) if projection.has_norm else None,
        bias_O=tuple(uniform(out) for out in outs) if projection.has_bias else None,
        residual_TO=uniform(case.tokens, outs[0]) if projection.has_residual else None,
        activation=projection.activation,
        out_dtype=projection.out_dtype,
    )
