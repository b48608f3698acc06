"""Filters against arithmetic by hand, and draws against the distribution they are drawn from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import Sampling
from moe_jax.sampling import batched, choose

PROBABILITIES = np.array([0.4, 0.3, 0.15, 0.1, 0.05])


def drawn(sampling: Sampling, draws: int = 4000, probabilities=PROBABILITIES) -> np.ndarray:
    """Frequencies of tokens over many draws of one request."""
    filters, arrays = batched([sampling], len(probabilities))
    logits_BV = jnp.log(jnp.asarray(probabilities, jnp.float32))[None]
    tokens = jax.vmap(lambda index: choose(logits_BV, arrays, filters, None, index)[0])(jnp.arange(draws))
    return np.bincount(np.asarray(tokens), minlength=len(probabilities)) / draws


def renormalised(kept: list[int], power: float = 1.0) -> np.ndarray:
    weights = np.where(np.isin(np.arange(5), kept), PROBABILITIES, 0) ** power
    weights[[i for i in range(5) if i not in kept]] = 0
    return weights / weights.sum()


@pytest.mark.parametrize(
    ("sampling", "want"),
    [
        (Sampling(temperature=1.0), renormalised([0, 1, 2, 3, 4])),
        (Sampling(temperature=0.5), renormalised([0, 1, 2, 3, 4], power=2)),
        (Sampling(temperature=1.0, top_k=2), renormalised([0, 1])),
        (Sampling(temperature=1.0, top_k=100), renormalised([0, 1, 2, 3, 4])),
        (Sampling(temperature=1.0, top_p=0.75), renormalised([0, 1, 2])),
        (Sampling(temperature=1.0, top_p=0.0001), renormalised([0])),
        (Sampling(temperature=1.0, min_p=0.3), renormalised([0, 1, 2])),
        # top-p counts what top-k left: 0.4 of 0.7 is not yet 0.6, so both stay.
        (Sampling(temperature=1.0, top_k=2, top_p=0.6), renormalised([0, 1])),
        (Sampling(temperature=0.0), renormalised([0])),
    ],
    ids=str,
)
def test_frequencies(sampling, want):
    # 4000 draws: a standard deviation is at most 0.008.
    np.testing.assert_allclose(drawn(sampling), want, atol=0.04)


def test_a_top_p_that_float32_rounds_to_zero_keeps_the_likeliest():
    frequencies = drawn(Sampling(temperature=1.0, top_p=1e-45), draws=8, probabilities=PROBABILITIES[::-1])
    assert frequencies.tolist() == [0, 0, 0, 0, 1]


def test_repetition_penalty_is_hugging_faces():
    filters, arrays = batched([Sampling(repetition_penalty=2.0)], 4)
    logits_BV = jnp.array([[3.0, 2.0, -1.0, -1.5]])
    is_seen_BV = jnp.array([[True, False, True, False]])
    # 3 / 2 = 1.5 falls behind 2; -1 * 2 = -2 falls behind -1.5.
    assert choose(logits_BV, arrays, filters, is_seen_BV, jnp.int32(0)).tolist() == [1]


def test_filters_name_only_what_a_batch_needs():
    filters, _ = batched([Sampling(), Sampling(top_k=3, min_p=0.5)], 8)
    assert not (filters.samples or filters.sorts or filters.min_p or filters.repetition)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(temperature=-0.1), "expected temperature to be a number of at least 0 .*got -0.1"),
        (dict(temperature=float("nan")), "expected temperature"),
        (dict(top_k=0), "expected top_k to be None or at least 1, got 0"),
        (dict(top_p=0.0), "expected top_p to be above 0 and at most 1, got 0.0"),
        (dict(min_p=1.5), "expected min_p to be between 0 and 1, got 1.5"),
        (dict(repetition_penalty=0), "expected repetition_penalty to be a number above 0"),
        (dict(seed=-1), "expected seed to be a whole number from 0"),
        (dict(seed=1.5), "expected seed"),
    ],
)
def test_bad_values(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)
