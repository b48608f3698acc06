"""`stream`: the tokens of `generate` one by one, and the text that each completes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from moe_jax.model import Model
from moe_jax.program import Programs, Record, State, compiled_for, empty_cache
from moe_jax.progress import status
from moe_jax.prompts import Batch, Prompt, checked
from moe_jax.sampling import Sampling
from moe_jax.tokenizer import TextStream


@dataclasses.dataclass(frozen=True)
class Piece:
    """One new token of a stream. `str(piece)` is the text it completes, possibly none."""

    text: str
    token: int
    request: int = 0
    stop_reason: str | None = None
    logprob: float | None = None
    experts_LA: np.ndarray | None = None
    weights_LA: np.ndarray | None = None

    def __str__(self) -> str:
        return self.text


def stream(
    model: Model,
    prompts: Prompt | Sequence[Prompt],
    *,
    max_new_tokens: int = 64,
    sampling: Sampling | Sequence[Sampling] | None = None,
    stop: str | Sequence[str] = (),
    stop_token_ids: Sequence[int] | None = None,
    logprobs: bool = False,
    routed_experts: bool = False,
) -> Iterator[Piece]:
    """The tokens of `generate`, one `Piece` each, as they come; arguments and errors are those of `generate`."""
    batch = checked(model, prompts, max_new_tokens, sampling, stop, stop_token_ids)
    record = Record(logprobs=logprobs, routed_experts=routed_experts)
    leaves, programs = compiled_for(model, batch.filters, record)
    return _streamed(model, batch, leaves, programs)


def _streamed(model: Model, batch: Batch, leaves, programs: Programs) -> Iterator[Piece]:
    with status("Compiling"), model.on_mesh():
        cache = empty_cache(programs, leaves, model.layout, batch=len(batch.prompts), capacity=batch.capacity)
        state, _ = programs.prefill(
            leaves, cache, batch.tokens_BT, batch.lengths_B, batch.inputs, new_bucket=batch.new_bucket
        )
        tokens_B = np.asarray(state.last_B)
    readers = [_Reader(model, batch) for _ in batch.prompts]
    for count in range(1, batch.max_new_tokens + 1):
        extras = _extras(state, count - 1)
        for request, reader in enumerate(readers):
            if reader.stop_reason is None:
                yield reader.read(
                    int(tokens_B[request]), request, **{name: row[request] for name, row in extras.items()}
                )
        is_cancelled_B = np.array([reader.stop_reason is not None for reader in readers])
        if is_cancelled_B.all():
            return
        with model.on_mesh():
            state = programs.advance(leaves, state, batch.inputs, count + 1, is_cancelled_B)
        tokens_B = np.asarray(state.last_B)


def _extras(state: State, index: int) -> dict[str, np.ndarray]:
    """What was recorded with the token at `index`, a row per request, by the names of `Piece`."""
    extras = {}
    if state.logprobs_BU is not None:
        extras["logprob"] = np.asarray(state.logprobs_BU)[:, index]
    if state.experts_BLUA is not None and state.weights_BLUA is not None:
        extras["experts_LA"] = np.asarray(state.experts_BLUA)[:, :, index]
        extras["weights_LA"] = np.asarray(state.weights_BLUA)[:, :, index]
    return extras


class _Reader:
    """Follows one request of a stream: its text so far, and why it ended."""

    def __init__(self, model: Model, batch: Batch):
        self.stop_reason: str | None = None
        self._text = TextStream(model.tokenizer) if model.tokenizer is not None else None
        self._stop_ids = set(batch.inputs.stop_ids_X.tolist())
        self._stop_strings = batch.stop_strings
        self._left = batch.max_new_tokens
        self._held = ""  # text not yet given out: it may be the beginning of a stop string

    def read(self, token: int, request: int, **extras) -> Piece:
        self._left -= 1
        is_stop = token in self._stop_ids
        self._held += self._text.add(token) if self._text is not None else ""
        if is_stop or self._left == 0:
            self.stop_reason = "stop_token" if is_stop else "length"
            self._held += self._text.finish() if self._text is not None else ""
        return Piece(self._given_out(), token, request, self.stop_reason, **extras)

    def _given_out(self) -> str:
        before = cut(self._held, self._stop_strings)
        if before is not None:
            self.stop_reason = "stop_string"
            return before
        keep = 0 if self.stop_reason else self._beginning_of_stop_string()
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text

    def _beginning_of_stop_string(self) -> int:
        """How many characters at the end could begin a stop string."""
        longest = max((len(each) for each in self._stop_strings), default=1) - 1
        lengths = range(min(longest, len(self._held)), 0, -1)
        return next((n for n in lengths if any(each.startswith(self._held[-n:]) for each in self._stop_strings)), 0)


def cut(text: str, stop_strings: Sequence[str]) -> str | None:
    """The text before the first stop string, or None."""
    found = [text.find(each) for each in stop_strings if each in text]
    return text[: min(found)] if found else None
