"""What the decoder-only families share: how their parts are assembled, their weight tables, their layers' schedules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import jax.numpy as jnp
from flax import nnx

from moe_jax.checkpoints.rules import Copy, Ignored, Rule
from moe_jax.layers.attention import Attention
from moe_jax.layers.decoder import CausalLM, DecoderLayer
from moe_jax.layers.embedding import Embedding, Head
from moe_jax.layers.mlp import MLP
from moe_jax.layers.moe import MoE
from moe_jax.layers.norm import RMSNorm
from moe_jax.layers.rope import Rope

Rules = Sequence[Rule | Ignored | Copy]

_MODEL, _LAYER = "model.layers.{layer}.", "layers.{layer}."

EMBEDDINGS_AND_NORMS: Rules = (
    Rule("model.embed_tokens.weight", "embedding.weight_VD"),
    Rule("model.norm.weight", "norm.weight_D"),
    Rule(_MODEL + "input_layernorm.weight", _LAYER + "attention_norm.weight_D"),
    Rule(_MODEL + "post_attention_layernorm.weight", _LAYER + "feed_forward_norm.weight_D"),
    Ignored(_MODEL + "self_attn.rotary_emb.inv_freq", "computed from the config"),
)

ATTENTION: Rules = (
    Rule(_MODEL + "self_attn.q_proj.weight", _LAYER + "attention.q_NHD", "(n h) d -> n h d"),
    Rule(_MODEL + "self_attn.k_proj.weight", _LAYER + "attention.k_KHD", "(k h) d -> k h d"),
    Rule(_MODEL + "self_attn.v_proj.weight", _LAYER + "attention.v_KHD", "(k h) d -> k h d"),
    Rule(_MODEL + "self_attn.o_proj.weight", _LAYER + "attention.o_DNH", "d (n h) -> d n h"),
)

QKV_BIAS: Rules = (
    Rule(_MODEL + "self_attn.q_proj.bias", _LAYER + "attention.q_bias_NH", "(n h) -> n h"),
    Rule(_MODEL + "self_attn.k_proj.bias", _LAYER + "attention.k_bias_KH", "(k h) -> k h"),
    Rule(_MODEL + "self_attn.v_proj.bias", _LAYER + "attention.v_bias_KH", "(k h) -> k h"),
)

OUT_BIAS: Rules = (Rule(_MODEL + "self_attn.o_proj.bias", _LAYER + "attention.o_bias_D"),)

QK_NORM: Rules = (
    Rule(_MODEL + "self_attn.q_norm.weight", _LAYER + "attention.q_norm.weight_D"),
    Rule(_MODEL + "self_attn.k_norm.weight", _LAYER + "attention.k_norm.weight_D"),
)

DENSE_MLP: Rules = (
    Rule(_MODEL + "mlp.gate_proj.weight", _LAYER + "feed_forward.up_GFD", at=(0,)),
    Rule(_MODEL + "mlp.up_proj.weight", _LAYER + "feed_forward.up_GFD", at=(1,)),
    Rule(_MODEL + "mlp.down_proj.weight", _LAYER + "feed_forward.down_DF"),
)

FUSED_EXPERTS: Rules = (
    Rule(_MODEL + "mlp.experts.gate_up_proj", _LAYER + "feed_forward.up_EGFD", "e (g f) d -> e g f d"),
    Rule(_MODEL + "mlp.experts.down_proj", _LAYER + "feed_forward.down_EDF"),
)

EXPERTS: Rules = (
    Rule(_MODEL + "mlp.gate.weight", _LAYER + "feed_forward.gate_ED"),
    Rule(_MODEL + "mlp.experts.{expert}.gate_proj.weight", _LAYER + "feed_forward.up_EGFD", at=("{expert}", 0)),
    Rule(_MODEL + "mlp.experts.{expert}.up_proj.weight", _LAYER + "feed_forward.up_EGFD", at=("{expert}", 1)),
    Rule(_MODEL + "mlp.experts.{expert}.down_proj.weight", _LAYER + "feed_forward.down_EDF", at=("{expert}",)),
    *FUSED_EXPERTS,
)


class DecoderConfig(Protocol):
    """What `assemble` reads of a family's Config."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def rms_norm_eps(self) -> float: ...
    @property
    def tie_word_embeddings(self) -> bool: ...
    @property
    def rope(self) -> Rope: ...


def assemble(
    config: DecoderConfig,
    attention: Callable[[int], Attention],
    feed_forward: Callable[[int], MoE | MLP],
    *,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
) -> CausalLM:
    """A decoder of the parts that `attention(layer)` and `feed_forward(layer)` make."""
    vocab_size, width = config.vocab_size, config.hidden_size

    def norm() -> RMSNorm:
        return RMSNorm(width, epsilon=config.rms_norm_eps, dtype=dtype)

    layers = [
        DecoderLayer(norm(), attention(layer), norm(), feed_forward(layer)) for layer in range(config.num_hidden_layers)
    ]
    embedding = Embedding(vocab_size, width, dtype=dtype, rngs=rngs)
    head = None if config.tie_word_embeddings else Head(vocab_size, width, dtype=dtype, rngs=rngs)
    return CausalLM(embedding, layers, norm(), head, rope=config.rope)


def head(*, is_tied: bool) -> Rules:
    """The vocabulary projection: its own parameter, or an optional copy of the embedding."""
    if is_tied:
        return (Copy("lm_head.weight", "embedding.weight_VD"),)
    return (Rule("lm_head.weight", "head.weight_VD"),)


def is_sparse_layer(layer: int, *, decoder_sparse_step: int, mlp_only_layers: Sequence[int]) -> bool:
    """Qwen's schedule: every `decoder_sparse_step`-th layer has experts, but those listed."""
    return layer not in mlp_only_layers and (layer + 1) % decoder_sparse_step == 0
