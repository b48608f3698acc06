"""Qwen3-MoE (arXiv:2505.09388): 128 experts, 8 per token, no shared expert.

Checkpoints: Qwen/Qwen3-30B-A3B, Qwen/Qwen3-235B-A22B. Two surprises: queries and keys are normalised head by head, and the head
width is set apart from hidden_size / num_attention_heads.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx

from moe_jax.layers.attention import Attention
from moe_jax.layers.decoder import CausalLM
from moe_jax.layers.mlp import MLP
from moe_jax.layers.moe import MoE
from moe_jax.layers.rope import Rope
from moe_jax.models import decoder_families as shared
from moe_jax.models.hf_config import HFConfig
from pallas_kernels import Activation, RoutingRule


@dataclasses.dataclass(frozen=True)
class Config:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: Activation
    rms_norm_eps: float
    tie_word_embeddings: bool
    attention_bias: bool
    sliding_window: int | None
    decoder_sparse_step: int
    mlp_only_layers: tuple[int, ...]
    moe_intermediate_size: int
    num_experts_per_tok: int
    num_experts: int
    norm_topk_prob: bool
    rope: Rope
    eos_token_id: tuple[int, ...]

    @classmethod
    def from_hf(cls, keys: dict[str, Any]) -> Config:
        hf = HFConfig(keys, "qwen3_moe")
        hidden_size, num_heads = hf.positive("hidden_size", 2048), hf.positive("num_attention_heads", 32)
        head_dim = hf.positive("head_dim", hidden_size // num_heads)
        num_experts = hf.positive("num_experts", 128, "num_local_experts")
        max_position_embeddings = hf.positive("max_position_embeddings", 32768)
        # Written by Qwen's configs, read by no code: the window, where used, applies to every layer.
        hf.irrelevant("max_window_layers", "layer_types")
        window = hf.take("sliding_window", 4096)
        config = cls(
            vocab_size=hf.positive("vocab_size", 151936),
            hidden_size=hidden_size,
            intermediate_size=hf.positive("intermediate_size", 6144),
            num_hidden_layers=hf.positive("num_hidden_layers", 24),
            num_attention_heads=num_heads,
            num_key_value_heads=hf.positive("num_key_value_heads", 4),
            head_dim=head_dim,
            hidden_act=hf.activation(),
            rms_norm_eps=hf.number("rms_norm_eps", 1e-6),
            tie_word_embeddings=hf.flag("tie_word_embeddings", False),
            attention_bias=hf.flag("attention_bias", False),
            sliding_window=window if hf.flag("use_sliding_window", False) else None,
            decoder_sparse_step=hf.positive("decoder_sparse_step", 1),
            mlp_only_layers=tuple(hf.take("mlp_only_layers", ())),
            moe_intermediate_size=hf.positive("moe_intermediate_size", 768),
            num_experts_per_tok=hf.positive("num_experts_per_tok", 8, most=num_experts),
            num_experts=num_experts,
            norm_topk_prob=hf.flag("norm_topk_prob", False),
            rope=hf.rope(head_dim=head_dim, max_position_embeddings=max_position_embeddings, default_theta=10_000.0),
            eos_token_id=hf.token_ids("eos_token_id"),
        )
        hf.finish()
        return config


def build(config: Config, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> CausalLM:
    """The model with random parameters of the given dtype."""
    parts: dict[str, Any] = dict(dtype=dtype, rngs=rngs)
    width = config.hidden_size

    def feed_forward(layer: int) -> MoE | MLP:
        step, dense = config.decoder_sparse_step, config.mlp_only_layers
        if not shared.is_sparse_layer(layer, decoder_sparse_step=step, mlp_only_layers=dense):
            return MLP(width, config.intermediate_size, activation=config.hidden_act, **parts)
        return MoE(
            width,
            config.moe_intermediate_size,
            config.num_experts,
            rule=RoutingRule(top_k=config.num_experts_per_tok, renormalize=config.norm_topk_prob),
            activation=config.hidden_act,
            **parts,
        )

    def attention(layer: int) -> Attention:
        return Attention(
            width,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_width=config.head_dim,
            window=config.sliding_window,
            has_qkv_bias=config.attention_bias,
            has_out_bias=config.attention_bias,
            qk_norm="head",
            norm_epsilon=config.rms_norm_eps,
            **parts,
        )

    return shared.assemble(config, attention, feed_forward, **parts)


def rules(config: Config) -> shared.Rules:
    biases = (*shared.QKV_BIAS, *shared.OUT_BIAS) if config.attention_bias else ()
    return (
        *shared.EMBEDDINGS_AND_NORMS,
        *shared.ATTENTION,
        *biases,
        *shared.QK_NORM,
        *shared.DENSE_MLP,
        *shared.EXPERTS,
        *shared.head(is_tied=config.tie_word_embeddings),
    )
