"""Hundreds to thousands of tokens on Hopper: choices sorted by expert, two grouped multiplications, a sum per token.

plan -> spread rows to expert order -> up and activation -> down -> weighted sum of each token's rows. No atomics:
every number is computed by one thread in one order, so two runs are equal to the last bit.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, tuning
from pallas_kernels.dispatch import Device, Implementation
from pallas_kernels.experts import grouped_plan, grouped_plan_sm90, grouped_rows_sm90
from pallas_kernels.experts.decode_sm90 import shape_key
from pallas_kernels.experts.grouped_matmul_sm90 import TILE_ROWS, Tile, grouped_down, grouped_up
from pallas_kernels.experts.reference import adding_residual
from pallas_kernels.route.api import Routing

NAME = "grouped"
UP_COLUMNS = 256  # of both gates together
DOWN_COLUMNS = 256


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
    settings: dict[str, int] | None = None,
):
    if settings is None:
        settings = tuning.lookup(f"experts.{NAME}", shape_key(routing, up_EGFD), x_TD.shape[0])
    if settings is None:
        settings = default_settings()
    return _experts(
        x_TD,
        routing,
        up_EGFD,
        down_EDF,
        up_bias_EGF,
        down_bias_ED,
        activation=activation,
        first_expert=first_expert,
        settings=tuple(sorted(settings.items())),
        num_sms=dispatch.current_device().num_sms,
    )


def default_settings() -> dict[str, int]:
    return dict(up_band=8, down_band=4)


def candidates(x_TD, routing: Routing, up_EGFD, down_EDF, **arguments) -> list[dict[str, int]]:
    """Settings worth trying, the default first."""
    return [default_settings(), *(dict(up_band=band, down_band=band) for band in (2, 4, 8, 16))]


@functools.partial(jax.jit, static_argnames=("activation", "first_expert", "settings", "num_sms"))
def _experts(
    x_TD,
    routing: Routing,
    up_EGFD,
    down_EDF,
    up_bias_EGF,
    down_bias_ED,
    *,
    activation,
    first_expert,
    settings,
    num_sms,
):
    num_experts, gates, _, model_width = up_EGFD.shape
    chosen = dict(settings)
    up_tile = Tile(UP_COLUMNS // gates, chosen["up_band"])
    down_tile = Tile(DOWN_COLUMNS, chosen["down_band"])
    plan = grouped_plan_sm90.plan(
        routing.experts_TA,
        num_experts=num_experts,
        first_expert=first_expert,
        tile_rows=TILE_ROWS,
        places=routing.places,
    )
    num_rows = grouped_plan.num_rows(routing.experts_TA.size, num_experts)

    rows_MD = grouped_rows_sm90.spread(x_TD, plan.rows_TA, num_rows=num_rows, num_sms=num_sms)
    hidden_MF = grouped_up(rows_MD, up_EGFD, up_bias_EGF, plan, activation=activation, tile=up_tile, num_sms=num_sms)
    values_MD, scales_NM = grouped_down(hidden_MF, down_EDF, down_bias_ED, plan, tile=down_tile, num_sms=num_sms)
    return grouped_rows_sm90.combine(
        values_MD, scales_NM, plan.rows_TA, routing.weights_TA, model_width=model_width, dtype=x_TD.dtype
    )


def _supports(device: Device, x_TD, routing: Routing, up_EGFD, down_EDF, **arguments) -> str | None:
    _, _, width, model_width = up_EGFD.shape
    if not device.is_hopper:
        return f"it needs a Hopper GPU, and this is {device.kind}"
    dtypes = {name: array.dtype for name, array in dict(x_TD=x_TD, up_EGFD=up_EGFD, down_EDF=down_EDF).items()}
    for name, dtype in dtypes.items():
        if dtype != jnp.bfloat16:
            return f"it multiplies bfloat16, and {name} is {dtype}"
    if model_width % 16 or width % 16:
        return f"it needs widths that are multiples of 16, and these are D={model_width}, F={width}"
    if grouped_rows_sm90.box(model_width) is None:
        return f"it copies rows as rectangles of at most 256 x 256, and D={model_width} is none"
    return None


IMPLEMENTATION = Implementation(NAME, supports=_supports, run=experts, candidates=candidates)
