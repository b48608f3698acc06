"""What a user asks for, checked before anything is computed, and padded to the shapes that programs are compiled for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_jax import sampling as sampling_
from moe_jax.model import Model
from moe_jax.program import NO_TOKEN, Inputs
from moe_jax.sampling import Filters, Sampling

Prompt = str | Sequence[int]

SMALLEST_BUCKET = 16
LARGEST_POWER = 1024


@dataclasses.dataclass(frozen=True)
class Batch:
    """Checked prompts and everything their program needs."""

    prompts: list[list[int]]
    tokens_BT: np.ndarray
    lengths_B: np.ndarray
    inputs: Inputs
    filters: Filters
    max_new_tokens: int
    new_bucket: int
    capacity: int
    stop_strings: tuple[str, ...]


def checked(
    model: Model,
    prompts: Prompt | Sequence[Prompt],
    max_new_tokens: int,
    sampling: Sampling | Sequence[Sampling] | None,
    stop: str | Sequence[str],
    stop_token_ids: Sequence[int] | None,
) -> Batch:
    """Checks everything that a user can get wrong, and pads the prompts to their bucket."""
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int | np.integer) or max_new_tokens < 1:
        raise ValueError(f"expected max_new_tokens to be a whole number of at least 1, got {max_new_tokens!r}")
    encoded = [_encoded(model, prompt, max_new_tokens) for prompt in _listed(prompts)]
    samplings = (
        [sampling or Sampling()] * len(encoded)
        if sampling is None or isinstance(sampling, Sampling)
        else list(sampling)
    )
    if len(samplings) != len(encoded):
        raise ValueError(f"expected one Sampling, or one for each of {len(encoded)} prompts, got {len(samplings)}")
    stop_strings = (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in stop_strings:
        raise ValueError("expected stop strings of at least one character, got an empty one")
    if stop_strings and model.tokenizer is None:
        raise ValueError(f"stop strings need a tokenizer, and {model.name} has none: use stop_token_ids")
    lengths_B = np.array([len(each) for each in encoded], np.int32)
    tokens_BT = np.zeros((len(encoded), bucket(int(lengths_B.max()))), np.int32)
    for row_T, each in zip(tokens_BT, encoded, strict=True):
        row_T[: len(each)] = each
    filters, arrays = sampling_.batched(samplings, model.vocab_size)
    new_bucket = bucket(int(max_new_tokens))
    return Batch(
        prompts=encoded,
        tokens_BT=tokens_BT,
        lengths_B=lengths_B,
        inputs=Inputs(arrays, _stop_ids(model, stop_token_ids)),
        filters=filters,
        max_new_tokens=int(max_new_tokens),
        new_bucket=new_bucket,
        capacity=new_bucket if model.is_encoder_decoder else tokens_BT.shape[1] + new_bucket,
        stop_strings=stop_strings,
    )


def bucket(length: int) -> int:
    """The length that a program is compiled for: a power of two from 16 to 1024, then a multiple of 1024."""
    if length > LARGEST_POWER:
        return -(-length // LARGEST_POWER) * LARGEST_POWER
    return max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A single prompt as a batch of one."""
    if isinstance(prompts, str):
        return [prompts]
    listed: list[Any] = list(prompts)
    if not listed:
        raise ValueError("expected at least one prompt, got an empty list")
    if all(isinstance(each, int | np.integer) for each in listed):
        return [listed]
    return listed


def _encoded(model: Model, prompt: Prompt, max_new_tokens: int) -> list[int]:
    if isinstance(prompt, str):
        if model.tokenizer is None:
            raise ValueError(
                f"expected token ids, got text: {model.name} has no tokenizer (tokenizer.json); "
                "add its files to the directory or pass lists of token ids"
            )
        if not prompt:
            raise ValueError("expected a prompt of at least one character, got an empty one")
        prompt = model.tokenizer.encode(prompt)
    ids = [int(each) for each in prompt]
    if not ids:
        raise ValueError("expected a prompt of at least one token, got an empty one")
    outside = sorted({each for each in ids if not 0 <= each < model.vocab_size})
    if outside:
        raise ValueError(f"expected token ids from 0 to {model.vocab_size - 1} (the vocabulary), got {outside[:5]}")
    length = len(ids) if model.is_encoder_decoder else len(ids) + int(max_new_tokens)
    if model.context_length is not None and length > model.context_length:
        raise ValueError(
            f"expected prompt and new tokens within the context of {model.context_length} positions, got {len(ids)} + "
            f"{max_new_tokens}: shorten the prompt or lower max_new_tokens"
        )
    return ids


def _stop_ids(model: Model, stop_token_ids: Sequence[int] | None) -> np.ndarray:
    """Padded to a multiple of 8, so that another number of stop ids compiles nothing."""
    ids = list(model.stop_token_ids if stop_token_ids is None else stop_token_ids)
    outside = [each for each in ids if not 0 <= each < model.vocab_size]
    if outside and stop_token_ids is not None:
        raise ValueError(f"expected stop_token_ids from 0 to {model.vocab_size - 1} (the vocabulary), got {outside}")
    padded = np.full((max(8, -(-len(ids) // 8) * 8),), NO_TOKEN, np.int32)
    padded[: len(ids)] = ids
    return padded


def checked_ids(model: Model, tokens, name: str) -> np.ndarray:
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or tokens.size == 0 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"expected {name} to be whole numbers [batch, length], got {tokens.dtype} {tokens.shape}")
    if tokens.min() < 0 or tokens.max() >= model.vocab_size:
        raise ValueError(
            f"expected {name} from 0 to {model.vocab_size - 1} (the vocabulary), got {tokens.min()} to {tokens.max()}"
        )
    return tokens.astype(np.int32)
