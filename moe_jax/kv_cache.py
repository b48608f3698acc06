"""What decoding remembers: keys and values of every layer, and how far each request has come.

Layout `[B, K, S, H]`: a decode step appends in place when the buffers are donated (a `[B, S, K, H]` cache is copied by XLA).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer; position s of request b is filled where `s < positions_B[b]`."""

    k_BKSH: Float[Array, "B K S H"]
    v_BKSH: Float[Array, "B K S H"]

    @classmethod
    def empty(cls, batch: int, heads: int, capacity: int, head_width: int, dtype: jnp.dtype) -> LayerCache:
        shape = (batch, heads, capacity, head_width)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def filled(self, k_BTKH: jax.Array, v_BTKH: jax.Array) -> LayerCache:
        """Positions 0 to T of every request set: what prefill writes."""
        start = (0, 0, 0, 0)
        return LayerCache(
            lax.dynamic_update_slice(self.k_BKSH, k_BTKH.swapaxes(1, 2), start),
            lax.dynamic_update_slice(self.v_BKSH, v_BTKH.swapaxes(1, 2), start),
        )

    def appended(self, k_BKH: jax.Array, v_BKH: jax.Array, positions_B: jax.Array) -> LayerCache:
        """One position of each request set: what a decode step writes."""
        requests_B = jnp.arange(positions_B.shape[0])
        return LayerCache(
            self.k_BKSH.at[requests_B, :, positions_B].set(k_BKH),
            self.v_BKSH.at[requests_B, :, positions_B].set(v_BKH),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """`positions_B[b]` is where request b's next token goes. `cross` and `cross_lengths_B` belong to encoder-decoders."""

    layers: tuple[LayerCache, ...]
    positions_B: Int[Array, "B"]
    cross: tuple[LayerCache, ...] = ()
    cross_lengths_B: Int[Array, "B"] | None = None
