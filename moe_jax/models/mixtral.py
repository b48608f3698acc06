"""Mixtral (arXiv:2401.04088): a Llama-like decoder with experts in every layer.

Checkpoints: mistralai/Mixtral-8x7B-v0.1, 8x22B, TinyMistral-6x248M, the bundled Shakespeare model. The surprise: the weights of
the chosen experts are renormalised, which makes them a softmax over the chosen logits alone.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx

from moe_jax.checkpoints.rules import Rule
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
    head_dim: int
    hidden_act: Activation
    rms_norm_eps: float
    tie_word_embeddings: bool
    sliding_window: int | None
    num_experts_per_tok: int
    num_local_experts: int
    rope: Rope
    eos_token_id: tuple[int, ...]

    @classmethod
    def from_hf(cls, keys: dict[str, Any]) -> Config:
        hf = HFConfig(keys, "mixtral")
        hidden_size, num_heads = hf.positive("hidden_size", 4096), hf.positive("num_attention_heads", 32)
        head_dim = hf.positive("head_dim", hidden_size // num_heads)
        num_experts = hf.positive("num_local_experts", 8, "num_experts")
        max_position_embeddings = hf.positive("max_position_embeddings", 4096 * 32)
        config = cls(
            vocab_size=hf.positive("vocab_size", 32000),
            hidden_size=hidden_size,
            intermediate_size=hf.positive("intermediate_size", 14336),
            num_hidden_layers=hf.positive("num_hidden_layers", 32),
            num_attention_heads=num_heads,
            num_key_value_heads=hf.positive("num_key_value_heads", num_heads if hf.has("num_key_value_heads") else 8),
            head_dim=head_dim,
            hidden_act=hf.activation(),
            rms_norm_eps=hf.number("rms_norm_eps", 1e-5),
            tie_word_embeddings=hf.flag("tie_word_embeddings", False),
            sliding_window=hf.positive("sliding_window") if hf.take("sliding_window", None) is not None else None,
            num_experts_per_tok=hf.positive("num_experts_per_tok", 2, most=num_experts),
            num_local_experts=num_experts,
            rope=hf.rope(head_dim=head_dim, max_position_embeddings=max_position_embeddings, default_theta=1e6),
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
            head_width=config.head_dim,
            window=config.sliding_window,
            **parts,
        )

    def feed_forward(layer: int) -> MoE:
        return MoE(
            width,
            config.intermediate_size,
            config.num_local_experts,
            rule=RoutingRule(top_k=config.num_experts_per_tok, renormalize=True),
            activation=config.hidden_act,
            **parts,
        )

    return shared.assemble(config, attention, feed_forward, **parts)


def rules(config: Config) -> shared.Rules:
    model, layer = "model.layers.{layer}.block_sparse_moe.", "layers.{layer}.feed_forward."
    return (
        *shared.EMBEDDINGS_AND_NORMS,
        *shared.ATTENTION,
        Rule(model + "gate.weight", layer + "gate_ED"),
        Rule(model + "experts.{expert}.w1.weight", layer + "up_EGFD", at=("{expert}", 0)),
        Rule(model + "experts.{expert}.w3.weight", layer + "up_EGFD", at=("{expert}", 1)),
        Rule(model + "experts.{expert}.w2.weight", layer + "down_EDF", at=("{expert}",)),
        Rule("model.layers.{layer}.mlp.gate.weight", layer + "gate_ED"),
        *shared.FUSED_EXPERTS,
        *shared.head(is_tied=config.tie_word_embeddings),
    )
