"""What a split needs to know of a model: widths and counts, read from a Hugging Face config."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """A decoder with Mixture-of-Experts layers, as numbers. Widths are per expert, per head, per layer.

    cached: values that one token leaves in the cache of one layer (keys and values, or DeepSeek's latent vector).
    attention: parameters of one layer's attention.
    dense_width: hidden width of the layers without experts; shared_width: of the expert that every token visits.
    """

    name: str
    layers: int
    sparse_layers: int
    width: int
    experts: int
    active: int
    expert_width: int
    q_heads: int
    kv_heads: int
    head_width: int
    cached: int
    attention: int
    shared_width: int
    dense_width: int
    vocab: int
    is_tied: bool

    @property
    def expert_parameters(self) -> int:
        """Of one expert: gate, up and down."""
        return 3 * self.width * self.expert_width

    @property
    def has_cache_by_heads(self) -> bool:
        """Whether the cache has keys and values of each head, not a latent vector for all of them."""
        return self.cached == 2 * self.kv_heads * self.head_width

    @property
    def key_value_parameters(self) -> int:
        """Of one layer's key and value projections, where they go by heads."""
        return self.width * self.cached if self.has_cache_by_heads else 0

    @property
    def embedding_parameters(self) -> int:
        return (1 if self.is_tied else 2) * self.vocab * self.width

    @property
    def moe_layer_parameters(self) -> int:
        return self.experts * (self.expert_parameters + self.width) + 3 * self.width * self.shared_width

    @property
    def matrix_parameters(self) -> int:
        """All matrices; norms and biases, less than a thousandth, are left out."""
        dense = (self.layers - self.sparse_layers) * 3 * self.width * self.dense_width
        experts = self.sparse_layers * self.moe_layer_parameters
        return self.layers * self.attention + experts + dense + self.embedding_parameters

    def active_experts(self, tokens: float) -> float:
        """How many of a layer's experts a step of that many tokens visits, on average, when routing is uniform."""
        return self.experts * (1 - (1 - self.active / self.experts) ** tokens)


def model_shape(config: Mapping[str, Any], name: str = "") -> ModelShape:
    """The shape of a Hugging Face `config.json`.

    Raises:
      ValueError: no Mixture-of-Experts decoder, or a key that is needed is missing.
    """
    if config.get("is_encoder_decoder") or config.get("model_type") == "switch_transformers":
        raise ValueError(f"{name}: expected a decoder, got an encoder-decoder ({config.get('model_type')})")
    width, q_heads = _first(config, name, "hidden_size"), _first(config, name, "num_attention_heads")
    kv_heads = config.get("num_key_value_heads") or q_heads
    head_width = config.get("head_dim") or width // q_heads
    layers = _first(config, name, "num_hidden_layers")
    sparse = sum(_is_sparse(layer, config) for layer in range(layers))
    is_latent = config.get("kv_lora_rank") is not None
    return ModelShape(
        name=name or str(config.get("model_type")),
        layers=layers,
        sparse_layers=sparse,
        width=width,
        experts=_first(config, name, "num_local_experts", "num_experts", "n_routed_experts"),
        active=_first(config, name, "num_experts_per_tok", "experts_per_token"),
        expert_width=_first(config, name, "moe_intermediate_size", "intermediate_size"),
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_width=head_width,
        cached=config["kv_lora_rank"] + config["qk_rope_head_dim"] if is_latent else 2 * kv_heads * head_width,
        attention=_latent_attention(config) if is_latent else width * head_width * 2 * (q_heads + kv_heads),
        shared_width=_shared_width(config),
        dense_width=config.get("intermediate_size", 0) if sparse < layers else 0,
        vocab=_first(config, name, "vocab_size"),
        is_tied=bool(config.get("tie_word_embeddings", False)),
    )


def _first(config: Mapping[str, Any], name: str, *keys: str) -> int:
    for key in keys:
        if config.get(key) is not None:
            return int(config[key])
    raise ValueError(f"{name}: expected a config with {' or '.join(keys)}, got none of them")


def _is_sparse(layer: int, config: Mapping[str, Any]) -> bool:
    if layer in config.get("mlp_only_layers", ()) or layer < config.get("first_k_dense_replace", 0):
        return False
    return (layer + 1) % config.get("decoder_sparse_step", 1) == 0


def _shared_width(config: Mapping[str, Any]) -> int:
    if config.get("n_shared_experts"):
        return config["n_shared_experts"] * config["moe_intermediate_size"]
    return config.get("shared_expert_intermediate_size") or 0


def _latent_attention(config: Mapping[str, Any]) -> int:
    """DeepSeek's: queries and keys/values through latent vectors, the rotary part of the key shared by all heads."""
    width, heads, rank = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    query_rank = config.get("q_lora_rank")
    queries = (width + heads * (nope + rope)) * query_rank if query_rank else width * heads * (nope + rope)
    return queries + width * (rank + rope) + rank * heads * (nope + value) + heads * value * width
