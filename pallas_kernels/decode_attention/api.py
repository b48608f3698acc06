"""Attention of one new token per request over a cache, with all that happens between projections and scores."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch


def decode_attention(
    q_BQ: Float[Array, "B NH"],
    k_BX: Float[Array, "B KH"],
    v_BX: Float[Array, "B KH"],
    cos_BR: Float[Array, "B H/2"],
    sin_BR: Float[Array, "B H/2"],
    k_BKSH: Float[Array, "B K S H"],
    v_BKSH: Float[Array, "B K S H"],
    positions_B: Int[Array, "B"],
    *,
    q_norm_weight: Float[Array, "_"] | None = None,
    k_norm_weight: Float[Array, "_"] | None = None,
    norm_epsilon: float = 1e-6,
    clip: float | None = None,
    window: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B NH"], Float[Array, "B K S H"], Float[Array, "B K S H"]]:
    """Attention of request b's new token, which goes to position `positions_B[b]`; and the caches with its key and value.

    `q_BQ`, `k_BX` and `v_BX` are rows of the projections: N and K heads of width H, N a multiple of K. In
    this order: RMSNorm of queries and keys, over each head (weights of H numbers) or the whole projection (N * H and
    K * H); `clip` of all three; rotation of the pairs (h, h + H/2) by the float32 tables; key and value written to the cache,
    whose buffers are reused if they are donated; softmax attention with the scale H ** -0.5 over positions up to the new one,
    `window` of them at most. Each step is computed in float32 and rounded to the projections' dtype.

    `implementation=None` takes the fastest that supports the arguments; `explain()`
    lists why the others were passed over.

    Raises:
      ValueError: shapes disagree, one norm weight is missing, or the window is less than 1.
    """
    operands = (q_BQ, k_BX, v_BX, cos_BR, sin_BR, k_BKSH, v_BKSH, positions_B)
    named: dict[str, Any] = dict(
        q_norm_weight=q_norm_weight, k_norm_weight=k_norm_weight, norm_epsilon=norm_epsilon, clip=clip, window=window
    )
    _check(*operands, **named)
    chosen = dispatch.choose("decode_attention", _implementations(), *operands, implementation=implementation, **named)
    return chosen.run(*operands, **named)


def explain(*operands: jax.Array, **named: Any) -> list[tuple[str, str | None]]:
    """Each implementation with None (it can run this call) or the reason why it cannot, fastest first."""
    return dispatch.explain(_implementations(), *operands, **named)


def _implementations() -> tuple[dispatch.Implementation, ...]:
    from pallas_kernels.decode_attention import mosaic_sm90, reference

    return mosaic_sm90.IMPLEMENTATION, reference.IMPLEMENTATION


def _check(
    q_BQ, k_BX, v_BX, cos_BR, sin_BR, k_BKSH, v_BKSH, positions_B, *, q_norm_weight, k_norm_weight, clip, window, **_
) -> None:
    if k_BKSH.ndim != 4 or k_BKSH.shape[3] % 2:
        raise ValueError(f"decode_attention: expected k_BKSH [B, K, S, H] with H even, got {list(k_BKSH.shape)}")
    batch, kv_heads, positions, head_width = k_BKSH.shape
    if q_BQ.ndim != 2 or q_BQ.shape[1] % (kv_heads * head_width) or not q_BQ.shape[1]:
        raise ValueError(
            f"decode_attention: expected q_BQ [B, N * H] with N a multiple of K={kv_heads} and H={head_width}, "
            f"got {list(q_BQ.shape)}"
        )
    expected = dict(
        q_BQ=(q_BQ, (batch, q_BQ.shape[1])),
        k_BX=(k_BX, (batch, kv_heads * head_width)),
        v_BX=(v_BX, (batch, kv_heads * head_width)),
        cos_BR=(cos_BR, (batch, head_width // 2)),
        sin_BR=(sin_BR, (batch, head_width // 2)),
        v_BKSH=(v_BKSH, k_BKSH.shape),
        positions_B=(positions_B, (batch,)),
    )
    for name, (array, shape) in expected.items():
        if array.shape != shape:
            raise ValueError(
                f"decode_attention: expected {name} {list(shape)} beside k_BKSH {list(k_BKSH.shape)}, "
                f"got {list(array.shape)}"
            )
    if not jnp.issubdtype(positions_B.dtype, jnp.integer):
        raise ValueError(f"decode_attention: expected positions_B to be whole numbers, got {positions_B.dtype}")
    if (q_norm_weight is None) != (k_norm_weight is None):
        raise ValueError("decode_attention: expected both q_norm_weight and k_norm_weight or neither, got one of them")
    if q_norm_weight is not None and k_norm_weight is not None:
        widths = (q_norm_weight.shape, k_norm_weight.shape)
        if widths not in (((head_width,),) * 2, ((q_BQ.shape[1],), (k_BX.shape[1],))):
            raise ValueError(
                f"decode_attention: expected norm weights of {head_width} numbers each (a head), or {q_BQ.shape[1]} and "
                f"{k_BX.shape[1]} (the whole projection), got {list(widths[0])} and {list(widths[1])}"
            )
    if clip is not None and not clip > 0:
        raise ValueError(f"decode_attention: expected clip to be positive or None, got {clip}")
    if window is not None and window < 1:
        raise ValueError(f"decode_attention: expected window to be at least 1 or None, got {window}")
