"""Many tokens in plain JAX: choices sorted by expert, then `lax.ragged_dot`. What CPUs prefill with.

On an H200 `ragged_dot` reaches 1 to 12 % of the matrix units (docs/benchmarks): there it is the oracle, not the way.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from pallas_kernels import precision
from pallas_kernels.dispatch import Implementation
from pallas_kernels.experts.reference import activate, adding_residual
from pallas_kernels.route.api import Routing


@adding_residual
def experts(
    x_TD,
    routing: Routing,
    up_EGFD,
    down_EDF,
    *,
    activation,
    up_bias_EGF=None,
    down_bias_ED=None,
    first_expert=0,
    ragged_dot=lax.ragged_dot,
):
    num_experts, gates, width, model_width = up_EGFD.shape
    num_tokens, active = routing.experts_TA.shape
    local_M = routing.experts_TA.reshape(-1) - first_expert
    # Choices of other devices' experts sort behind the last group, where ragged_dot computes nothing.
    local_M = jnp.where((local_M >= 0) & (local_M < num_experts), local_M, num_experts)
    order_M = jnp.argsort(local_M, stable=True)
    sorted_M = local_M[order_M]
    group_sizes_E = jnp.bincount(local_M, length=num_experts + 1)[:num_experts].astype(jnp.int32)

    rows_MD = x_TD[order_M // active]
    up_MGF = _grouped(ragged_dot, rows_MD, up_EGFD.reshape(num_experts, gates * width, model_width), group_sizes_E)
    up_MGF = up_MGF.reshape(-1, gates, width)
    if up_bias_EGF is not None:
        up_MGF = up_MGF + up_bias_EGF[jnp.minimum(sorted_M, num_experts - 1)]
    hidden_MF = activate(up_MGF, activation, axis=1).astype(x_TD.dtype)
    out_MD = _grouped(ragged_dot, hidden_MF, down_EDF, group_sizes_E)
    if down_bias_ED is not None:
        out_MD = out_MD + down_bias_ED[jnp.minimum(sorted_M, num_experts - 1)]

    is_local_M = (sorted_M < num_experts)[:, None]
    weighted_MD = jnp.where(is_local_M, out_MD * routing.weights_TA.reshape(-1)[order_M][:, None], 0.0)
    y_TAD = jnp.zeros_like(weighted_MD).at[order_M].set(weighted_MD).reshape(num_tokens, active, model_width)
    return y_TAD.sum(axis=1).astype(x_TD.dtype)


def _grouped(ragged_dot, rows_MI, weights_EOI, group_sizes_E):
    return ragged_dot(
        rows_MI,
        weights_EOI.swapaxes(1, 2),
        group_sizes_E,
        precision=precision.full(rows_MI.dtype),
        preferred_element_type=jnp.float32,
    )


IMPLEMENTATION = Implementation("ragged", supports=lambda device, *args, **kwargs: None, run=experts)
