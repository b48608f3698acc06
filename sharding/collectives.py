"""Collectives inside `shard_map`, over several axes of the mesh at once; over no axes they do nothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from sharding.axes import Axes


def size(axes: Axes) -> int:
    """How many devices the axes have together."""
    return lax.axis_size(axes) if axes else 1


def index(axes: Axes) -> jax.Array | int:
    """Which of those devices this one is; the first axis is the slowest."""
    return lax.axis_index(axes) if axes else 0


def sum_over(x: jax.Array, axes: Axes) -> jax.Array:
    return lax.psum(x, axes) if axes else x


def gathered(x_TX: jax.Array, axes: Axes) -> jax.Array:
    """Every device's rows, one device's after the other's."""
    return lax.all_gather(x_TX, axes, tiled=True) if axes else x_TX


def sum_scattered(x_TX: jax.Array, axes: Axes) -> jax.Array:
    """The sum over the devices, each of which keeps its share of the rows."""
    return lax.psum_scatter(x_TX, axes, scatter_dimension=0, tiled=True) if axes else x_TX


def exchanged(x_MX: jax.Array, axes: Axes) -> jax.Array:
    """Block n of the rows goes to device n; block n of the result came from it."""
    return lax.all_to_all(x_MX, axes, 0, 0, tiled=True) if axes else x_MX


def ragged_exchanged(
    x_MX: jax.Array, num_rows: int, *, offsets_N, sizes_N, offsets_there_N, sizes_from_N, axes: Axes
) -> jax.Array:
    """As `exchanged`, with as many rows for each device as there are.

    Rows `offsets_N[n]` up to `offsets_N[n] + sizes_N[n]` go to device n, where they start at row `offsets_there_N[n]` of
    `num_rows`; `sizes_from_N[n]` rows come from device n. Rows that nobody wrote are zero.
    """
    operands = (x_MX, jnp.zeros((num_rows, *x_MX.shape[1:]), x_MX.dtype), offsets_N, sizes_N, offsets_there_N)

    def by_gather(x_MX, out_RX, offsets_N, sizes_N, offsets_there_N, sizes_from_N):
        """XLA has no ragged exchange for CPUs: every device takes what is addressed to it."""
        me = index(axes)
        stacked = (lax.all_gather(each, axes) for each in (x_MX, offsets_N, sizes_N, offsets_there_N))
        x_NMX, offsets_NN, sizes_NN, there_NN = stacked
        place_NM = jnp.arange(x_MX.shape[0]) - offsets_NN[:, me, None]
        is_mine_NM = (place_NM >= 0) & (place_NM < sizes_NN[:, me, None])
        row_NM = jnp.where(is_mine_NM, there_NN[:, me, None] + place_NM, num_rows)
        return out_RX.at[row_NM].set(x_NMX, mode="drop")

    def by_xla(*operands):
        return lax.ragged_all_to_all(*operands, axis_name=axes)

    return lax.platform_dependent(*operands, sizes_from_N, cpu=by_gather, default=by_xla)
