"""Token embeddings, and the projection back to the vocabulary."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.layers import parameter
from moe_jax.layers.linear import logits
from moe_jax.layers.norm import RMSNorm


class Embedding(nnx.Module):
    """Rows of a `[V, D]` matrix by token id; `logits` multiplies by the same matrix (tied embeddings)."""

    def __init__(self, vocab_size: int, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.weight_VD = parameter.normal(rngs, (vocab_size, width), ("vocab", "embed"), dtype)

    def __call__(self, tokens_X: jax.Array) -> jax.Array:
        return self.weight_VD[...][tokens_X]

    def logits(self, x_XD: jax.Array, *, norm: RMSNorm | None = None) -> jax.Array:
        return logits(x_XD, self.weight_VD[...], norm=norm)


class Head(nnx.Module):
    """The projection to vocabulary logits of a model whose embeddings are not tied."""

    def __init__(self, vocab_size: int, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.weight_VD = parameter.normal(rngs, (vocab_size, width), ("vocab", "embed"), dtype)

    def logits(self, x_XD: jax.Array, *, norm: RMSNorm | None = None) -> jax.Array:
        return logits(x_XD, self.weight_VD[...], norm=norm)
