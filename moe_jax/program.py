"""The jitted programs of a model: prefill, and a loop of decode steps.

A program is compiled once per bucket of (batch, prompt length, new tokens) and set of filters; how many tokens are wanted and
every sampling value are its inputs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from moe_jax import graph, memory
from moe_jax import sampling as sampling_
from moe_jax.graph import Graph
from moe_jax.kv_cache import KVCache
from moe_jax.layers.decoder import Step
from moe_jax.model import Model
from moe_jax.sampling import Filters, SamplingArrays
from pallas_kernels import Routing
from sharding import Layout

NO_TOKEN = -1


@dataclasses.dataclass(frozen=True)
class Record:
    """What the program is compiled to record besides tokens."""

    logprobs: bool = False
    routed_experts: bool = False

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if not isinstance(value, bool):
                raise ValueError(f"expected {name} to be True or False, got {value!r}")


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
    generate: jax.stages.Wrapped
    prefill: Callable[..., tuple[State, Any]]
    advance: Callable[..., State]


def compiled_for(model: Model, filters: Filters, record: Record) -> tuple[tuple[jax.Array, ...], Programs]:
    """A model's flat parameters and its programs, which are compiled when first run with new shapes."""
    leaves, module = graph.split(model.module)
    return leaves, _programs(module, filters, record, model.layout)


@functools.lru_cache(maxsize=64)
def _programs(graph_: Graph, filters: Filters, record: Record, layout: Layout | None) -> Programs:
    """Parameters go in as a flat tuple: dispatching an NNX state costs milliseconds a call."""

    def empty_cache(leaves, *, batch: int, capacity: int):
        return _settled(graph_.merged(leaves).empty_cache(batch, capacity), layout)

    def prefill(leaves, cache, tokens_BT, lengths_B, inputs: Inputs, *, new_bucket: int):
        module = graph_.merged(leaves)
        step = _split(module.prefill(tokens_BT, lengths_B, cache), layout)
        state = _first_state(step, module, tokens_BT, lengths_B, new_bucket, filters, record)
        trace = _stacked(step.prompt_routings, len(tokens_BT)) if record.routed_experts else None
        return _settled((_with_token(state, step, inputs, filters), trace), layout)

    def advance(leaves, state: State, inputs: Inputs, limit, is_cancelled_B):
        module = graph_.merged(leaves)
        state = dataclasses.replace(state, is_done_B=state.is_done_B | is_cancelled_B)

        def has_more(state: State):
            return (state.count < limit) & ~state.is_done_B.all()

        def add_token(state: State):
            step = _split(module.decode(state.last_B, state.cache), layout)
            return _settled(_with_token(state, step, inputs, filters), layout)

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


def _split(step: Step, layout: Layout | None) -> Step:
    return step if layout is None else dataclasses.replace(step, logits_BV=layout.split_logits(step.logits_BV))


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


def empty_cache(programs: Programs, leaves, layout: Layout | None, *, batch: int, capacity: int) -> KVCache:
    """A cache for `capacity` positions of each of `batch` requests.

    Raises:
      ValueError: it does not fit in memory.
    """
    require_room(programs, leaves, layout, batch=batch, capacity=capacity)
    return programs.empty_cache(leaves, batch=batch, capacity=capacity)


def require_room(programs: Programs, leaves, layout: Layout | None, *, batch: int, capacity: int) -> None:
    """Raises `ValueError` where such a cache does not fit in memory."""
    make = functools.partial(programs.empty_cache, leaves, batch=batch, capacity=capacity)
    memory.require(
        [_placed(leaf, layout) for leaf in jax.tree.leaves(jax.eval_shape(make))],
        what=f"the cache of {batch} requests x {capacity} positions",
        remedy="generate for fewer requests at once, or fewer max_new_tokens",
    )


def _placed(leaf: jax.ShapeDtypeStruct, layout: Layout | None) -> jax.ShapeDtypeStruct:
    sharding = None if layout is None else layout.cache_sharding(leaf.shape)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


@functools.lru_cache(maxsize=64)
def logits_program(module: Graph, layout: Layout | None):
    @jax.jit
    def run(leaves, *operands):
        logits_BTV, _ = module.merged(leaves).logits(*operands)
        return logits_BTV if layout is None else _settled(layout.split_logits(logits_BTV), layout)

    return run
