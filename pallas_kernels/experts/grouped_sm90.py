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
from pallas_kernels.experts.grouped_matmul_sm90 import Tile, grouped_down, grouped_up
from pallas_kernels.experts.reference import adding_residual
from pallas_kernels.route.api import Routing

NAME = "grouped"
FLAT, TALL = 128, 256  # rows of a tile
WIDE, NARROW = 256, 128  # columns of an item's result, of both gates together; beside tall tiles, narrow
DEEP, SHORT = 2560, 64  # tiles are tall from this width of the model and more than so many rows an expert
FEW_WAVES = 3


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
        settings = default_settings(routing, up_EGFD, num_sms=dispatch.current_device().num_sms)
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


def default_settings(routing: Routing, up_EGFD, *, num_sms: int) -> dict[str, int]:
    """Tall tiles for wide models: weights are then read once for 256 rows, and not for every 128; in items so long
    multiprocessors drift apart too far to share them through the cache.

    Of the flat ones, narrow items, which load a half more per product, where wide ones would leave SMs without work at the
    end.
    """
    num_experts, gates, width, model_width = up_EGFD.shape
    choices = routing.experts_TA.size
    if model_width >= DEEP and choices // num_experts > SHORT:
        return dict(tile_rows=TALL, up_columns=NARROW, up_band=4, down_columns=NARROW, down_band=4)
    row_tiles = choices // FLAT + min(num_experts, choices) // 2  # about: last tiles are half full

    def columns(total: int) -> int:
        return NARROW if row_tiles * total < FEW_WAVES * num_sms * WIDE else WIDE

    return dict(
        tile_rows=FLAT, up_columns=columns(gates * width), up_band=8, down_columns=columns(model_width), down_band=4
    )


def candidates(x_TD, routing: Routing, up_EGFD, down_EDF, **arguments) -> list[dict[str, int]]:
    """Settings worth trying, the default first."""
    default = default_settings(routing, up_EGFD, num_sms=dispatch.current_device().num_sms)
    bands = dict(up_band=8, down_band=4)
    flat = [
        dict(tile_rows=FLAT, up_columns=up, down_columns=down) | bands
        for up in (WIDE, NARROW)
        for down in (WIDE, NARROW)
    ]
    tall = [
        dict(tile_rows=TALL, up_columns=NARROW, up_band=band, down_columns=NARROW, down_band=band) for band in (2, 4, 8)
    ]
    return [default, *(each for each in flat + tall if each != default)]


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
    tile_rows = chosen["tile_rows"]
    up_tile = Tile(tile_rows, chosen["up_columns"] // gates, chosen["up_band"])
    down_tile = Tile(tile_rows, chosen["down_columns"], chosen["down_band"])
    plan = grouped_plan_sm90.plan(
        routing.experts_TA,
        num_experts=num_experts,
        first_expert=first_expert,
        tile_rows=tile_rows,
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
