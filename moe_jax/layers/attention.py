"""Attention with grouped key/value heads (arXiv:2305.13245) over a cache."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from moe_jax.kv_cache import LayerCache
from moe_jax.layers import parameter
from moe_jax.layers.linear import projected
from moe_jax.layers.norm import RMSNorm
from moe_jax.layers.rope import rotate
from pallas_kernels import decode_attention, dispatch

MASKED = -1e30
CUDNN_WIDEST_HEAD = 128  # 256 on Hopper and later

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


def attend_causally(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, *, window: int | None = None) -> jax.Array:
    """Attention among tokens at positions 0 to T, by cuDNN where it can: it never holds all scores at once."""
    batch, length, _, head_width = q_BTNH.shape
    if why_not_cudnn(q_BTNH) is None:
        left = None if window is None else (window - 1, 0)
        return jax.nn.dot_product_attention(
            q_BTNH, k_BTKH, v_BTKH, is_causal=True, local_window_size=left, implementation="cudnn"
        )
    positions_BT = jnp.broadcast_to(jnp.arange(length), (batch, length))
    is_visible_BTS = causal(positions_BT, length, window)
    keys, values = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
    return attend(q_BTNH, keys, values, is_visible_BTS, scale=head_width**-0.5)


def why_not_cudnn(q_BTNH: jax.Array) -> str | None:
    """Why cuDNN's attention cannot run these queries, in one sentence; None where it can."""
    device, head_width = dispatch.current_device(), q_BTNH.shape[-1]
    if device.platform != "gpu" or device.is_interpreted:
        return f"it needs an NVIDIA GPU, and this is {device.kind}"
    if jax.default_backend() != "gpu":
        return "it is asked for its version when a program is traced, and there is no GPU here"
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it multiplies bfloat16 and float16, and the queries are {q_BTNH.dtype}"
    if head_width % 8 or head_width > CUDNN_WIDEST_HEAD:
        return f"its heads are multiples of 8 up to {CUDNN_WIDEST_HEAD} wide, and these {head_width}"
    return None


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
        self, x_BTD: jax.Array, norm: RMSNorm, tables: Tables, cache: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None]:
        """`x + attention(norm(x))` among tokens that start at position 0; writes them to the cache if there is one."""
        B, T, _ = x_BTD.shape
        q_BTX, k_BTX, v_BTX = self._normalised(*self._projected(x_BTD, norm))
        q_BTNH, k_BTKH, v_BTKH = (each.reshape(B, T, -1, self.head_width) for each in (q_BTX, k_BTX, v_BTX))
        q_BTNH, k_BTKH = rotate(q_BTNH, tables), rotate(k_BTKH, tables)
        out_BTNH = attend_causally(q_BTNH, k_BTKH, v_BTKH, window=self.window)
        cache = None if cache is None else cache.filled(k_BTKH, v_BTKH)
        return self._output(out_BTNH.reshape(B, T, -1), x_BTD), cache

    def decode(
        self, x_BTD: jax.Array, norm: RMSNorm, tables: Tables, cache: LayerCache, positions_B: jax.Array
    ) -> tuple[jax.Array, LayerCache]:
        """`x + attention(norm(x))` of one new token per request (T = 1), which goes to `positions_B` of the cache."""
        q_BX, k_BX, v_BX = (each[:, 0] for each in self._projected(x_BTD, norm))
        cos_BR, sin_BR = (table[:, 0] for table in tables)
        out_BX, k_BKSH, v_BKSH = decode_attention(
            q_BX,
            k_BX,
            v_BX,
            cos_BR,
            sin_BR,
            cache.k_BKSH,
            cache.v_BKSH,
            positions_B,
            q_norm_weight=None if self.q_norm is None else self.q_norm.weight_D[...],
            k_norm_weight=None if self.k_norm is None else self.k_norm.weight_D[...],
            norm_epsilon=1e-6 if self.q_norm is None else self.q_norm.epsilon,
            clip=self.clip,
            window=self.window,
        )
        return self._output(out_BX[:, None], x_BTD), LayerCache(k_BKSH, v_BKSH)

    @property
    def head_width(self) -> int:
        return self.k_KHD.shape[1]

    def _projected(self, x_BTD, norm: RMSNorm) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values of the normalised tokens, `[B, T, heads * H]`."""
        weights = tuple(_rows(each[...]) for each in (self.q_NHD, self.k_KHD, self.v_KHD))
        biases = None
        if self.q_bias_NH is not None and self.k_bias_KH is not None and self.v_bias_KH is not None:
            biases = tuple(each[...].reshape(-1) for each in (self.q_bias_NH, self.k_bias_KH, self.v_bias_KH))
        q_BTX, k_BTX, v_BTX = projected(x_BTD, weights, biases, norm=norm)
        return q_BTX, k_BTX, v_BTX

    def _normalised(self, q_BTX, k_BTX, v_BTX):
        if self.q_norm is not None and self.k_norm is not None:
            q_BTX, k_BTX = _of_pieces(self.q_norm, q_BTX), _of_pieces(self.k_norm, k_BTX)
        if self.clip is not None:
            q_BTX, k_BTX, v_BTX = (jnp.clip(each, -self.clip, self.clip) for each in (q_BTX, k_BTX, v_BTX))
        return q_BTX, k_BTX, v_BTX

    def _output(self, out_BTX, residual_BTD):
        D, N, H = self.o_DNH.shape
        biases = None if self.o_bias_D is None else (self.o_bias_D[...],)
        (x_BTD,) = projected(out_BTX, (self.o_DNH[...].reshape(D, N * H),), biases, residual_BTO=residual_BTD)
        return x_BTD


def _rows(weight_NHD: jax.Array) -> jax.Array:
    """`[N, H, D]` as the matrix `[N * H, D]`."""
    return weight_NHD.reshape(-1, weight_NHD.shape[-1])


def _of_pieces(norm: RMSNorm, x_BTX: jax.Array) -> jax.Array:
    """The norm over consecutive pieces as wide as its weight: each head, or all at once."""
    return norm(x_BTX.reshape(*x_BTX.shape[:2], -1, norm.weight_D.shape[0])).reshape(x_BTX.shape)
