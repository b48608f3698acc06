"""Qwen1.5-MoE and Qwen2-MoE (arXiv:2407.10671): fine-grained experts beside one shared expert.

Checkpoints: Qwen/Qwen1.5-MoE-A2.7B, Qwen/Qwen2-57B-A14B. The surprise: every token also visits a shared expert, whose output is
weighted by a sigmoid gate of its own. Queries, keys and values have biases; the output projection has none.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx

from moe_jax.checkpoints.rules import Rule
from moe_jax.layers.attention import Attention
from moe_jax.layers.decoder import CausalLM
from moe_jax.layers.mlp import MLP
from moe_jax.layers.moe import MoE, SharedExpert
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
    qkv_bias: bool
    windows: tuple[int | None, ...]
    decoder_sparse_step: int
    mlp_only_layers: tuple[int, ...]
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    num_experts_per_tok: int
    num_experts: int
    norm_topk_prob: bool
    rope: Rope
    eos_token_id: tuple[int, ...]

    @classmethod
    def from_hf(cls, keys: dict[str, Any]) -> Config:
        hf = HFConfig(keys, "qwen2_moe")
        hidden_size, num_heads = hf.positive("hidden_size", 2048), hf.positive("num_attention_heads", 16)
        num_layers = hf.positive("num_hidden_layers", 24)
        head_dim = hf.positive("head_dim", hidden_size // num_heads)
        num_experts = hf.positive("num_experts", 60)
        max_position_embeddings = hf.positive("max_position_embeddings", 32768)
        config = cls(
            vocab_size=hf.positive("vocab_size", 151936),
            hidden_size=hidden_size,
            intermediate_size=hf.positive("intermediate_size", 5632),
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=hf.positive("num_key_value_heads", 16),
            head_dim=head_dim,
            hidden_act=hf.activation(),
            rms_norm_eps=hf.number("rms_norm_eps", 1e-6),
            tie_word_embeddings=hf.flag("tie_word_embeddings", False),
            qkv_bias=hf.flag("qkv_bias", True),
            windows=_windows(hf, num_layers),
            decoder_sparse_step=hf.positive("decoder_sparse_step", 1),
            mlp_only_layers=tuple(hf.take("mlp_only_layers", ())),
            moe_intermediate_size=hf.positive("moe_intermediate_size", 1408),
            shared_expert_intermediate_size=hf.positive("shared_expert_intermediate_size", 5632),
            num_experts_per_tok=hf.positive("num_experts_per_tok", 4, most=num_experts),
            num_experts=num_experts,
            norm_topk_prob=hf.flag("norm_topk_prob", False),
            rope=hf.rope(head_dim=head_dim, max_position_embeddings=max_position_embeddings, default_theta=10_000.0),
            eos_token_id=hf.token_ids("eos_token_id"),
        )
        hf.finish()
        return config


def _windows(hf: HFConfig, num_layers: int) -> tuple[int | None, ...]:
    """The sliding window of each layer, None where a layer sees everything."""
    is_used, window = hf.flag("use_sliding_window", False), hf.take("sliding_window", 4096)
    max_window_layers, layer_types = hf.take("max_window_layers", 28), hf.take("layer_types", None)
    if layer_types is None:
        # Hugging Face's rule: even layers below max_window_layers.
        is_sliding = [is_used and layer % 2 == 0 and layer < max_window_layers for layer in range(num_layers)]
    else:
        unknown = sorted(set(layer_types) - {"full_attention", "sliding_attention"})
        if unknown or len(layer_types) != num_layers:
            raise ValueError(
                f"qwen2_moe: expected layer_types to name full_attention or sliding_attention for each of {num_layers} "
                f"layers, got {layer_types}"
            )
        is_sliding = [each == "sliding_attention" for each in layer_types]
        if any(is_sliding) and not is_used:
            raise ValueError(
                "qwen2_moe: layer_types names sliding_attention but use_sliding_window is false: set it to true"
            )
    return tuple(window if each else None for each in is_sliding)


def build(config: Config, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> CausalLM:
    """The model with random parameters of the given dtype."""
    parts: dict[str, Any] = dict(dtype=dtype, rngs=rngs)
    width = config.hidden_size

    def feed_forward(layer: int) -> MoE | MLP:
        activation = config.hidden_act
        step, dense = config.decoder_sparse_step, config.mlp_only_layers
        if not shared.is_sparse_layer(layer, decoder_sparse_step=step, mlp_only_layers=dense):
            return MLP(width, config.intermediate_size, activation=activation, **parts)
        return MoE(
            width,
            config.moe_intermediate_size,
            config.num_experts,
            rule=RoutingRule(top_k=config.num_experts_per_tok, renormalize=config.norm_topk_prob),
            activation=activation,
            shared=SharedExpert(width, config.shared_expert_intermediate_size, activation=activation, **parts),
            **parts,
        )

    def attention(layer: int) -> Attention:
        return Attention(
            width,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_width=config.head_dim,
            window=config.windows[layer],
            has_qkv_bias=config.qkv_bias,
            **parts,
        )

    return shared.assemble(config, attention, feed_forward, **parts)


def rules(config: Config) -> shared.Rules:
    model, layer = "model.layers.{layer}.mlp.", "layers.{layer}.feed_forward.shared."
    return (
        *shared.EMBEDDINGS_AND_NORMS,
        *shared.ATTENTION,
        *(shared.QKV_BIAS if config.qkv_bias else ()),
        *shared.DENSE_MLP,
        *shared.EXPERTS,
        Rule(model + "shared_expert.gate_proj.weight", layer + "mlp.up_GFD", at=(0,)),
        Rule(model + "shared_expert.up_proj.weight", layer + "mlp.up_GFD", at=(1,)),
        Rule(model + "shared_expert.down_proj.weight", layer + "mlp.down_DF"),
        Rule(model + "shared_expert_gate.weight", layer + "gate_1D"),
        *shared.head(is_tied=config.tie_word_embeddings),
    )
