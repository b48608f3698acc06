"""OLMoE (arXiv:2409.02060): 64 small experts, 8 per token.

Checkpoints: allenai/OLMoE-1B-7B-0924 and its instruct kin. Two surprises: queries and keys are normalised over the whole
projection, all heads together, before they are split; and the chosen experts' weights are not renormalised.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx

from moe_jax.layers.attention import Attention
from moe_jax.layers.decoder import CausalLM
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
    hidden_act: Activation
    rms_norm_eps: float
    tie_word_embeddings: bool
    attention_bias: bool
    clip_qkv: float | None
    num_experts_per_tok: int
    num_experts: int
    norm_topk_prob: bool
    rope: Rope
    eos_token_id: tuple[int, ...]

    @classmethod
    def from_hf(cls, keys: dict[str, Any]) -> Config:
        hf = HFConfig(keys, "olmoe")
        hidden_size, num_heads = hf.positive("hidden_size", 2048), hf.positive("num_attention_heads", 16)
        num_experts = hf.positive("num_experts", 64, "num_local_experts")
        max_position_embeddings = hf.positive("max_position_embeddings", 4096)
        hf.refuse("head_dim", unless=(hidden_size // num_heads,), why="OLMoE's norms are as wide as the model")
        hf.refuse("sliding_window", unless=(), why="Hugging Face's OLMoE masks no window")
        config = cls(
            vocab_size=hf.positive("vocab_size", 50304),
            hidden_size=hidden_size,
            intermediate_size=hf.positive("intermediate_size", 2048),
            num_hidden_layers=hf.positive("num_hidden_layers", 16),
            num_attention_heads=num_heads,
            num_key_value_heads=hf.positive("num_key_value_heads", num_heads),
            hidden_act=hf.activation(),
            rms_norm_eps=hf.number("rms_norm_eps", 1e-5),
            tie_word_embeddings=hf.flag("tie_word_embeddings", False),
            attention_bias=hf.flag("attention_bias", False),
            clip_qkv=hf.take("clip_qkv", None),
            num_experts_per_tok=hf.positive("num_experts_per_tok", 8, most=num_experts),
            num_experts=num_experts,
            norm_topk_prob=hf.flag("norm_topk_prob", False),
            rope=hf.rope(
                head_dim=hidden_size // num_heads,
                max_position_embeddings=max_position_embeddings,
                default_theta=10_000.0,
            ),
            eos_token_id=hf.token_ids("eos_token_id"),
        )
        hf.finish()
        return config


def build(config: Config, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> CausalLM:
    """The model with random parameters of the given dtype."""
    parts: dict[str, Any] = dict(dtype=dtype, rngs=rngs)
    width = config.hidden_size

    def attention(layer: int) -> Attention:
        return Attention(
            width,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_width=config.rope.head_dim,
            has_qkv_bias=config.attention_bias,
            has_out_bias=config.attention_bias,
            qk_norm="projection",
            norm_epsilon=config.rms_norm_eps,
            clip=config.clip_qkv,
            **parts,
        )

    def feed_forward(layer: int) -> MoE:
        return MoE(
            width,
            config.intermediate_size,
            config.num_experts,
            rule=RoutingRule(top_k=config.num_experts_per_tok, renormalize=config.norm_topk_prob),
            activation=config.hidden_act,
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
        *shared.EXPERTS,
        *shared.head(is_tied=config.tie_word_embeddings),
    )
