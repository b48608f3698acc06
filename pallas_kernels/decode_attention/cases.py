"""What `decode_attention` is tested, compiled and measured on: heads of real checkpoints, and awkward ones."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Heads:
    """N query heads and K key/value heads of width H. `norm`: RMSNorm of queries and keys over a head or the projection."""

    query: int
    kv: int
    width: int
    norm: Literal["head", "projection"] | None = None
    clip: float | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """`positions[b]` is where request b's new token goes; a single number is of all `tokens` requests."""

    name: str
    tokens: int
    heads: Heads
    capacity: int
    positions: int | tuple[int, ...]
    window: int | None = None
    dtype: Literal["bfloat16", "float32"] = "bfloat16"

    @property
    def cache_bytes(self) -> int:
        """What has to be read of the cache."""
        seen = jnp.minimum(self.position_B, self.window or self.capacity)
        return int(seen.sum()) * 4 * self.heads.kv * self.heads.width

    @property
    def position_B(self) -> jax.Array:
        return jnp.broadcast_to(jnp.asarray(self.positions, jnp.int32), (self.tokens,))


QWEN3 = Heads(32, 4, 128, norm="head")
OLMOE = Heads(16, 16, 128, norm="projection")
MIXTRAL = Heads(32, 8, 128)

AWKWARD: tuple[Case, ...] = (
    Case("several_requests", 3, Heads(8, 2, 64), 192, (70, 0, 150)),
    Case("first_token", 1, Heads(4, 2, 64), 64, 0),
    Case("last_position", 2, Heads(4, 4, 64), 128, (127, 63)),
    Case("tile_borders", 3, Heads(4, 2, 64), 200, (64, 128, 199)),
    Case("one_query_head_each", 2, Heads(2, 2, 128), 72, (71, 5)),
    Case("seven_query_heads_each", 2, Heads(14, 2, 64), 80, (33, 79)),
    Case("sixteen_query_heads_each", 1, Heads(32, 2, 64), 136, 100),
    Case("window_inside_a_tile", 3, Heads(4, 2, 64), 256, (255, 100, 3), window=10),
    Case("window_of_one", 1, Heads(4, 2, 64), 128, 70, window=1),
    Case("window_over_tiles", 2, Heads(4, 2, 64), 320, (300, 130), window=130),
    Case("longer_than_the_ring", 2, Heads(4, 2, 64), 704, (700, 575)),
    Case("norm_of_heads", 2, Heads(8, 2, 128, norm="head"), 128, (90, 17)),
    Case("norm_of_projections", 2, Heads(8, 8, 64, norm="projection", clip=1.5), 64, (40, 63)),
    Case("clip", 2, Heads(8, 4, 64, clip=0.5), 64, (9, 63)),
    Case("narrow_heads", 2, Heads(8, 2, 32), 144, (140, 30)),
    Case("wide_heads", 1, Heads(4, 2, 256), 64, 50),
    Case("heads_of_96", 1, Heads(4, 2, 96), 64, 50),
    Case("float32", 2, Heads(4, 2, 64, norm="head"), 64, (9, 63), dtype="float32"),
)
HEADS: dict[str, Heads] = {
    "qwen3-30b": QWEN3,
    "olmoe": OLMOE,
    "mixtral": MIXTRAL,
    "tinymistral": Heads(32, 8, 32),
}
REAL: tuple[Case, ...] = tuple(
    Case(f"{name}-{tokens}x{context}", tokens, heads, -(-(context + 1) // 64) * 64, context)
    for name, heads in HEADS.items()
    for tokens, context in ((1, 16), (1, 192), (8, 4095), (32, 1023), (128, 192))
)


def arguments(case: Case, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The case's positional and keyword arguments: random, of unit size."""
    heads, batch = case.heads, case.tokens
    keys = iter(jax.random.split(jax.random.key(seed, impl="rbg"), 8))

    def normal(*shape: int, scale: float = 1.0, mean: float = 0.0) -> jax.Array:
        return (jax.random.normal(next(keys), shape) * scale + mean).astype(case.dtype)

    cache = (batch, heads.kv, case.capacity, heads.width)
    q_width, k_width = heads.query * heads.width, heads.kv * heads.width
    angles_BR = case.position_B[:, None] * 1e4 ** -(jnp.arange(heads.width // 2) / (heads.width // 2))
    operands = (
        normal(batch, q_width),
        normal(batch, k_width),
        normal(batch, k_width),
        jnp.cos(angles_BR),
        jnp.sin(angles_BR),
        normal(*cache),
        normal(*cache),
        case.position_B,
    )
    norm_widths = {"head": (heads.width, heads.width), "projection": (q_width, k_width)}
    weights = [normal(width, scale=0.25, mean=1.0) for width in norm_widths[heads.norm]] if heads.norm else (None, None)
    q_norm_weight, k_norm_weight = weights
    return operands, dict(
        q_norm_weight=q_norm_weight,
        k_norm_weight=k_norm_weight,
        norm_epsilon=1e-6,
        clip=heads.clip,
        window=case.window,
    )
