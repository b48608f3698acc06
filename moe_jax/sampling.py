"""Choosing the next token from logits, on the device, request by request."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How one request chooses its tokens. The filters apply in this order, which is Hugging Face's.

    repetition_penalty: logits of tokens already in the request are divided by it when positive, multiplied when negative
      (arXiv:1909.05858); 1 changes nothing.
    temperature: 0 takes the likeliest token (greedy); otherwise logits are divided by it.
    top_k: only the k likeliest tokens; None for all.
    top_p: the smallest set of likeliest tokens whose probabilities reach p (arXiv:1904.09751).
    min_p: only tokens at least this fraction as likely as the likeliest (arXiv:2407.01082).
    seed: two requests with the same prompt, sampling and seed give the same tokens, whatever else is in their batch.

    Raises:
      ValueError: a value out of range, by name.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self):
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
                raise ValueError(f"Sampling: expected {name} to be a number, got {value!r}")
        ranges = {
            "temperature": (0 <= self.temperature < math.inf, "a number of at least 0 (0 is greedy)"),
            "top_k": (self.top_k is None or (_is_whole(self.top_k) and self.top_k >= 1), "None or at least 1"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "a number above 0 (1 changes nothing)"),
            "seed": (_is_whole(self.seed) and 0 <= self.seed < 2**32, "a whole number from 0 to 2**32 - 1"),
        }
        for name, (is_valid, expected) in ranges.items():
            if not is_valid:
                raise ValueError(f"Sampling: expected {name} to be {expected}, got {getattr(self, name)!r}")


def _is_whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


@dataclasses.dataclass(frozen=True)
class Filters:
    """Which filters any request of a batch needs. Static: a greedy batch compiles no sort and no random numbers."""

    samples: bool
    sorts: bool
    min_p: bool
    repetition: bool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingArrays:
    """The `Sampling`s of a batch, on the device."""

    temperature_B: Float[Array | np.ndarray, "B"]
    top_k_B: Int[Array | np.ndarray, "B"]
    top_p_B: Float[Array | np.ndarray, "B"]
    min_p_B: Float[Array | np.ndarray, "B"]
    repetition_penalty_B: Float[Array | np.ndarray, "B"]
    seed_B: Int[Array | np.ndarray, "B"]


def batched(samplings: Sequence[Sampling], vocab_size: int) -> tuple[Filters, SamplingArrays]:
    """One batch's samplings as arrays, and the filters they need."""
    filters = Filters(
        samples=any(each.temperature > 0 for each in samplings),
        sorts=any(each.temperature > 0 and (each.top_k is not None or each.top_p < 1) for each in samplings),
        min_p=any(each.temperature > 0 and each.min_p > 0 for each in samplings),
        repetition=any(each.repetition_penalty != 1 for each in samplings),
    )
    arrays = SamplingArrays(
        temperature_B=np.array([each.temperature for each in samplings], np.float32),
        top_k_B=np.array([min(each.top_k or vocab_size, vocab_size) for each in samplings], np.int32),
        top_p_B=np.array([each.top_p for each in samplings], np.float32),
        min_p_B=np.array([each.min_p for each in samplings], np.float32),
        repetition_penalty_B=np.array([each.repetition_penalty for each in samplings], np.float32),
        seed_B=np.array([each.seed for each in samplings], np.uint32),
    )
    return filters, arrays


def choose(
    logits_BV: jax.Array, sampling: SamplingArrays, filters: Filters, is_seen_BV: jax.Array | None, index: jax.Array
) -> jax.Array:
    """`[B]` token ids, the `index`-th new token of each request. `is_seen_BV` marks tokens already in a request."""
    if filters.repetition and is_seen_BV is not None:
        logits_BV = _penalised(logits_BV, is_seen_BV, sampling.repetition_penalty_B[:, None])
    greedy_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    if not filters.samples:
        return greedy_B
    is_greedy_B = sampling.temperature_B == 0
    scaled_BV = logits_BV / jnp.where(is_greedy_B, 1.0, sampling.temperature_B)[:, None]
    if filters.sorts:
        scaled_BV = _only_likeliest(scaled_BV, sampling)
    if filters.min_p:
        least_B1 = scaled_BV.max(axis=-1, keepdims=True) + jnp.log(sampling.min_p_B)[:, None]
        scaled_BV = jnp.where(scaled_BV < least_B1, -jnp.inf, scaled_BV)
    return jnp.where(is_greedy_B, greedy_B, _drawn(scaled_BV, sampling.seed_B, index))


def _penalised(logits_BV, is_seen_BV, penalty_B1):
    penalised_BV = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    return jnp.where(is_seen_BV, penalised_BV, logits_BV)


def _only_likeliest(logits_BV, sampling: SamplingArrays):
    """top-k, then top-p over what is left: both keep the tokens at or above a threshold of the sorted logits."""
    sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    ranks_V = jnp.arange(logits_BV.shape[-1])
    sorted_BV = jnp.where(ranks_V < sampling.top_k_B[:, None], sorted_BV, -jnp.inf)
    probabilities_BV = jax.nn.softmax(sorted_BV, axis=-1)
    before_BV = jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV
    is_within_BV = (before_BV < sampling.top_p_B[:, None]) | (ranks_V == 0)  # a p that float32 rounds to 0 keeps one
    is_kept_BV = is_within_BV & (sorted_BV > -jnp.inf)
    least_B1 = jnp.min(jnp.where(is_kept_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)


def _drawn(logits_BV, seed_B, index):
    """One draw per request by the Gumbel-max trick, from a key that depends on its seed and the token's index alone."""

    def noise(seed):
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), index), logits_BV.shape[1:], jnp.float32)

    return jnp.argmax(logits_BV + jax.vmap(noise)(seed_B), axis=-1).astype(jnp.int32)
