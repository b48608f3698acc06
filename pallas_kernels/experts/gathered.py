"""A few tokens in plain JAX: each choice takes its own expert's matrices. What CPUs decode with."""

from __future__ import annotations

import functools

import jax.numpy as jnp

from pallas_kernels import precision
from pallas_kernels.dispatch import Device, Implementation
from pallas_kernels.experts.reference import activate, adding_residual
from pallas_kernels.route.api import Routing


@adding_residual
def experts(
    x_TD, routing: Routing, up_EGFD, down_EDF, *, activation, up_bias_EGF=None, down_bias_ED=None, first_expert=0
):
    num_experts = up_EGFD.shape[0]
    local_TA = routing.experts_TA - first_expert
    is_local_TA = (local_TA >= 0) & (local_TA < num_experts)
    local_TA = jnp.clip(local_TA, 0, num_experts - 1)
    weights_TA = jnp.where(is_local_TA, routing.weights_TA, 0.0)

    product = functools.partial(jnp.einsum, precision=precision.full(x_TD.dtype), preferred_element_type=jnp.float32)
    up_TAGF = product("TD,TAGFD->TAGF", x_TD, up_EGFD[local_TA])
    if up_bias_EGF is not None:
        up_TAGF = up_TAGF + up_bias_EGF[local_TA]
    hidden_TAF = activate(up_TAGF, activation, axis=2).astype(x_TD.dtype)
    out_TAD = product("TAF,TADF->TAD", hidden_TAF, down_EDF[local_TA])
    if down_bias_ED is not None:
        out_TAD = out_TAD + down_bias_ED[local_TA]
    return (weights_TA[:, :, None] * out_TAD).sum(axis=1).astype(x_TD.dtype)


def _supports(device: Device, x_TD, routing, up_EGFD, down_EDF, **arguments) -> str | None:
    num_choices, num_experts = routing.experts_TA.size, up_EGFD.shape[0]
    if num_choices > num_experts:
        return f"it copies one expert for each of the {num_choices} choices, more than the {num_experts} there are"
    return None


IMPLEMENTATION = Implementation("gathered", supports=_supports, run=experts)
