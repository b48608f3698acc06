"""Rotary position embeddings (arXiv:2104.09864) and the ways they are stretched to longer contexts.

The rules and defaults are those of Hugging Face's `modeling_rope_utils.py`. The odd ones are `dynamic` and `longrope`:
their frequencies depend on how long the request is at the moment, so keys cached early keep the frequencies of when they were
written.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")

_KEYS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    "longrope": ("factor", "attention_factor", "original_max_position_embeddings", "short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


@dataclasses.dataclass(frozen=True)
class Rope:
    """One rotary embedding. Fields carry Hugging Face's names; those a type does not use are None."""

    head_dim: int
    max_position_embeddings: int
    rope_theta: float
    rope_type: str = "default"
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None

    @classmethod
    def from_hf(
        cls, parameters: dict[str, Any] | None, *, rope_theta: float, head_dim: int, max_position_embeddings: int
    ) -> Rope:
        """Reads `rope_parameters` (transformers v5) or `rope_scaling` (before), refusing what it does not know.

        Raises:
          ValueError: unknown rope type, unknown or missing key.
        """
        given = dict(parameters or {})
        rope_type = given.pop("rope_type", None) or given.pop("type", None) or "default"
        given.pop("type", None)
        rope_theta = given.pop("rope_theta", None) or rope_theta
        if rope_type not in ROPE_TYPES:
            raise ValueError(f"expected rope_type to be one of {', '.join(ROPE_TYPES)}, got {rope_type!r}")
        if given.pop("partial_rotary_factor", None) not in (None, 1, 1.0):
            raise ValueError(
                "partial_rotary_factor other than 1 is not supported by this family (nor by its Hugging Face code)"
            )
        if rope_type in ("linear", "dynamic"):
            # Written by some configs for these types and read by none of their code.
            given.pop("original_max_position_embeddings", None)
        unknown = sorted(set(given) - set(_KEYS[rope_type]))
        missing = sorted(key for key in _REQUIRED[rope_type] if given.get(key) is None)
        if unknown or missing:
            expected = ", ".join(_KEYS[rope_type]) or "none"
            raise ValueError(
                f"rope type {rope_type!r}: unknown keys {unknown}, missing keys {missing}; expected keys: {expected}"
            )
        given.update({key: tuple(given[key]) for key in ("short_factor", "long_factor") if key in given})
        if rope_type in ("yarn", "longrope", "llama3") and given.get("original_max_position_embeddings") is None:
            given["original_max_position_embeddings"] = max_position_embeddings
        return cls(
            head_dim=head_dim,
            max_position_embeddings=max_position_embeddings,
            rope_theta=float(rope_theta),
            rope_type=rope_type,
            **given,
        )

    @property
    def context_length(self) -> int | None:
        """Positions the embedding was made for; `dynamic` stretches with every request and has no bound."""
        return None if self.rope_type == "dynamic" else self.max_position_embeddings

    def tables(self, positions_BT: jax.Array, lengths_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        """cos and sin, each `[B, T, H/2]` float32. `lengths_B` is how long each request is now."""
        frequencies, scale = _inverse_frequencies(self, lengths_B)
        angles_BTH = positions_BT[..., None].astype(jnp.float32) * frequencies
        return jnp.cos(angles_BTH) * scale, jnp.sin(angles_BTH) * scale


def rotate(x_BTNH: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the pairs (h, h + H/2) of every head; float32 inside, x's dtype outside."""
    cos, sin = (table[:, :, None, :] for table in tables)
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTNH.dtype)


def _inverse_frequencies(rope: Rope, lengths_B: jax.Array) -> tuple[jax.Array | np.ndarray, float]:
    """`[H/2]`, or `[B, 1, H/2]` where they depend on the request, and the factor on cos and sin."""
    if rope.rope_type == "dynamic":
        return _dynamic(rope, lengths_B), 1.0
    if rope.rope_type == "longrope":
        return _longrope(rope, lengths_B)
    plain = 1.0 / _powers(rope)
    if rope.rope_type == "linear":
        return plain / np.float32(rope.factor), 1.0
    if rope.rope_type == "yarn":
        return _yarn(rope)
    if rope.rope_type == "llama3":
        return _llama3(rope, plain), 1.0
    return plain, 1.0


def _exponents(rope: Rope) -> np.ndarray:
    return np.arange(0, rope.head_dim, 2).astype(np.float32) / np.float32(rope.head_dim)


def _powers(rope: Rope) -> np.ndarray:
    return np.float32(rope.rope_theta) ** _exponents(rope)


def _dynamic(rope: Rope, lengths_B: jax.Array) -> jax.Array:
    """NTK scaling by the request's length, once it is longer than the model was trained for."""
    factor, trained = rope.factor or 1.0, rope.max_position_embeddings
    lengths_B = jnp.maximum(lengths_B, trained).astype(jnp.float32)
    stretch_B = (factor * lengths_B / trained) - (factor - 1)
    base_B = rope.rope_theta * stretch_B ** (rope.head_dim / (rope.head_dim - 2))
    return 1.0 / base_B[:, None, None] ** _exponents(rope)


def _yarn(rope: Rope) -> tuple[np.ndarray, float]:
    """YaRN (arXiv:2309.00071): low frequencies interpolated, high ones kept, a ramp between."""
    half, original = rope.head_dim // 2, rope.original_max_position_embeddings or 1
    factor = rope.factor or 1.0

    def dimension_of(rotations: float) -> float:
        return rope.head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low, high = dimension_of(rope.beta_fast or 32), dimension_of(rope.beta_slow or 1)
    if rope.truncate is None or rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.head_dim - 1)
    ramp = np.clip((np.arange(half, dtype=np.float32) - low) / ((high - low) or 0.001), 0, 1)
    powers = _powers(rope)
    frequencies = (1 / (np.float32(factor) * powers)) * ramp + (1 / powers) * (1 - ramp)
    return frequencies.astype(np.float32), _yarn_scale(rope, factor)


def _yarn_scale(rope: Rope, factor: float) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    def magnitude(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return magnitude(1.0)


def _longrope(rope: Rope, lengths_B: jax.Array) -> tuple[jax.Array, float]:
    """LongRoPE (arXiv:2402.13753): a factor for each frequency, one set for requests beyond the original context."""
    original = rope.original_max_position_embeddings or rope.max_position_embeddings
    short, long = (
        1.0 / (np.asarray(factors, np.float32) * _powers(rope)) for factors in (rope.short_factor, rope.long_factor)
    )
    frequencies = jnp.where(lengths_B[:, None, None] > original, long, short)
    factor = rope.max_position_embeddings / original if rope.factor is None else rope.factor
    if rope.attention_factor is not None:
        return frequencies, rope.attention_factor
    return frequencies, 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def _llama3(rope: Rope, plain: np.ndarray) -> np.ndarray:
    """Llama 3.1: long wavelengths divided by the factor, short ones kept, a smooth step between."""
    factor, low, high = rope.factor or 1.0, rope.low_freq_factor or 1.0, rope.high_freq_factor or 1.0
    original = rope.original_max_position_embeddings or 1
    wavelengths = 2 * math.pi / plain
    smooth = (original / wavelengths - low) / (high - low)
    stepped = (1 - smooth) * plain / factor + smooth * plain
    stretched = np.where(wavelengths > original / low, plain / factor, plain)
    is_between = (wavelengths >= original / high) & (wavelengths <= original / low)
    return np.where(is_between, stepped, stretched).astype(np.float32)
