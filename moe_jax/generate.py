"""Generation: prompts in, tokens out, by one jitted program of prefill and a loop of decode steps (`program`)."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from moe_jax import graph
from moe_jax.kv_cache import KVCache
from moe_jax.model import Model
from moe_jax.program import NO_TOKEN, Programs, Record, compiled_for, empty_cache, logits_program, require_room
from moe_jax.progress import status
from moe_jax.prompts import (
    Batch,
    Prompt,
    checked,
    checked_ids,
    checked_lengths,
    require_context,
    require_count,
    require_model,
)
from moe_jax.sampling import Sampling
from moe_jax.streaming import cut

TOKENS_BETWEEN_STOP_CHECKS = 16


@dataclasses.dataclass(frozen=True)
class RoutingTrace:
    """Which experts computed what. L sparse layers (in an encoder-decoder the prompt's are the encoder's), A experts each.

    `experts_BLUA[b, :, u]` computed the step whose logits gave new token u. -1: dropped, over the expert's capacity.
    """

    prompt_experts_BLTA: np.ndarray
    prompt_weights_BLTA: np.ndarray
    experts_BLUA: np.ndarray
    weights_BLUA: np.ndarray


@dataclasses.dataclass(frozen=True)
class Generated:
    """New tokens of every request, padded with -1 to the longest; a stop token is included, its text is not.

    `stop_reasons`: "length", "stop_token" or "stop_string". `logprobs` and `routing` are there when asked for;
    log-probabilities are those of the model, before temperature and filters.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    stop_reasons: list[str]
    texts: list[str] | None = None
    logprobs: np.ndarray | None = None
    routing: RoutingTrace | None = None


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What `compile` made: how long it took, up to how many tokens it serves, and each device's memory.

    argument_bytes: parameters and cache. temporary_bytes: what a run needs beside them.
    """

    seconds: float
    prompt_bucket: int
    new_bucket: int
    argument_bytes: int
    temporary_bytes: int


def generate(
    model: Model,
    prompts: Prompt | Sequence[Prompt],
    *,
    max_new_tokens: int = 64,
    sampling: Sampling | Sequence[Sampling] | None = None,
    stop: str | Sequence[str] = (),
    stop_token_ids: Sequence[int] | None = None,
    logprobs: bool = False,
    routed_experts: bool = False,
) -> Generated:
    """Continues prompts: texts, or lists of token ids. A request's result does not depend on the rest of its batch.

    Args:
      sampling: one for all requests, or one each; greedy by default.
      stop: strings that end a request; the text is cut before them.
      stop_token_ids: token ids that end a request; the checkpoint's own by default, () for none.
      logprobs, routed_experts: also return the tokens' log-probabilities, the experts that computed them.

    Raises:
      ValueError: an argument is out of range, a prompt is empty, too long or holds unknown ids, or text without a tokenizer.
    """
    batch = checked(model, prompts, max_new_tokens, sampling, stop, stop_token_ids)
    record = Record(logprobs=logprobs, routed_experts=routed_experts)
    leaves, programs = compiled_for(model, batch.filters, record)
    with status("Compiling and generating"), model.on_mesh():
        cache = _cache_of(model, programs, leaves, batch)
        if batch.stop_strings:
            state, prompt_trace = _generate_watching(model, programs, leaves, cache, batch)
        else:
            state, prompt_trace = programs.generate(
                leaves,
                cache,
                batch.tokens_BT,
                batch.lengths_B,
                batch.inputs,
                max_new_tokens,
                new_bucket=batch.new_bucket,
            )
        state, prompt_trace = jax.device_get((dataclasses.replace(state, cache=None), prompt_trace))
    return _finished(model, batch, state, prompt_trace)


def logits(
    model: Model,
    tokens_BT: Int[np.ndarray, "B T"],
    lengths_B: Int[np.ndarray, "B"] | None = None,
    *,
    decoder_tokens_BU: Int[np.ndarray, "B U"] | None = None,
) -> Float[Array, "B T V"]:
    """float32 logits after every token (teacher forcing). Rows past `lengths_B` are padding; their logits mean nothing.

    Encoder-decoders take the decoder's tokens too, and give `[B, U, V]`.

    Raises:
      ValueError: shapes disagree, ids outside the vocabulary, lengths outside 1..T, or decoder tokens missing or not wanted.
    """
    require_model(model)
    tokens_BT = checked_ids(model, tokens_BT, "tokens_BT")
    lengths_B = checked_lengths(lengths_B, tokens_BT)
    if model.context_length is not None and lengths_B.max() > model.context_length:
        raise ValueError(f"expected at most {model.context_length} tokens (the context), got {lengths_B.max()}")
    operands: tuple[np.ndarray, ...] = (tokens_BT, lengths_B)
    if (decoder_tokens_BU is not None) != model.is_encoder_decoder:
        wanted = "needs" if model.is_encoder_decoder else "takes no"
        raise ValueError(f"model_type {model.model_type!r} {wanted} decoder_tokens_BU")
    if decoder_tokens_BU is not None:
        operands = (*operands, checked_ids(model, decoder_tokens_BU, "decoder_tokens_BU"))
    leaves, module = graph.split(model.module)
    with model.on_mesh():
        return logits_program(module, model.layout)(leaves, *operands)


def compile(
    model: Model,
    *,
    batch: int = 1,
    prompt_length: int,
    max_new_tokens: int = 64,
    sampling: Sampling | None = None,
    logprobs: bool = False,
    routed_experts: bool = False,
) -> Compiled:
    """Compiles ahead what `generate` will run for `batch` prompts of up to `prompt_length` tokens, and runs its prefill once.

    Other values of a sampling compile nothing new; filters that are on here and off later, or the reverse, do.
    Prompts share a program with all others of the same bucket: 16, 32, ... 1024, then multiples of 1024.

    Raises:
      ValueError: as `generate`.
    """
    require_model(model)
    counts = (("batch", batch), ("prompt_length", prompt_length), ("max_new_tokens", max_new_tokens))
    for name, value in counts:
        require_count(name, value)
    require_context(model, prompt_length, max_new_tokens)  # before there is a list of so many tokens
    one = checked(model, [[0] * prompt_length], max_new_tokens, sampling, (), None)
    leaves, programs = compiled_for(model, one.filters, Record(logprobs=logprobs, routed_experts=routed_experts))
    require_room(programs, leaves, model.layout, batch=batch, capacity=one.capacity)  # and one of so many prompts
    request = checked(model, one.prompts * batch, max_new_tokens, sampling, (), None)
    started_s = time.perf_counter()
    with status("Compiling"), model.on_mesh():
        cache = _cache_of(model, programs, leaves, request)
        operands = (request.tokens_BT, request.lengths_B, request.inputs, 1)
        lowered = programs.generate.lower(leaves, cache, *operands, new_bucket=request.new_bucket)
        analysis = lowered.compile().memory_analysis()
        assert analysis is not None  # only backends that cannot plan their memory return None
        jax.block_until_ready(programs.generate(leaves, cache, *operands, new_bucket=request.new_bucket))
    return Compiled(
        seconds=time.perf_counter() - started_s,
        prompt_bucket=request.tokens_BT.shape[1],
        new_bucket=request.new_bucket,
        argument_bytes=analysis.argument_size_in_bytes,
        temporary_bytes=analysis.temp_size_in_bytes,
    )


def _cache_of(model: Model, programs: Programs, leaves, batch: Batch) -> KVCache:
    return empty_cache(programs, leaves, model.layout, batch=len(batch.prompts), capacity=batch.capacity)


def _generate_watching(model: Model, programs: Programs, leaves, cache, batch: Batch):
    """Generates a few tokens at a time and looks for stop strings in between."""
    operands = (batch.tokens_BT, batch.lengths_B, batch.inputs)
    state, trace = programs.prefill(leaves, cache, *operands, new_bucket=batch.new_bucket)
    for start in range(1, batch.max_new_tokens, TOKENS_BETWEEN_STOP_CHECKS):
        texts = [_text(model, row_U[row_U != NO_TOKEN]) for row_U in np.asarray(state.tokens_BU)]
        has_stopped_B = np.array([cut(text, batch.stop_strings) is not None for text in texts])
        if (np.asarray(state.is_done_B) | has_stopped_B).all():
            break
        limit = min(start + TOKENS_BETWEEN_STOP_CHECKS, batch.max_new_tokens)
        state = programs.advance(leaves, state, batch.inputs, limit, has_stopped_B)
    return state, trace


def _finished(model: Model, batch: Batch, state: Any, prompt_trace: Any) -> Generated:
    """The result, cut where each request stopped. `state` is a `State` of numpy arrays without its cache."""
    lengths_B = np.array(state.lengths_B)
    texts: list[str] | None = None if model.tokenizer is None else []
    reasons = []
    for request, length in enumerate(lengths_B):
        tokens = state.tokens_BU[request, :length]
        reason = "stop_token" if tokens[-1] in batch.inputs.stop_ids_X else "length"
        if texts is not None:
            count, text = _until_stop_string(model, tokens, batch.stop_strings)
            if text is not None:
                reason, lengths_B[request] = "stop_string", count
            texts.append(_text(model, tokens) if text is None else text)
        reasons.append(reason)
    U = int(lengths_B.max())
    is_kept_BU = np.arange(U) < lengths_B[:, None]
    routing = None
    if prompt_trace is not None:
        prompt_experts_BLTA, prompt_weights_BLTA = prompt_trace
        routing = RoutingTrace(
            prompt_experts_BLTA, prompt_weights_BLTA, state.experts_BLUA[:, :, :U], state.weights_BLUA[:, :, :U]
        )
    return Generated(
        tokens=np.where(is_kept_BU, state.tokens_BU[:, :U], NO_TOKEN),
        lengths=lengths_B,
        stop_reasons=reasons,
        texts=texts,
        logprobs=None if state.logprobs_BU is None else np.where(is_kept_BU, state.logprobs_BU[:, :U], 0.0),
        routing=routing,
    )


def _until_stop_string(model: Model, tokens: np.ndarray, stop_strings: Sequence[str]) -> tuple[int, str | None]:
    """How many tokens it takes until a stop string is complete, and the text before it; None where there is none."""
    text = cut(_text(model, tokens), stop_strings) if stop_strings else None
    if text is None:
        return len(tokens), None
    counts = range(1, len(tokens) + 1)
    return next(n for n in counts if cut(_text(model, tokens[:n]), stop_strings) is not None), text


def _text(model: Model, tokens: np.ndarray) -> str:
    assert model.tokenizer is not None
    return model.tokenizer.decode(tokens.tolist())
