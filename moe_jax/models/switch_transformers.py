"""Switch Transformers (arXiv:2101.03961): a T5 encoder-decoder whose sparse layers send each token to one expert.

Checkpoints: google/switch-base-8 to switch-base-256, switch-large-128. The surprises: an expert takes at most `expert_capacity`
tokens of a sequence and drops the rest, so a token's result depends on those before it; attention scores are not scaled, and
take a relative position bias that the first layer of a stack holds for all of it; experts have no gate.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.checkpoints.rules import Copy, Rule
from moe_jax.kv_cache import KVCache, LayerCache
from moe_jax.layers import parameter
from moe_jax.layers.attention import attend, causal
from moe_jax.layers.decoder import Step, add_feed_forward, of_sparse_layers
from moe_jax.layers.embedding import Embedding, Head
from moe_jax.layers.linear import linear
from moe_jax.layers.mlp import MLP
from moe_jax.layers.moe import MoE
from moe_jax.layers.norm import RMSNorm
from moe_jax.layers.relative_position import RelativePositionBias
from moe_jax.models.decoder_families import Rules
from moe_jax.models.hf_config import HFConfig
from pallas_kernels import Activation, Routing, RoutingRule


@dataclasses.dataclass(frozen=True)
class Config:
    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    expert_capacity: int
    num_layers: int
    encoder_sparse_step: int
    num_decoder_layers: int
    decoder_sparse_step: int
    num_heads: int
    num_experts: int
    router_bias: bool
    router_dtype: Literal["float32", "bfloat16", "float16"]
    relative_attention_num_buckets: int
    relative_attention_max_distance: int
    layer_norm_epsilon: float
    dense_act_fn: Activation
    tie_word_embeddings: bool
    decoder_start_token_id: int
    eos_token_id: tuple[int, ...]

    @classmethod
    def from_hf(cls, keys: dict[str, Any]) -> Config:
        hf = HFConfig(keys, "switch_transformers")
        num_layers = hf.positive("num_layers", 12, "num_hidden_layers")
        num_decoder_layers = hf.positive("num_decoder_layers", num_layers if hf.has("num_decoder_layers") else 12)
        hf.refuse("is_gated_act", unless=(False,), why="Hugging Face's Switch has no gated feed-forward to agree with")
        hf.refuse("feed_forward_proj", unless=("relu", "gelu", "silu"), why="only feed-forwards without a gate exist")
        hf.refuse("is_encoder_decoder", unless=(True,), why="only the whole encoder-decoder can be loaded")
        hf.refuse("router_dtype", unless=("float32", "bfloat16", "float16"), why="routers compute in one of these")
        hf.refuse("batch_prioritized_routing", unless=(False,), why="capacity is counted in the order of the sequence")
        # Training only, or read by no code.
        hf.irrelevant("dropout_rate", "router_z_loss_coef", "initializer_factor", "add_router_probs", "router_type")
        hf.irrelevant("router_ignore_padding_tokens", "n_positions")
        config = cls(
            vocab_size=hf.positive("vocab_size", 32128),
            d_model=hf.positive("d_model", 768, "hidden_size"),
            d_kv=hf.positive("d_kv", 64),
            d_ff=hf.positive("d_ff", 2048),
            expert_capacity=hf.positive("expert_capacity", 64),
            num_layers=num_layers,
            # A step in the file wins over the one that follows from the number of sparse layers, as in Hugging Face.
            encoder_sparse_step=hf.take(
                "encoder_sparse_step", _sparse_step(num_layers, hf.take("num_sparse_encoder_layers", 3))
            ),
            num_decoder_layers=num_decoder_layers,
            decoder_sparse_step=hf.take(
                "decoder_sparse_step", _sparse_step(num_decoder_layers, hf.take("num_sparse_decoder_layers", 3))
            ),
            num_heads=hf.positive("num_heads", 12, "num_attention_heads"),
            num_experts=hf.positive("num_experts", 8),
            router_bias=hf.flag("router_bias", False),
            router_dtype=hf.take("router_dtype", "float32"),
            relative_attention_num_buckets=hf.positive("relative_attention_num_buckets", 32),
            relative_attention_max_distance=hf.positive("relative_attention_max_distance", 128),
            layer_norm_epsilon=hf.number("layer_norm_epsilon", 1e-6),
            dense_act_fn=hf.activation("dense_act_fn", hf.take("feed_forward_proj", "relu")),
            tie_word_embeddings=hf.flag("tie_word_embeddings", True),
            decoder_start_token_id=hf.take("decoder_start_token_id", hf.take("pad_token_id", 0)),
            eos_token_id=hf.token_ids("eos_token_id"),
        )
        hf.finish()
        return config


def _sparse_step(num_layers: int, num_sparse_layers: int) -> int:
    """Every how many layers one is sparse; with no sparse layers asked for, Hugging Face still makes layer 1 sparse."""
    return num_layers // num_sparse_layers if num_sparse_layers > 0 else num_layers


def _is_sparse(layer: int, step: int) -> bool:
    """Steps beyond the number of layers, 0 among them, make no layer sparse."""
    return step > 0 and (step == 1 or layer % step == 1)


class T5Attention(nnx.Module):
    """Attention without rotation, scaling or biases; keys and values may come from another sequence."""

    def __init__(self, width: int, *, num_heads: int, head_width: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        shape, axes = (num_heads, head_width, width), ("q_heads", None, "embed")
        self.q_NHD = parameter.normal(rngs, shape, axes, dtype)
        self.k_NHD = parameter.normal(rngs, shape, axes, dtype)
        self.v_NHD = parameter.normal(rngs, shape, axes, dtype)
        self.o_DNH = parameter.normal(rngs, (width, num_heads, head_width), ("embed", "q_heads", None), dtype)

    def keys_values(self, x_BSD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values `[B, S, N, H]`."""
        return self._heads(x_BSD, self.k_NHD), self._heads(x_BSD, self.v_NHD)

    def __call__(self, x_BTD, cache: LayerCache, is_visible_BTS, bias_NTS=None) -> jax.Array:
        q_BTNH = self._heads(x_BTD, self.q_NHD)
        out = attend(q_BTNH, cache.k_BKSH, cache.v_BKSH, is_visible_BTS, scale=1.0, bias_NTS=bias_NTS)
        D, N, H = self.o_DNH.shape
        return linear(out.reshape(*x_BTD.shape[:2], N * H), self.o_DNH[...].reshape(D, N * H))

    def _heads(self, x_BTD, weight_NHD: nnx.Param):
        N, H, D = weight_NHD.shape
        return linear(x_BTD, weight_NHD[...].reshape(N * H, D)).reshape(*x_BTD.shape[:2], N, H)


class Block(nnx.Module):
    """Self-attention, in a decoder attention to the encoder, and a feed-forward; each normalised before and added."""

    def __init__(self, config: Config, *, is_decoder: bool, is_sparse: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        parts: dict[str, Any] = dict(dtype=dtype, rngs=rngs)
        width, activation = config.d_model, config.dense_act_fn

        def norm() -> RMSNorm:
            return RMSNorm(width, epsilon=config.layer_norm_epsilon, dtype=dtype)

        def attention() -> T5Attention:
            return T5Attention(width, num_heads=config.num_heads, head_width=config.d_kv, **parts)

        self.attention_norm, self.attention = norm(), attention()
        self.cross_norm = norm() if is_decoder else None
        self.cross = attention() if is_decoder else None
        self.feed_forward_norm = norm()
        self.feed_forward = (
            MoE(
                width,
                config.d_ff,
                config.num_experts,
                rule=RoutingRule(top_k=1, dtype=config.router_dtype),
                activation=activation,
                is_gated=False,
                has_gate_bias=config.router_bias,
                capacity=config.expert_capacity,
                **parts,
            )
            if is_sparse
            else MLP(width, config.d_ff, activation=activation, is_gated=False, **parts)
        )

    def __call__(
        self, x_BTD, write, is_visible_BTS, bias_NTS, cross: LayerCache | None = None, is_cross_visible_BTS=None
    ) -> tuple[jax.Array, Routing | None, LayerCache]:
        """`write(k, v)` gives the cache to attend over: the new keys alone, or those of all positions so far."""
        normed_BTD = self.attention_norm(x_BTD)
        cache = write(*self.attention.keys_values(normed_BTD))
        x_BTD = x_BTD + self.attention(normed_BTD, cache, is_visible_BTS, bias_NTS)
        if self.cross is not None and self.cross_norm is not None and cross is not None:
            x_BTD = x_BTD + self.cross(self.cross_norm(x_BTD), cross, is_cross_visible_BTS)
        return *add_feed_forward(x_BTD, self.feed_forward_norm, self.feed_forward), cache


class Stack(nnx.Module):
    """The encoder or the decoder: embedding, blocks that share a position bias, a final norm."""

    def __init__(
        self, config: Config, *, is_decoder: bool, embedding: Embedding | None, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        parts: dict[str, Any] = dict(dtype=dtype, rngs=rngs)
        num_layers = config.num_decoder_layers if is_decoder else config.num_layers
        step = config.decoder_sparse_step if is_decoder else config.encoder_sparse_step
        self.embedding = embedding
        self.position_bias = RelativePositionBias(
            config.relative_attention_num_buckets,
            config.num_heads,
            max_distance=config.relative_attention_max_distance,
            is_bidirectional=not is_decoder,
            **parts,
        )
        self.blocks = nnx.List(
            [
                Block(config, is_decoder=is_decoder, is_sparse=_is_sparse(layer, step), **parts)
                for layer in range(num_layers)
            ]
        )
        self.norm = RMSNorm(config.d_model, epsilon=config.layer_norm_epsilon, dtype=dtype)


class SwitchTransformer(nnx.Module):
    """The encoder-decoder. Prompts go to the encoder; generation starts from `decoder_start_token_id`."""

    def __init__(self, config: Config, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        def embedding() -> Embedding:
            return Embedding(config.vocab_size, config.d_model, dtype=dtype, rngs=rngs)

        is_tied = config.tie_word_embeddings
        self.decoder_start_token_id, self.is_tied = config.decoder_start_token_id, is_tied
        self.shared = embedding()
        self.encoder = Stack(
            config, is_decoder=False, embedding=None if is_tied else embedding(), dtype=dtype, rngs=rngs
        )
        self.decoder = Stack(
            config, is_decoder=True, embedding=None if is_tied else embedding(), dtype=dtype, rngs=rngs
        )
        self.head = None if is_tied else Head(config.vocab_size, config.d_model, dtype=dtype, rngs=rngs)

    def empty_cache(self, batch: int, capacity: int) -> KVCache:
        """A cache for `capacity` decoder positions; prefill adds the encoder's keys and values."""

        def layer_cache(block: Block) -> LayerCache:
            heads, head_width = block.attention.k_NHD.shape[:2]
            return LayerCache.empty(batch, heads, capacity, head_width, block.attention.k_NHD.dtype)

        return KVCache(tuple(layer_cache(block) for block in self.decoder.blocks), jnp.zeros((batch,), jnp.int32))

    def prefill(self, tokens_BT: jax.Array, lengths_B: jax.Array, cache: KVCache) -> Step:
        """Encodes prompts, padded on the right to T, and decodes the start token; logits of the first token."""
        cross, encoder_routings = self._encoded(tokens_BT, lengths_B)
        start_B = jnp.full(tokens_BT.shape[:1], self.decoder_start_token_id, jnp.int32)
        cache = dataclasses.replace(cache, cross=cross, cross_lengths_B=lengths_B.astype(jnp.int32))
        step = self.decode(start_B, cache)
        return dataclasses.replace(step, prompt_routings=encoder_routings)

    def decode(self, tokens_B: jax.Array, cache: KVCache) -> Step:
        """One more token of each request; logits of the one after it."""
        positions_B = cache.positions_B
        capacity = cache.layers[0].k_BKSH.shape[2]
        x_BTD = self._embedded(self.decoder, tokens_B[:, None])
        is_visible_BTS = causal(positions_B[:, None], capacity)
        bias_BNTS = self.decoder.position_bias(positions_B[:, None], capacity)
        layers, routings = [], []
        for block, own, cross in zip(self.decoder.blocks, cache.layers, cache.cross, strict=True):

            def append(k_BTNH, v_BTNH, own=own):
                return own.appended(k_BTNH[:, 0], v_BTNH[:, 0], positions_B)

            is_cross_visible_BTS = _within(cache.cross_lengths_B, 1, cross.k_BKSH.shape[2])
            x_BTD, routing, own = block(x_BTD, append, is_visible_BTS, bias_BNTS, cross, is_cross_visible_BTS)
            layers.append(own)
            routings.append(routing)
        cache = dataclasses.replace(cache, layers=tuple(layers), positions_B=positions_B + 1)
        return Step(self._logits(x_BTD[:, 0]), cache, of_sparse_layers(routings))

    def logits(
        self, tokens_BT: jax.Array, lengths_B: jax.Array, decoder_tokens_BU: jax.Array
    ) -> tuple[jax.Array, tuple[Routing, ...]]:
        """Logits after every decoder token (teacher forcing), `[B, U, V]` float32; the encoder's and decoder's routings."""
        cross, encoder_routings = self._encoded(tokens_BT, lengths_B)
        B, U = decoder_tokens_BU.shape
        positions_BT = jnp.broadcast_to(jnp.arange(U), (B, U))
        x_BTD = self._embedded(self.decoder, decoder_tokens_BU)
        is_visible_BTS, bias_BNTS = causal(positions_BT, U), self.decoder.position_bias(positions_BT, U)
        is_cross_visible_BTS = _within(lengths_B, U, tokens_BT.shape[1])
        routings = []
        for block, each in zip(self.decoder.blocks, cross, strict=True):
            x_BTD, routing, _ = block(x_BTD, _alone, is_visible_BTS, bias_BNTS, each, is_cross_visible_BTS)
            routings.append(routing)
        return self._logits(x_BTD), encoder_routings + of_sparse_layers(routings)

    def _encoded(self, tokens_BT, lengths_B) -> tuple[tuple[LayerCache, ...], tuple[Routing, ...]]:
        """The encoder's result as keys and values for every decoder layer."""
        B, T = tokens_BT.shape
        positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
        x_BTD = self._embedded(self.encoder, tokens_BT)
        is_visible_BTS, bias_BNTS = _within(lengths_B, T, T), self.encoder.position_bias(positions_BT, T)
        routings = []
        for block in self.encoder.blocks:
            x_BTD, routing, _ = block(x_BTD, _alone, is_visible_BTS, bias_BNTS)
            routings.append(routing)
        x_BTD = self.encoder.norm(x_BTD)
        crosses = [block.cross for block in self.decoder.blocks if block.cross is not None]
        cross = tuple(_alone(*each.keys_values(x_BTD)) for each in crosses)
        return cross, of_sparse_layers(routings)

    def _embedded(self, stack: Stack, tokens_BT):
        return (self.shared if stack.embedding is None else stack.embedding)(tokens_BT)

    def _logits(self, x_XD):
        x_XD = self.decoder.norm(x_XD)
        if self.head is not None:
            return self.head.logits(x_XD)
        return self.shared.logits(x_XD * x_XD.shape[-1] ** -0.5)


def _alone(k_BTNH: jax.Array, v_BTNH: jax.Array) -> LayerCache:
    return LayerCache(k_BTNH.swapaxes(1, 2), v_BTNH.swapaxes(1, 2))


def _within(lengths_B, num_queries: int, num_keys: int) -> jax.Array:
    """`[B, T, S]`: keys of the padding are not visible."""
    is_visible_BS = jnp.arange(num_keys) < lengths_B[:, None]
    return jnp.broadcast_to(is_visible_BS[:, None], (lengths_B.shape[0], num_queries, num_keys))


def build(config: Config, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> SwitchTransformer:
    """The model with random parameters of the given dtype."""
    return SwitchTransformer(config, dtype=dtype, rngs=rngs)


def rules(config: Config) -> Rules:
    def attention(hf: str, ours: str) -> list[Rule]:
        return [
            *(Rule(f"{hf}.{name}.weight", f"{ours}.{name}_NHD", "(n h) d -> n h d") for name in "qkv"),
            Rule(f"{hf}.o.weight", f"{ours}.o_DNH", "d (n h) -> d n h"),
        ]

    def stack(name: str, feed_forward: int) -> list[Rule]:
        """`feed_forward` is the number of that sublayer in a block: the decoder has one more before it."""
        hf, ours = f"{name}.block.{{layer}}.layer", f"{name}.blocks.{{layer}}"
        mlp, mine = f"{hf}.{feed_forward}.mlp", f"{ours}.feed_forward"
        bias = f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        return [
            Rule(bias, f"{name}.position_bias.weight_XN"),
            *attention(f"{hf}.0.SelfAttention", f"{ours}.attention"),
            Rule(f"{hf}.0.layer_norm.weight", f"{ours}.attention_norm.weight_D"),
            Rule(f"{hf}.{feed_forward}.layer_norm.weight", f"{ours}.feed_forward_norm.weight_D"),
            Rule(f"{mlp}.wi.weight", f"{mine}.up_GFD", at=(0,)),
            Rule(f"{mlp}.wo.weight", f"{mine}.down_DF"),
            Rule(f"{mlp}.router.classifier.weight", f"{mine}.gate_ED"),
            Rule(f"{mlp}.router.classifier.bias", f"{mine}.gate_bias_E"),
            Rule(f"{mlp}.experts.expert_{{expert}}.wi.weight", f"{mine}.up_EGFD", at=("{expert}", 0)),
            Rule(f"{mlp}.experts.expert_{{expert}}.wo.weight", f"{mine}.down_EDF", at=("{expert}",)),
            Rule(f"{name}.final_layer_norm.weight", f"{name}.norm.weight_D"),
        ]

    table: list[Rule | Copy] = [
        Rule("shared.weight", "shared.weight_VD"),
        *stack("encoder", 1),
        *stack("decoder", 2),
        *attention("decoder.block.{layer}.layer.1.EncDecAttention", "decoder.blocks.{layer}.cross"),
        Rule("decoder.block.{layer}.layer.1.layer_norm.weight", "decoder.blocks.{layer}.cross_norm.weight_D"),
    ]
    if config.tie_word_embeddings:
        names = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
        return (*table, *(Copy(name, "shared.weight_VD") for name in names))
    untied = [Rule(f"{name}.embed_tokens.weight", f"{name}.embedding.weight_VD") for name in ("encoder", "decoder")]
    return (*table, *untied, Rule("lm_head.weight", "head.weight_VD"))
