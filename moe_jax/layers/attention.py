"""Attention with grouped key/value heads (arXiv:2305.13245) over a cache."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from moe_jax.kv_cache import LayerCache
from moe_jax.layers import parameter
from moe_jax.layers.linear import linear
from moe_jax.layers.norm import RMSNorm
from moe_jax.layers.rope import rotate

MASKED = -1e30

Tables = tuple[jax.Array, jax.Array]


def attend(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    is_visible_BTS: jax.Array,
    *,
    scale: float,
    bias_NTS: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention, scores and softmax in float32. `bias_NTS` (or `[B, N, T, S]`) is added to the scores."""
    B, T, N, H = q_BTNH.shape
    K, S = k_BKSH.shape[1:3]
    precision = lax.Precision.HIGHEST if q_BTNH.dtype == jnp.float32 else None
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores_BKGTS = jnp.einsum(
        "BTKGH,BKSH->BKGTS", q_BTKGH, k_BKSH, precision=precision, preferred_element_type=jnp.float32
    )
    scores_BKGTS = scores_BKGTS * scale
    if bias_NTS is not None:
        scores_BKGTS = scores_BKGTS + bias_NTS.astype(jnp.float32).reshape(-1, K, N // K, T, S)
    scores_BKGTS = jnp.where(is_visible_BTS[:, None, None], scores_BKGTS, MASKED)
    probabilities = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BKSH.dtype)
    # Transposed afterwards: asked for `BTKGH` at once, XLA makes a product that its CPU backend lacks for bfloat16.
    out_BKGTH = jnp.einsum(
        "BKGTS,BKSH->BKGTH", probabilities, v_BKSH, precision=precision, preferred_element_type=jnp.float32
    )
    return jnp.moveaxis(out_BKGTH, 3, 1).reshape(B, T, N, H).astype(q_BTNH.dtype)


def causal(positions_BT: jax.Array, num_keys: int, window: int | None = None) -> jax.Array:
    """`[B, T, S]`: the key at s is visible to the query at position p when `p - window < s <= p`."""
    keys_S = jnp.arange(num_keys)
    is_visible_BTS = keys_S <= positions_BT[..., None]
    if window is not None:
        is_visible_BTS &= keys_S > positions_BT[..., None] - window
    return is_visible_BTS


class Attention(nnx.Module):
    """Self-attention of a decoder, with rotary positions.

    `qk_norm` normalises queries and keys before rotation: over each head (`head`, Qwen3) or over the whole projection
    (`projection`, OLMoE). `clip` bounds queries, keys and values after that (OLMoE's `clip_qkv`). `window` limits how many
    positions a query sees, itself included.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_width: int,
        window: int | None = None,
        has_qkv_bias: bool = False,
        has_out_bias: bool = False,
        qk_norm: Literal["head", "projection"] | None = None,
        norm_epsilon: float = 1e-6,
        clip: float | None = None,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        N, K, H = num_heads, num_kv_heads, head_width
        self.window, self.clip, self.qk_norm = window, clip, qk_norm
        self.q_NHD = parameter.normal(rngs, (N, H, width), ("q_heads", None, "embed"), dtype)
        self.k_KHD = parameter.normal(rngs, (K, H, width), ("kv_heads", None, "embed"), dtype)
        self.v_KHD = parameter.normal(rngs, (K, H, width), ("kv_heads", None, "embed"), dtype)
        self.o_DNH = parameter.normal(rngs, (width, N, H), ("embed", "q_heads", None), dtype)
        self.q_bias_NH = parameter.zeros((N, H), ("q_heads", None), dtype) if has_qkv_bias else None
        self.k_bias_KH = parameter.zeros((K, H), ("kv_heads", None), dtype) if has_qkv_bias else None
        self.v_bias_KH = parameter.zeros((K, H), ("kv_heads", None), dtype) if has_qkv_bias else None
        self.o_bias_D = parameter.zeros((width,), ("embed",), dtype) if has_out_bias else None
        q_norm_width, k_norm_width = (H, H) if qk_norm == "head" else (N * H, K * H)
        norms: dict[str, Any] = dict(epsilon=norm_epsilon, dtype=dtype, axis=None)
        self.q_norm = RMSNorm(q_norm_width, **norms) if qk_norm else None
        self.k_norm = RMSNorm(k_norm_width, **norms) if qk_norm else None

    def prefill(
        self, x_BTD: jax.Array, tables: Tables, cache: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None]:
        """Attends among the given tokens, which start at position 0, and writes them to the cache if there is one."""
        q_BTNH, k_BTKH, v_BTKH = self._project(x_BTD, tables)
        batch, length = x_BTD.shape[:2]
        positions_BT = jnp.broadcast_to(jnp.arange(length), (batch, length))
        is_visible_BTS = causal(positions_BT, length, self.window)
        out_BTNH = self._attend(q_BTNH, k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2), is_visible_BTS)
        cache = None if cache is None else cache.filled(k_BTKH, v_BTKH)
        return self._output(out_BTNH), cache

    def decode(
        self, x_BTD: jax.Array, tables: Tables, cache: LayerCache, positions_B: jax.Array
    ) -> tuple[jax.Array, LayerCache]:
        """One new token per request (T = 1): writes it to the cache at `positions_B` and attends over what is there."""
        q_BTNH, k_BTKH, v_BTKH = self._project(x_BTD, tables)
        cache = cache.appended(k_BTKH[:, 0], v_BTKH[:, 0], positions_B)
        is_visible_BTS = causal(positions_B[:, None], cache.k_BKSH.shape[2], self.window)
        return self._output(self._attend(q_BTNH, cache.k_BKSH, cache.v_BKSH, is_visible_BTS)), cache

    def _project(self, x_BTD, tables: Tables):
        q_BTNH = _heads(x_BTD, self.q_NHD, self.q_bias_NH)
        k_BTKH = _heads(x_BTD, self.k_KHD, self.k_bias_KH)
        v_BTKH = _heads(x_BTD, self.v_KHD, self.v_bias_KH)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTNH = _normalised(self.q_norm, q_BTNH, whole=self.qk_norm == "projection")
            k_BTKH = _normalised(self.k_norm, k_BTKH, whole=self.qk_norm == "projection")
        if self.clip is not None:
            q_BTNH, k_BTKH, v_BTKH = (jnp.clip(each, -self.clip, self.clip) for each in (q_BTNH, k_BTKH, v_BTKH))
        return rotate(q_BTNH, tables), rotate(k_BTKH, tables), v_BTKH

    def _attend(self, q_BTNH, k_BKSH, v_BKSH, is_visible_BTS):
        return attend(q_BTNH, k_BKSH, v_BKSH, is_visible_BTS, scale=q_BTNH.shape[-1] ** -0.5)

    def _output(self, out_BTNH):
        B, T, N, H = out_BTNH.shape
        bias_D = None if self.o_bias_D is None else self.o_bias_D[...]
        return linear(out_BTNH.reshape(B, T, N * H), self.o_DNH[...].reshape(-1, N * H), bias_D)


def _heads(x_BTD, weight_NHD: nnx.Param, bias_NH: nnx.Param | None):
    N, H, D = weight_NHD.shape
    bias = None if bias_NH is None else bias_NH[...].reshape(N * H)
    return linear(x_BTD, weight_NHD[...].reshape(N * H, D), bias).reshape(*x_BTD.shape[:2], N, H)


def _normalised(norm: RMSNorm, x_BTNH, *, whole: bool):
    if not whole:
        return norm(x_BTNH)
    B, T, N, H = x_BTNH.shape
    return norm(x_BTNH.reshape(B, T, N * H)).reshape(B, T, N, H)
