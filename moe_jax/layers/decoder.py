"""A decoder-only language model, put together from an attention and a feed-forward part per layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moe_jax.kv_cache import KVCache, LayerCache
from moe_jax.layers.attention import Attention
from moe_jax.layers.embedding import Embedding, Head
from moe_jax.layers.mlp import MLP
from moe_jax.layers.moe import MoE
from moe_jax.layers.norm import RMSNorm
from moe_jax.layers.rope import Rope
from pallas_kernels import Routing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Step:
    """What a model gives for one step: logits of each request's next token, the cache, and every sparse layer's routing.

    `routings` are those of the tokens that the logits come from, `[B, A]` each, in the order of the layers; `prompt_routings`
    those of all the prompts' tokens, `[B * T, A]` each (prefill only; of the encoder in an encoder-decoder).
    """

    logits_BV: Float[Array, "B V"]
    cache: KVCache
    routings: tuple[Routing, ...]
    prompt_routings: tuple[Routing, ...] = ()


class DecoderLayer(nnx.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(
        self, attention_norm: RMSNorm, attention: Attention, feed_forward_norm: RMSNorm, feed_forward: MoE | MLP
    ):
        self.attention_norm, self.attention = attention_norm, attention
        self.feed_forward_norm, self.feed_forward = feed_forward_norm, feed_forward

    def prefill(self, x_BTD, tables, cache: LayerCache | None):
        x_BTD, cache = self.attention.prefill(x_BTD, self.attention_norm, tables, cache)
        return *self._fed_forward(x_BTD), cache

    def decode(self, x_BTD, tables, cache: LayerCache, positions_B):
        x_BTD, cache = self.attention.decode(x_BTD, self.attention_norm, tables, cache, positions_B)
        return *self._fed_forward(x_BTD), cache

    def _fed_forward(self, x_BTD) -> tuple[jax.Array, Routing | None]:
        return add_feed_forward(x_BTD, self.feed_forward_norm, self.feed_forward)


def add_feed_forward(x_BTD: jax.Array, norm: RMSNorm, feed_forward: MoE | MLP) -> tuple[jax.Array, Routing | None]:
    """The residual stream after a feed-forward part, and its routing if it is sparse."""
    if isinstance(feed_forward, MoE):
        return feed_forward(x_BTD, norm=norm, residual_BTD=x_BTD)
    return feed_forward(x_BTD, norm=norm, residual_BTD=x_BTD), None


class CausalLM(nnx.Module):
    """Embedding, layers, norm, head. `head=None` ties the head to the embedding."""

    def __init__(
        self, embedding: Embedding, layers: Sequence[DecoderLayer], norm: RMSNorm, head: Head | None, *, rope: Rope
    ):
        self.embedding, self.layers, self.norm, self.head = embedding, nnx.List(layers), norm, head
        self.rope = rope

    @property
    def context_length(self) -> int | None:
        return self.rope.context_length

    def empty_cache(self, batch: int, capacity: int) -> KVCache:
        """A cache for `capacity` positions of each request."""

        def layer_cache(attention: Attention) -> LayerCache:
            heads, head_width = attention.k_KHD.shape[:2]
            return LayerCache.empty(batch, heads, capacity, head_width, attention.k_KHD.dtype)

        layers = tuple(layer_cache(layer.attention) for layer in self.layers)
        return KVCache(layers, jnp.zeros((batch,), jnp.int32))

    def prefill(self, tokens_BT: jax.Array, lengths_B: jax.Array, cache: KVCache) -> Step:
        """Reads prompts, padded on the right to T, into an empty cache; logits follow each prompt's last token."""
        x_BTD, layers, routings = self._prefilled(tokens_BT, lengths_B, cache.layers)
        B, T = tokens_BT.shape
        last_B = jnp.arange(B) * T + lengths_B - 1
        last_BD = x_BTD.reshape(B * T, -1)[last_B]
        cache = dataclasses.replace(cache, layers=layers, positions_B=lengths_B.astype(jnp.int32))
        last_routings = jax.tree.map(lambda each_X: each_X[last_B], routings)
        return Step(self._logits(last_BD), cache, last_routings, routings)

    def decode(self, tokens_B: jax.Array, cache: KVCache) -> Step:
        """One more token of each request; logits of the one after it."""
        positions_B = cache.positions_B
        tables = self.rope.tables(positions_B[:, None], positions_B + 1)
        x_BTD = self.embedding(tokens_B[:, None])
        layers, routings = [], []
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            x_BTD, routing, layer_cache = layer.decode(x_BTD, tables, layer_cache, positions_B)
            layers.append(layer_cache)
            routings.append(routing)
        cache = dataclasses.replace(cache, layers=tuple(layers), positions_B=positions_B + 1)
        return Step(self._logits(x_BTD[:, 0]), cache, of_sparse_layers(routings))

    def logits(self, tokens_BT: jax.Array, lengths_B: jax.Array) -> tuple[jax.Array, tuple[Routing, ...]]:
        """Logits after every token (teacher forcing), `[B, T, V]` float32, without a cache; and the routings."""
        x_BTD, _, routings = self._prefilled(tokens_BT, lengths_B, (None,) * len(self.layers))
        return self._logits(x_BTD), routings

    def _prefilled(self, tokens_BT, lengths_B, caches):
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        tables = self.rope.tables(positions_BT, lengths_B)
        x_BTD = self.embedding(tokens_BT)
        filled, routings = [], []
        for layer, cache in zip(self.layers, caches, strict=True):
            x_BTD, routing, cache = layer.prefill(x_BTD, tables, cache)
            filled.append(cache)
            routings.append(routing)
        return x_BTD, tuple(filled), of_sparse_layers(routings)

    def _logits(self, x_XD):
        head = self.embedding if self.head is None else self.head
        return head.logits(x_XD, norm=self.norm)


def of_sparse_layers(routings: list[Routing | None]) -> tuple[Routing, ...]:
    """Dense layers have no routing."""
    return tuple(routing for routing in routings if routing is not None)
