"""What the expert kernels need of a routing, in plain JAX: which experts are active, and for which tokens.

`route`'s kernel writes the decode plan in its own launch. The functions here do the same for a routing that came
without one, or for a range of the experts.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from pallas_kernels.route.api import DecodePlan, Routing


def padded_tokens(num_tokens: int) -> int:
    """The width of a decode kernel's token tile: 8, 16, 32 or 64, the widths of `wgmma` in use."""
    return max(8, 1 << (num_tokens - 1).bit_length())


def decode_plan(routing: Routing, *, num_experts: int, first_expert: int) -> DecodePlan:
    """The plan for the experts `first_expert` up to `first_expert + num_experts`, numbered from 0.

    Example: 4 experts, tokens that chose [0, 2] and [2, 3]: `active_E` is [0, 2, 3, 4], `num_active` [3].
    """
    num_tokens = routing.experts_TA.shape[0]
    ids_E = first_expert + jnp.arange(num_experts, dtype=jnp.int32)
    is_chosen_ETA = routing.experts_TA[None] == ids_E[:, None, None]
    combine_ET = jnp.where(is_chosen_ETA, routing.weights_TA[None], 0.0).sum(axis=2)
    combine_ET = jnp.pad(combine_ET, ((0, 0), (0, padded_tokens(num_tokens) - num_tokens)))
    is_active_E = is_chosen_ETA.any(axis=(1, 2))
    # Sums over comparisons instead of a cumsum and a sort: each is one small fusion on the GPU.
    through_EE = lax.broadcasted_iota(jnp.int32, (num_experts, num_experts), 1)
    is_up_to_EE = through_EE <= jnp.arange(num_experts)[:, None]
    num_up_to_E = (is_up_to_EE & is_active_E[None, :]).sum(axis=1, dtype=jnp.int32)
    active_E = (num_up_to_E[None, :] <= jnp.arange(num_experts)[:, None]).sum(axis=1, dtype=jnp.int32)
    return DecodePlan(combine_ET, active_E, is_active_E.sum(dtype=jnp.int32, keepdims=True))
