"""What a user asks for, checked before anything is computed, and padded to the shapes that programs are compiled for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence, Set
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
    require_model(model)
    require_count("max_new_tokens", max_new_tokens)
    encoded = [_encoded(model, prompt, max_new_tokens) for prompt in _listed(prompts)]
    samplings = _one_each(sampling, len(encoded))
    stop_strings = _stop_strings(model, stop)
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


def require_model(model: Any) -> None:
    """Raises `ValueError` for anything but a model."""
    if not isinstance(model, Model):
        raise ValueError(f"expected a model that moe_jax.load returned, got {_briefly(model)}")


def require_count(name: str, value: Any) -> None:
    """Raises `ValueError` for anything but a whole number of at least 1."""
    if not _is_whole(value) or value < 1:
        raise ValueError(f"expected {name} to be a whole number of at least 1, got {value!r}")


def require_context(model: Model, length: int, max_new_tokens: int) -> None:
    """Raises `ValueError` for a prompt of so many tokens that leaves no room in the context."""
    needed = length if model.is_encoder_decoder else length + int(max_new_tokens)
    if model.context_length is not None and needed > model.context_length:
        raise ValueError(
            f"expected prompt and new tokens within the context of {model.context_length} positions, got {length} + "
            f"{max_new_tokens}: shorten the prompt or lower max_new_tokens"
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
    listed = _items(prompts, "prompts to be a text, a list of token ids, or a list of these")
    if not listed:
        raise ValueError("expected at least one prompt, got an empty list")
    if all(isinstance(each, int | np.integer) for each in listed):
        return [listed]
    return listed


def _encoded(model: Model, prompt: Prompt, max_new_tokens: int) -> list[int]:
    ids = _tokens_of(model, prompt) if isinstance(prompt, str) else _whole_numbers(prompt, "a prompt")
    if not ids:
        raise ValueError("expected a prompt of at least one token, got an empty one")
    if outside := _outside(model, ids):
        raise ValueError(f"expected token ids from 0 to {model.vocab_size - 1} (the vocabulary), got {outside[:5]}")
    require_context(model, len(ids), max_new_tokens)
    return ids


def _tokens_of(model: Model, text: str) -> list[int]:
    if model.tokenizer is None:
        raise ValueError(
            f"expected token ids, got text: {model.name} has no tokenizer (tokenizer.json); "
            "add its files to the directory or pass lists of token ids"
        )
    if not text:
        raise ValueError("expected a prompt of at least one character, got an empty one")
    return model.tokenizer.encode(text)


def _one_each(sampling: Sampling | Sequence[Sampling] | None, count: int) -> list[Sampling]:
    if sampling is None or isinstance(sampling, Sampling):
        return [sampling or Sampling()] * count
    samplings = _items(sampling, f"one Sampling, or one for each of {count} prompts")
    if not all(isinstance(each, Sampling) for each in samplings):
        raise ValueError(f"expected one Sampling, or one for each of {count} prompts, got {_briefly(sampling)}")
    if len(samplings) != count:
        raise ValueError(f"expected one Sampling, or one for each of {count} prompts, got {len(samplings)}")
    return samplings


def _stop_strings(model: Model, stop: str | Sequence[str]) -> tuple[str, ...]:
    wanted = "stop to be a string or a list of strings (() for none)"
    stop_strings = (stop,) if isinstance(stop, str) else tuple(_items(stop, wanted, unordered=True))
    if not all(isinstance(each, str) for each in stop_strings):
        raise ValueError(f"expected {wanted}, got {_briefly(stop)}")
    if "" in stop_strings:
        raise ValueError("expected stop strings of at least one character, got an empty one")
    if stop_strings and model.tokenizer is None:
        raise ValueError(f"stop strings need a tokenizer, and {model.name} has none: use stop_token_ids")
    return stop_strings


def _stop_ids(model: Model, stop_token_ids: Sequence[int] | None) -> np.ndarray:
    """Padded to a multiple of 8, so that another number of stop ids compiles nothing."""
    if stop_token_ids is None:
        ids = list(model.stop_token_ids)
    else:
        ids = _whole_numbers(stop_token_ids, "stop_token_ids", unordered=True)
        if outside := _outside(model, ids):
            raise ValueError(
                f"expected stop_token_ids from 0 to {model.vocab_size - 1} (the vocabulary), got {outside[:5]}"
            )
    padded = np.full((max(8, -(-len(ids) // 8) * 8),), NO_TOKEN, np.int32)
    padded[: len(ids)] = ids
    return padded


def _outside(model: Model, ids: Sequence[int]) -> list[int]:
    return sorted({each for each in ids if not 0 <= each < model.vocab_size})


def _items(values: Any, wanted: str, *, unordered: bool = False) -> list[Any]:
    """The values of a list, an array or another iterable, but not of a text; nor, unless it does not matter, of a set."""
    if not isinstance(values, Iterable) or isinstance(values, str | bytes | Mapping):
        raise ValueError(f"expected {wanted}, got {_briefly(values)}")
    if isinstance(values, Set) and not unordered:
        raise ValueError(f"expected {wanted}, got {_briefly(values)}, which has no order")
    return values.tolist() if hasattr(values, "tolist") else list(values)


def _whole_numbers(values: Any, what: str, *, unordered: bool = False) -> list[int]:
    wanted = f"{what} to be a list of token ids"
    items = _items(values, wanted, unordered=unordered)
    if wrong := [each for each in items if not _is_whole(each)]:
        raise ValueError(f"expected {wanted} (whole numbers), got {_briefly(wrong[0])} among them")
    return [int(each) for each in items]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _briefly(value: Any) -> str:
    """A value and its type for an error message."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def checked_ids(model: Model, tokens: Any, name: str) -> np.ndarray:
    """Token ids `[batch, length]` as an array of int32."""
    tokens = _as_array(tokens, name, "whole numbers [batch, length]")
    if tokens.ndim != 2 or tokens.size == 0 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"expected {name} to be whole numbers [batch, length], got {tokens.dtype} {tokens.shape}")
    if tokens.min() < 0 or tokens.max() >= model.vocab_size:
        raise ValueError(
            f"expected {name} from 0 to {model.vocab_size - 1} (the vocabulary), got {tokens.min()} to {tokens.max()}"
        )
    return tokens.astype(np.int32)


def checked_lengths(lengths_B: Any, tokens_BT: np.ndarray) -> np.ndarray:
    """How many tokens of each row are real: all of them for None."""
    B, T = tokens_BT.shape
    if lengths_B is None:
        return np.full((B,), T, np.int32)
    lengths_B = _as_array(lengths_B, "lengths_B", f"{B} whole numbers")
    is_right = lengths_B.shape == (B,) and np.issubdtype(lengths_B.dtype, np.integer)
    if not is_right or lengths_B.min() < 1 or lengths_B.max() > T:
        raise ValueError(f"expected lengths_B of shape {(B,)} within 1..{T}, whole numbers, got {lengths_B}")
    return lengths_B.astype(np.int32)


def _as_array(values: Any, name: str, wanted: str) -> np.ndarray:
    try:
        return np.asarray(values)
    except ValueError as error:  # rows of different lengths
        raise ValueError(f"expected {name} to be {wanted}, got values that make no array: {error}") from None
