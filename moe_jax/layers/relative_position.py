"""T5's relative position bias (arXiv:1910.10683): a learned number per head and distance bucket, added to the scores."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.layers import parameter


class RelativePositionBias(nnx.Module):
    """Small distances have a bucket each, larger ones share logarithmically wider buckets up to `max_distance`."""

    def __init__(
        self,
        num_buckets: int,
        num_heads: int,
        *,
        max_distance: int,
        is_bidirectional: bool,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.max_distance, self.is_bidirectional = max_distance, is_bidirectional
        self.weight_XN = parameter.normal(rngs, (num_buckets, num_heads), (None, "q_heads"), dtype)

    def __call__(self, queries_BT: jax.Array, num_keys: int) -> jax.Array:
        """`[B, N, T, S]` for queries at the given positions and keys at 0 to S."""
        distances_BTS = jnp.arange(num_keys) - queries_BT[..., None]
        bias_BTSN = self.weight_XN[...][self._buckets(distances_BTS)]
        return bias_BTSN.transpose(0, 3, 1, 2)

    def _buckets(self, distances):
        num_buckets = self.weight_XN.shape[0]
        if self.is_bidirectional:
            num_buckets //= 2
            first = jnp.where(distances > 0, num_buckets, 0)
            distances = jnp.abs(distances)
        else:
            first = 0
            distances = -jnp.minimum(distances, 0)
        exact = num_buckets // 2
        # Operations and their order are Hugging Face's: the truncation falls between buckets differently otherwise.
        ratio = jnp.log(jnp.maximum(distances, 1).astype(jnp.float32) / exact) / math.log(self.max_distance / exact)
        wide = jnp.minimum(exact + (ratio * (num_buckets - exact)).astype(jnp.int32), num_buckets - 1)
        return first + jnp.where(distances < exact, distances, wide)
