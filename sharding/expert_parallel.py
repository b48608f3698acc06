"""How tokens meet their experts: one function for each way, from the view of one device (inside `shard_map`).

All have the same arguments and results:

  expert_fn(x_XD, experts_XA, weights_XA) -> y_XD: this device's experts, numbered from 0, on any number of rows: the weighted
    sum over a row's experts. An expert of -1 costs nothing and adds nothing. Where each expert's hidden width is split over
    `tp` it gives this device's part of the sum.
  x_TD, experts_TA, weights_TA: this device's tokens, and the experts (numbered over all devices; -1 for none) that each of
    them chose, with their weights.
  num_local: how many experts a device has. Device i along `ep` has experts `i * num_local` up to `(i + 1) * num_local`.
  ep, tp: the axes of the mesh over which experts, and each expert's hidden width, are split. Either may be none.
  capacity_factor: see `all_to_all`.

  Result: y_TD, and is_kept_TA: which choices were computed. Only `all_to_all` with a capacity drops any.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sharding import collectives
from sharding.axes import Axes

ExpertFn = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
NO_EXPERT = -1


def all_reduce(
    expert_fn: ExpertFn, x_TD, experts_TA, weights_TA, *, num_local: int, ep: Axes, tp: Axes, capacity_factor=None
):
    """Every device has all the tokens: each computes its part, and a sum puts the parts together."""
    y_TD = expert_fn(x_TD, _local(experts_TA, num_local, ep), weights_TA)
    return collectives.sum_over(y_TD, (*ep, *tp)), experts_TA != NO_EXPERT


def gather_scatter(
    expert_fn: ExpertFn, x_TD, experts_TA, weights_TA, *, num_local: int, ep: Axes, tp: Axes, capacity_factor=None
):
    """Tokens are split: all-gather, each device computes its part of every token, reduce-scatter."""
    everyone = (*ep, *tp)
    x_XD, experts_XA, weights_XA = (collectives.gathered(each, everyone) for each in (x_TD, experts_TA, weights_TA))
    y_XD = expert_fn(x_XD, _local(experts_XA, num_local, ep), weights_XA)
    return collectives.sum_scattered(y_XD, everyone), experts_TA != NO_EXPERT


def all_to_all(
    expert_fn: ExpertFn, x_TD, experts_TA, weights_TA, *, num_local: int, ep: Axes, tp: Axes, capacity_factor=None
):
    """Tokens are split and travel to the devices of their experts, once each however many experts they visit there.

    A device sends at most C rows to each other one, a static number. `capacity_factor=None` is lossless: C is all its tokens.
    Otherwise C is that factor times an even share of its choices; later tokens find a full block full, and what they chose
    there is dropped. With `tp`, the devices that share an expert gather their rows, and reduce-scatter the results.

    Example: 4 tokens of 2 choices on each of 4 devices, factor 1.5: an even share is 2 rows, C is 3.
    """
    T, A = experts_TA.shape
    C = capacity(T, A, devices=collectives.size(ep), factor=capacity_factor)
    trips = _trips(experts_TA, num_local, collectives.size(ep))
    is_kept_TA = trips.exists_TA & (trips.rank_TA < C)
    num_rows = collectives.size(ep) * C
    row_TA = jnp.where(is_kept_TA, trips.device_TA * C + trips.rank_TA, num_rows)

    token_X = _tokens_of_rows(row_TA, num_rows)
    packed = (_rows(x_TD, token_X, 0), _rows(experts_TA, token_X, NO_EXPERT), _rows(weights_TA, token_X, 0))
    x_XD, experts_XA, weights_XA = (collectives.gathered(collectives.exchanged(each, ep), tp) for each in packed)
    y_XD = expert_fn(x_XD, _local(experts_XA, num_local, ep), weights_XA)
    y_XD = collectives.exchanged(collectives.sum_scattered(y_XD, tp), ep)
    return _summed(y_XD, row_TA, is_kept_TA & trips.is_first_TA), is_kept_TA


def ragged_all_to_all(
    expert_fn: ExpertFn, x_TD, experts_TA, weights_TA, *, num_local: int, ep: Axes, tp: Axes, capacity_factor=None
):
    """As `all_to_all`, but only rows that exist travel. Nothing is dropped: a device has room for every token of all.

    The routing of all tokens is gathered (a few bytes each), so that everyone knows who sends how much to whom.
    """
    T, A = experts_TA.shape
    N, me = collectives.size(ep), collectives.index(ep)
    experts_XA, weights_XA = (collectives.gathered(each, ep) for each in (experts_TA, weights_TA))
    is_sent_NTN = _is_sent(experts_XA, num_local, N).reshape(N, T, N)
    sizes_NN = is_sent_NTN.sum(axis=1, dtype=jnp.int32)  # from, to
    starts_NN = jnp.cumsum(sizes_NN, axis=1) - sizes_NN  # where a sender's rows for each receiver start
    starts_there_NN = jnp.cumsum(sizes_NN, axis=0) - sizes_NN  # where they start at the receiver

    trips = _trips(experts_TA, num_local, N)
    num_rows = T * min(A, N)
    start_TA = starts_NN[me][jnp.minimum(trips.device_TA, N - 1)]
    row_TA = jnp.where(trips.exists_TA, start_TA + trips.rank_TA, num_rows)
    received_XD = collectives.ragged_exchanged(
        _rows(x_TD, _tokens_of_rows(row_TA, num_rows), 0),
        N * T,
        offsets_N=starts_NN[me],
        sizes_N=sizes_NN[me],
        offsets_there_N=starts_there_NN[me],
        sizes_from_N=sizes_NN[:, me],
        axes=ep,
    )
    # Rows arrive in the order of senders and of their tokens: that of all tokens, less those that go elsewhere.
    (token_X,) = jnp.nonzero(is_sent_NTN[:, :, me].reshape(N * T), size=N * T, fill_value=N * T)
    received_experts_XA = _local(_rows(experts_XA, token_X, NO_EXPERT), num_local, ep)
    y_XD = expert_fn(received_XD, received_experts_XA, _rows(weights_XA, token_X, 0))
    returned_XD = collectives.ragged_exchanged(
        y_XD,
        num_rows,
        offsets_N=starts_there_NN[:, me],
        sizes_N=sizes_NN[:, me],
        offsets_there_N=starts_NN[:, me],
        sizes_from_N=sizes_NN[me],
        axes=ep,
    )
    return _summed(returned_XD, row_TA, trips.exists_TA & trips.is_first_TA), trips.exists_TA


def capacity(tokens: int, active: int, *, devices: int, factor: float | None) -> int:
    """The rows that one device may send to another in `all_to_all`."""
    if factor is None:
        return tokens
    return min(tokens, max(1, math.ceil(factor * tokens * active / devices)))


class _Trips(NamedTuple):
    """Where each choice travels. `rank_TA`: how many earlier tokens go to the same device; `is_first_TA`: no earlier choice
    of the same token goes there, so that this one carries the token."""

    device_TA: jax.Array
    rank_TA: jax.Array
    exists_TA: jax.Array
    is_first_TA: jax.Array


def _trips(experts_TA, num_local: int, devices: int) -> _Trips:
    exists_TA = experts_TA != NO_EXPERT
    device_TA = jnp.where(exists_TA, experts_TA // num_local, devices)
    is_sent_TN = _is_sent(experts_TA, num_local, devices)
    earlier_TN = jnp.cumsum(is_sent_TN, axis=0, dtype=jnp.int32) - is_sent_TN
    rank_TA = jnp.take_along_axis(earlier_TN, jnp.minimum(device_TA, devices - 1), axis=1)
    A = experts_TA.shape[1]
    is_earlier_AA = jnp.arange(A)[None, :] < jnp.arange(A)[:, None]
    is_first_TA = ~((device_TA[:, :, None] == device_TA[:, None, :]) & is_earlier_AA).any(axis=2)
    return _Trips(device_TA, rank_TA, exists_TA, is_first_TA)


def _is_sent(experts_TA, num_local: int, devices: int) -> jax.Array:
    """`[T, N]`: whether some choice of a token is an expert of the device."""
    device_TA1 = jnp.where(experts_TA == NO_EXPERT, devices, experts_TA // num_local)[..., None]
    return (device_TA1 == jnp.arange(devices)).any(axis=1)


def _local(experts_TA, num_local: int, ep: Axes) -> jax.Array:
    """Experts as this device numbers them; -1 for those of others."""
    local_TA = experts_TA - collectives.index(ep) * num_local
    is_mine_TA = (experts_TA != NO_EXPERT) & (local_TA >= 0) & (local_TA < num_local)
    return jnp.where(is_mine_TA, local_TA, NO_EXPERT)


def _tokens_of_rows(row_TA, num_rows: int) -> jax.Array:
    """The token that each row to be sent carries; past the last token where a row is empty."""
    T = row_TA.shape[0]
    token_T1 = lax.broadcasted_iota(jnp.int32, row_TA.shape, 0)
    return jnp.full((num_rows,), T, jnp.int32).at[row_TA].set(token_T1, mode="drop")


def _rows(values_TX, token_X, empty) -> jax.Array:
    return values_TX.at[token_X].get(mode="fill", fill_value=empty)


def _summed(y_XD, row_TA, is_counted_TA) -> jax.Array:
    """Each token's rows put together, in float32."""
    rows_TAD = _rows(y_XD, row_TA, 0).astype(jnp.float32)
    return jnp.where(is_counted_TA[..., None], rows_TAD, 0.0).sum(axis=1).astype(y_XD.dtype)
