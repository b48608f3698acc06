"""A tiny checkpoint of every family, and what the unsharded model says, for tests in one process and in several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import moe_jax
from moe_jax.testing import random_model

_DECODER: dict[str, Any] = dict(
    vocab_size=67,
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=8,
    num_key_value_heads=2,
    max_position_embeddings=64,
    eos_token_id=1,
)
# Heads and widths divide by 8. Experts: 8 are even, 6 leave empty ones, 3 leave devices empty. 67 words divide by nothing.
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": dict(_DECODER, intermediate_size=32, num_local_experts=6, num_experts_per_tok=2),
    "olmoe": dict(_DECODER, intermediate_size=16, num_experts=8, num_experts_per_tok=3),
    "qwen2_moe": dict(
        _DECODER,
        num_hidden_layers=2,
        decoder_sparse_step=2,
        intermediate_size=32,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
        num_experts=8,
        num_experts_per_tok=2,
    ),
    "qwen3_moe": dict(
        _DECODER, head_dim=8, moe_intermediate_size=16, num_experts=3, num_experts_per_tok=2, norm_topk_prob=True
    ),
    "switch_transformers": dict(
        vocab_size=67,
        d_model=32,
        d_kv=4,
        d_ff=32,
        num_heads=8,
        num_layers=1,
        num_decoder_layers=1,
        encoder_sparse_step=1,
        decoder_sparse_step=1,
        num_experts=8,
        expert_capacity=4,
        eos_token_id=1,
    ),
}
PROMPTS = [[5, 9, 3, 40, 66], [7], list(range(20, 37))]
NEW_TOKENS = 6


def saved(directory: Path) -> Path:
    """Writes the checkpoints, one folder each."""
    for seed, (model_type, config) in enumerate(CONFIGS.items()):
        # With larger matrices scores are large, and softmax magnifies every rounding: OLMoE's logits were off by 1.2e-6 at
        # 0.4, by 0.4e-6 at 0.2.
        model = random_model(dict(config, model_type=model_type), seed=seed, scale=0.2)
        moe_jax.save(model, directory / model_type)
    return directory


def generated(model: moe_jax.Model) -> moe_jax.Generated:
    return moe_jax.generate(model, PROMPTS, max_new_tokens=NEW_TOKENS, stop_token_ids=(), routed_experts=True)


def logits(model: moe_jax.Model) -> np.ndarray:
    """Of the tokens that are not padding, `[X, V]`."""
    tokens_BT, lengths_B = np.zeros((3, 17), np.int32), np.array([len(each) for each in PROMPTS])
    for row_T, prompt in zip(tokens_BT, PROMPTS, strict=True):
        row_T[: len(prompt)] = prompt
    decoder = dict(decoder_tokens_BU=tokens_BT[:, :4]) if model.is_encoder_decoder else {}
    logits_BTV = np.asarray(moe_jax.logits(model, tokens_BT, lengths_B, **decoder))
    is_real_BT = np.arange(logits_BTV.shape[1]) < (4 if decoder else lengths_B[:, None])
    return logits_BTV[np.broadcast_to(is_real_BT, logits_BTV.shape[:2])]
