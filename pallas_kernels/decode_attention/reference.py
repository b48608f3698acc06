"""The definition of attention in decoding, in plain JAX. Runs on every device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.dispatch import Implementation

MASKED = -1e30


def decode_attention(
    q_BQ,
    k_BX,
    v_BX,
    cos_BR,
    sin_BR,
    k_BKSH,
    v_BKSH,
    positions_B,
    *,
    q_norm_weight=None,
    k_norm_weight=None,
    norm_epsilon=1e-6,
    clip=None,
    window=None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    if q_norm_weight is not None and k_norm_weight is not None:
        q_BQ = rms_norm(q_BQ, q_norm_weight, epsilon=norm_epsilon)
        k_BX = rms_norm(k_BX, k_norm_weight, epsilon=norm_epsilon)
    if clip is not None:
        q_BQ, k_BX, v_BX = (jnp.clip(each, -clip, clip) for each in (q_BQ, k_BX, v_BX))
    batch, kv_heads, _, head_width = k_BKSH.shape
    q_BNH, k_BKH, v_BKH = (each.reshape(batch, -1, head_width) for each in (q_BQ, k_BX, v_BX))
    tables_B1R = (cos_BR[:, None], sin_BR[:, None])
    q_BNH, k_BKH = rotate(q_BNH, *tables_B1R), rotate(k_BKH, *tables_B1R)
    requests_B = jnp.arange(batch)
    k_BKSH = k_BKSH.at[requests_B, :, positions_B].set(k_BKH)
    v_BKSH = v_BKSH.at[requests_B, :, positions_B].set(v_BKH)
    out_BNH = _attend(q_BNH, k_BKSH, v_BKSH, positions_B, window)
    return out_BNH.reshape(q_BQ.shape), k_BKSH, v_BKSH


def rms_norm(x_BX: jax.Array, weight: jax.Array, *, epsilon: float) -> jax.Array:
    """`x / rms(x) * weight` over consecutive pieces as wide as the weight, rounded once."""
    x_32 = x_BX.astype(jnp.float32).reshape(*x_BX.shape[:-1], -1, weight.shape[0])
    scale = lax.rsqrt(jnp.mean(x_32 * x_32, axis=-1, keepdims=True) + epsilon)
    return (x_32 * scale * weight.astype(jnp.float32)).astype(x_BX.dtype).reshape(x_BX.shape)


def rotate(x_XH: jax.Array, cos_XR: jax.Array, sin_XR: jax.Array) -> jax.Array:
    """Rotates the pairs (h, h + H/2) of the last dimension; float32 inside, x's dtype outside."""
    first, second = jnp.split(x_XH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos_XR - second * sin_XR, second * cos_XR + first * sin_XR], axis=-1)
    return rotated.astype(x_XH.dtype)


def _attend(q_BNH, k_BKSH, v_BKSH, positions_B, window: int | None) -> jax.Array:
    (B, N, H), (K, S) = q_BNH.shape, k_BKSH.shape[1:3]
    precision = lax.Precision.HIGHEST if q_BNH.dtype == jnp.float32 else None
    q_BKGH = q_BNH.reshape(B, K, N // K, H)
    scores_BKGS = jnp.einsum("BKGH,BKSH->BKGS", q_BKGH, k_BKSH, precision=precision, preferred_element_type=jnp.float32)
    keys_S, new_B1 = jnp.arange(S), positions_B[:, None]
    is_visible_BS = keys_S <= new_B1
    if window is not None:
        is_visible_BS &= keys_S > new_B1 - window
    scores_BKGS = jnp.where(is_visible_BS[:, None, None], scores_BKGS * H**-0.5, MASKED)
    probabilities = jax.nn.softmax(scores_BKGS, axis=-1).astype(v_BKSH.dtype)
    out_BKGH = jnp.einsum(
        "BKGS,BKSH->BKGH", probabilities, v_BKSH, precision=precision, preferred_element_type=jnp.float32
    )
    return out_BKGH.reshape(B, N, H).astype(q_BNH.dtype)


IMPLEMENTATION = Implementation("reference", supports=lambda device, *args, **kwargs: None, run=decode_attention)
