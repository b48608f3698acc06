"""Decode loops of whole models at their real widths, compiled for an H200 without one: launches and memory."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from moe_jax.graph import split
from moe_jax.program import Record, compiled_for
from moe_jax.prompts import checked
from moe_jax.testing import abstract_model
from pallas_kernels import aot

CONFIGS = Path(__file__).parents[2] / "configs"
LAYERS = 2
KERNELS = ("matvec", "decode_attention", "route_decode", "experts_decode")
PROMPT, NEW_TOKENS = 1024, 1024
# Beside a layer's kernels: a shared expert's gate, and padding for the 60 experts of qwen1.5.
MOST_BESIDE_KERNELS = 8
# Embedding, rotation tables, last norm, head, the choice of a token, stop tokens, counters.
MOST_OF_A_STEP = 32
# Logits of a step in float32, and what choosing a token makes of them.
MOST_TEMPORARY_BYTES = 32 << 20


@pytest.mark.aot
@pytest.mark.parametrize(
    ("name", "batch", "projections"),
    [
        ("qwen3-30b-a3b", 1, 2),
        ("olmoe-1b-7b", 8, 2),
        ("mixtral-8x7b", 1, 2),
        ("tinymistral-6x248m", 8, 2),
        ("qwen1.5-moe-a2.7b", 1, 4),  # a shared expert's up and down as well
    ],
)
def test_a_decode_step_is_few_launches_and_copies_nothing(name: str, batch: int, projections: int) -> None:
    config = json.loads((CONFIGS / f"{name}.json").read_text()) | dict(num_hidden_layers=LAYERS)
    model = abstract_model(config)
    request = checked(model, [[0] * PROMPT] * batch, NEW_TOKENS, None, (), ())
    leaves, programs = compiled_for(model, request.filters, Record())
    cache = jax.eval_shape(functools.partial(programs.empty_cache, leaves, batch=batch, capacity=request.capacity))
    prefill = functools.partial(programs.prefill, new_bucket=request.new_bucket)
    state, _ = jax.eval_shape(prefill, leaves, cache, request.tokens_BT, request.lengths_B, request.inputs)

    done_B = jax.ShapeDtypeStruct((batch,), np.bool_)
    limit = jax.ShapeDtypeStruct((), np.int32)
    program = aot.compile_for_h200(programs.advance, leaves, state, request.inputs, limit, done_B, donate=(1,))

    counts = {kernel: program.launches.count(kernel) for kernel in KERNELS}
    head = 0 if config["vocab_size"] % 8 else 1
    assert counts == dict.fromkeys(KERNELS, LAYERS) | dict(matvec=projections * LAYERS + head)
    others = len(program.launches) - sum(counts.values())
    beside = LAYERS * MOST_BESIDE_KERNELS if projections > 2 else 0
    assert others <= beside + MOST_OF_A_STEP, program.launches
    assert not program.large_copies
    assert program.temporary_bytes <= MOST_TEMPORARY_BYTES
    for kernel in program.kernels:
        assert kernel.spill_bytes == 0, kernel


@pytest.mark.aot
def test_kernels_are_compiled_once() -> None:
    """A kernel that all layers share is one of the program's kernels, however many layers there are."""
    config = json.loads((CONFIGS / "tinymistral-6x248m.json").read_text()) | dict(num_hidden_layers=3)
    model = abstract_model(config)
    leaves, graph = split(model.module)
    cache = jax.eval_shape(lambda: model.module.empty_cache(1, 64))
    tokens_B = jax.ShapeDtypeStruct((1,), np.int32)
    program = aot.compile_for_h200(
        lambda leaves, tokens_B, cache: graph.merged(leaves).decode(tokens_B, cache).logits_BV, leaves, tokens_B, cache
    )
    names = [kernel.name for kernel in program.kernels]
    assert names.count("route_decode") == 1
    # Query, key and value in one; output. Each twice: the first layer's stream comes from the embedding, not from a kernel.
    assert names.count("matvec") <= 4
