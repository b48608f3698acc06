"""Generation: prompts in, tokens out, by one jitted program of prefill and a loop of decode steps.

The program is compiled once per bucket of (batch, prompt length, new tokens) and set of filters; how many tokens are wanted and
every sampling value are its inputs. `stream` runs the same steps a token at a time.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from moe_jax import memory
from moe_jax import sampling as sampling_
from moe_jax.kv_cache import KVCache
from moe_jax.layers.decoder import Step
from moe_jax.model import Model
from moe_jax.progress import status
from moe_jax.sampling import Filters, Sampling, SamplingArrays
from moe_jax.tokenizer import TextStream
from pallas_kernels import Routing
from sharding import Layout

Prompt = str | Sequence[int]

SMALLEST_BUCKET = 16
LARGEST_POWER = 1024
NO_TOKEN = -1
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


@dataclasses.dataclass(frozen=True)
class Record:
    """What the program is compiled to record besides tokens."""

    logprobs: bool = False
    routed_experts: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """A generation under way. `count` is how many tokens each running request has; buffers hold U of them."""

    cache: KVCache
    count: Int[Array, ""]
    last_B: Int[Array, "B"]
    is_done_B: Bool[Array, "B"]
    lengths_B: Int[Array, "B"]
    tokens_BU: Int[Array, "B U"]
    is_seen_BV: Bool[Array, "B V"] | None
    logprobs_BU: Float[Array, "B U"] | None
    experts_BLUA: Int[Array, "B L U A"] | None
    weights_BLUA: Float[Array, "B L U A"] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
    """One batch's inputs besides the prompts: how to sample, what ends a request (padded with -1)."""

    sampling: SamplingArrays
    stop_ids_X: Int[Array | np.ndarray, "X"]


class Programs(NamedTuple):
    """Jitted functions of one model; the first argument is always its flat parameters."""

    empty_cache: Callable[..., KVCache]
    generate: Callable[..., tuple[State, Any]]
    prefill: Callable[..., tuple[State, Any]]
    advance: Callable[..., State]


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
        cache = _empty_cache(programs, leaves, batch, model.layout)
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
    tokens_BT = _checked_ids(model, tokens_BT, "tokens_BT")
    if lengths_B is None:
        lengths_B = np.full(tokens_BT.shape[:1], tokens_BT.shape[1], np.int32)
    lengths_B = np.asarray(lengths_B, np.int32)
    if lengths_B.shape != tokens_BT.shape[:1] or lengths_B.min() < 1 or lengths_B.max() > tokens_BT.shape[1]:
        raise ValueError(
            f"expected lengths_B of shape {tokens_BT.shape[:1]} within 1..{tokens_BT.shape[1]}, got {lengths_B}"
        )
    if model.context_length is not None and lengths_B.max() > model.context_length:
        raise ValueError(f"expected at most {model.context_length} tokens (the context), got {lengths_B.max()}")
    operands: tuple[np.ndarray, ...] = (tokens_BT, lengths_B)
    if (decoder_tokens_BU is not None) != model.is_encoder_decoder:
        wanted = "needs" if model.is_encoder_decoder else "takes no"
        raise ValueError(f"model_type {model.model_type!r} {wanted} decoder_tokens_BU")
    if decoder_tokens_BU is not None:
        operands = (*operands, _checked_ids(model, decoder_tokens_BU, "decoder_tokens_BU"))
    leaves, graph = _split(model)
    with model.on_mesh():
        return _logits_program(*graph, model.layout)(leaves, *operands)


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


def compiled_for(model: Model, filters: Filters, record: Record) -> tuple[tuple[jax.Array, ...], Programs]:
    """A model's flat parameters and its programs, which are compiled when first run with new shapes."""
    leaves, (graphdef, treedef) = _split(model)
    return leaves, _programs(graphdef, treedef, filters, record, model.layout)


def _split(model: Model):
    graphdef, state = nnx.split(model.module)
    leaves, treedef = jax.tree.flatten(state)
    return tuple(leaves), (graphdef, treedef)


@functools.lru_cache(maxsize=64)
def _logits_program(graphdef, treedef, layout: Layout | None):
    @jax.jit
    def run(leaves, *operands):
        return _settled(nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves)).logits(*operands)[0], layout)

    return run


@functools.lru_cache(maxsize=64)
def _programs(graphdef, treedef, filters: Filters, record: Record, layout: Layout | None) -> Programs:
    """Parameters go in as a flat tuple: dispatching an NNX state costs milliseconds a call."""

    def merged(leaves):
        return nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))

    def empty_cache(leaves, *, batch: int, capacity: int):
        return _settled(merged(leaves).empty_cache(batch, capacity), layout)

    def prefill(leaves, cache, tokens_BT, lengths_B, inputs: Inputs, *, new_bucket: int):
        module = merged(leaves)
        step = module.prefill(tokens_BT, lengths_B, cache)
        state = _first_state(step, module, tokens_BT, lengths_B, new_bucket, filters, record)
        trace = _stacked(step.prompt_routings, len(tokens_BT)) if record.routed_experts else None
        return _settled((_with_token(state, step, inputs, filters), trace), layout)

    def advance(leaves, state: State, inputs: Inputs, limit, is_cancelled_B):
        module = merged(leaves)
        state = dataclasses.replace(state, is_done_B=state.is_done_B | is_cancelled_B)

        def has_more(state: State):
            return (state.count < limit) & ~state.is_done_B.all()

        def add_token(state: State):
            return _settled(_with_token(state, module.decode(state.last_B, state.cache), inputs, filters), layout)

        return lax.while_loop(has_more, add_token, state)

    def generate(leaves, cache, tokens_BT, lengths_B, inputs, limit, *, new_bucket: int):
        state, trace = prefill(leaves, cache, tokens_BT, lengths_B, inputs, new_bucket=new_bucket)
        return advance(leaves, state, inputs, limit, jnp.zeros_like(state.is_done_B)), trace

    return Programs(
        empty_cache=jax.jit(empty_cache, static_argnames=("batch", "capacity")),
        generate=jax.jit(generate, static_argnames="new_bucket", donate_argnums=1),
        prefill=jax.jit(prefill, static_argnames="new_bucket", donate_argnums=1),
        advance=jax.jit(advance, donate_argnums=1),
    )


def _settled(tree, layout: Layout | None):
    """Over several devices: what leaves a program, or goes around its loop, is where the host and the next step want it."""
    return tree if layout is None else layout.settled(tree, is_cache=lambda part: isinstance(part, KVCache))


def _first_state(step: Step, module, tokens_BT, lengths_B, new_bucket, filters: Filters, record: Record) -> State:
    B, V = step.logits_BV.shape
    L, A = len(step.routings), step.routings[0].experts_TA.shape[1] if step.routings else 0
    traced, scored = record.routed_experts, record.logprobs
    return State(
        cache=step.cache,
        count=jnp.int32(0),
        last_B=jnp.zeros((B,), jnp.int32),
        is_done_B=jnp.zeros((B,), bool),
        lengths_B=jnp.zeros((B,), jnp.int32),
        tokens_BU=jnp.full((B, new_bucket), NO_TOKEN, jnp.int32),
        is_seen_BV=_seen(module, tokens_BT, lengths_B, V) if filters.repetition else None,
        logprobs_BU=jnp.zeros((B, new_bucket), jnp.float32) if scored else None,
        experts_BLUA=jnp.full((B, L, new_bucket, A), NO_TOKEN, jnp.int32) if traced else None,
        weights_BLUA=jnp.zeros((B, L, new_bucket, A), jnp.float32) if traced else None,
    )


def _seen(module, tokens_BT, lengths_B, vocab_size: int):
    """Tokens that a request starts with: its prompt, or an encoder-decoder's start token."""
    start = getattr(module, "decoder_start_token_id", None)
    if start is not None:
        return jnp.broadcast_to(jnp.arange(vocab_size) == start, (len(tokens_BT), vocab_size))
    is_real_BT = jnp.arange(tokens_BT.shape[1]) < lengths_B[:, None]
    rows_B1 = jnp.arange(len(tokens_BT))[:, None]
    return jnp.zeros((len(tokens_BT), vocab_size), bool).at[rows_B1, tokens_BT].max(is_real_BT)


def _with_token(state: State, step: Step, inputs: Inputs, filters: Filters) -> State:
    """The state after choosing the next token of every request that is not done."""
    requests_B, index = jnp.arange(len(state.last_B)), state.count
    token_B = sampling_.choose(step.logits_BV, inputs.sampling, filters, state.is_seen_BV, index)
    is_running_B = ~state.is_done_B
    is_stop_B = (token_B[:, None] == inputs.stop_ids_X).any(axis=1)
    changes: dict[str, Any] = {}
    if state.is_seen_BV is not None:
        changes["is_seen_BV"] = state.is_seen_BV.at[requests_B, token_B].max(is_running_B)
    if state.logprobs_BU is not None:
        logprob_B = jax.nn.log_softmax(step.logits_BV)[requests_B, token_B]
        changes["logprobs_BU"] = state.logprobs_BU.at[:, index].set(jnp.where(is_running_B, logprob_B, 0.0))
    if state.experts_BLUA is not None and state.weights_BLUA is not None:
        experts_BLTA, weights_BLTA = _stacked(step.routings, len(token_B))
        changes["experts_BLUA"] = state.experts_BLUA.at[:, :, index].set(experts_BLTA[:, :, 0])
        changes["weights_BLUA"] = state.weights_BLUA.at[:, :, index].set(weights_BLTA[:, :, 0])
    return dataclasses.replace(
        state,
        cache=step.cache,
        count=index + 1,
        last_B=token_B,
        is_done_B=state.is_done_B | is_stop_B,
        lengths_B=state.lengths_B + is_running_B,
        tokens_BU=state.tokens_BU.at[:, index].set(jnp.where(is_running_B, token_B, NO_TOKEN)),
        **changes,
    )


def _stacked(routings: Sequence[Routing], batch: int) -> tuple[jax.Array, jax.Array]:
    """Expert ids and weights of all layers, `[B, L, T, A]`; L is 0 for a model without sparse layers."""
    if not routings:
        return jnp.zeros((batch, 0, 1, 0), jnp.int32), jnp.zeros((batch, 0, 1, 0), jnp.float32)

    def stacked(arrays):
        return jnp.stack([each_TA.reshape(batch, -1, each_TA.shape[-1]) for each_TA in arrays], axis=1)

    return stacked([each.experts_TA for each in routings]), stacked([each.weights_TA for each in routings])


def _empty_cache(programs: Programs, leaves, batch: Batch, layout: Layout | None) -> KVCache:
    make = functools.partial(programs.empty_cache, leaves, batch=len(batch.prompts), capacity=batch.capacity)
    memory.require(
        [_placed(leaf, layout) for leaf in jax.tree.leaves(jax.eval_shape(make))],
        what=f"the cache of {len(batch.prompts)} requests x {batch.capacity} positions",
        remedy="generate for fewer requests at once, or fewer max_new_tokens",
    )
    return make()


def _placed(leaf: jax.ShapeDtypeStruct, layout: Layout | None) -> jax.ShapeDtypeStruct:
    sharding = None if layout is None else layout.cache_sharding(leaf.shape)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _generate_watching(model: Model, programs: Programs, leaves, cache, batch: Batch):
    """Generates a few tokens at a time and looks for stop strings in between."""
    operands = (batch.tokens_BT, batch.lengths_B, batch.inputs)
    state, trace = programs.prefill(leaves, cache, *operands, new_bucket=batch.new_bucket)
    for start in range(1, batch.max_new_tokens, TOKENS_BETWEEN_STOP_CHECKS):
        texts = [_text(model, row_U[row_U != NO_TOKEN]) for row_U in np.asarray(state.tokens_BU)]
        has_stopped_B = np.array([_cut(text, batch.stop_strings) is not None for text in texts])
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
    text = _cut(_text(model, tokens), stop_strings) if stop_strings else None
    if text is None:
        return len(tokens), None
    counts = range(1, len(tokens) + 1)
    return next(n for n in counts if _cut(_text(model, tokens[:n]), stop_strings) is not None), text


def _cut(text: str, stop_strings: Sequence[str]) -> str | None:
    """The text before the first stop string, or None."""
    found = [text.find(each) for each in stop_strings if each in text]
    return text[: min(found)] if found else None


def _text(model: Model, tokens: np.ndarray) -> str:
    assert model.tokenizer is not None
    return model.tokenizer.decode(tokens.tolist())


def _streamed(model: Model, batch: Batch, leaves, programs: Programs) -> Iterator[Piece]:
    with status("Compiling"), model.on_mesh():
        cache = _empty_cache(programs, leaves, batch, model.layout)
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
        cut = _cut(self._held, self._stop_strings)
        if cut is not None:
            self.stop_reason = "stop_string"
            return cut
        keep = 0 if self.stop_reason else self._beginning_of_stop_string()
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text

    def _beginning_of_stop_string(self) -> int:
        """How many characters at the end could begin a stop string."""
        longest = max((len(each) for each in self._stop_strings), default=1) - 1
        lengths = range(min(longest, len(self._held)), 0, -1)
        return next((n for n in lengths if any(each.startswith(self._held[-n:]) for each in self._stop_strings)), 0)


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


def _checked_ids(model: Model, tokens, name: str) -> np.ndarray:
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or tokens.size == 0 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"expected {name} to be whole numbers [batch, length], got {tokens.dtype} {tokens.shape}")
    if tokens.min() < 0 or tokens.max() >= model.vocab_size:
        raise ValueError(
            f"expected {name} from 0 to {model.vocab_size - 1} (the vocabulary), got {tokens.min()} to {tokens.max()}"
        )
    return tokens.astype(np.int32)
