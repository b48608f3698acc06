"""A model rebalanced while in use: the same tokens, compiled once for the new slots, then never again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from flax import nnx

import moe_jax
from moe_jax.layers.moe import MoE
from moe_jax.rebalancing import measured_loads, rebalanced

PROMPTS = ["ROMEO:", "To be", "First Citizen:"]


def _generate(model, **options):
    return moe_jax.generate(model, PROMPTS, max_new_tokens=12, stop_token_ids=(), **options)


def test_rebalancing_keeps_tokens_and_compiles_nothing():
    model = moe_jax.load("shakespeare", dtype="float32", mesh="ep=4", strategy="ep_agrs")
    before = _generate(model, routed_experts=True)
    loads = measured_loads(model, before.routing)
    assert [load.sum() for load in loads] == [2 * sum(before_lengths(before))] * 6

    first = rebalanced(model, loads)
    assert np.array_equal(_generate(first).tokens, before.tokens)
    second = rebalanced(first, [load[::-1] for load in loads])
    assert not np.array_equal(tables_of(first)[0], tables_of(second)[0])
    with compilations() as compiled:
        again = _generate(second)
        third = rebalanced(second, loads)
    assert compiled == []
    assert np.array_equal(again.tokens, before.tokens)
    assert np.array_equal(tables_of(third)[0], tables_of(first)[0])


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """What XLA compiles meanwhile."""
    found: list[str] = []

    def listen(event: str, duration_s: float, **details) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(str(details))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_compilations_are_noticed():
    with compilations() as compiled:
        jax.jit(lambda x: x + 1)(np.ones(3))
    assert compiled


def before_lengths(out) -> list[int]:
    prompt = (out.routing.prompt_experts_BLTA[:, 0, :, 0] >= 0).sum(axis=1)
    new = (out.routing.experts_BLUA[:, 0, :, 0] >= 0).sum(axis=1)
    return [int(each) for each in prompt + new]


def tables_of(model) -> list[np.ndarray]:
    layers = [part for _, part in nnx.iter_modules(model.module) if isinstance(part, MoE)]
    return [np.asarray(layer.tables.get_value().phys2log_P) for layer in layers]


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match="split whole experts over devices"):
        rebalanced(moe_jax.load("shakespeare", dtype="float32"), [])
    model = moe_jax.load("shakespeare", dtype="float32", mesh="ep=2", strategy="ep_psum")
    moved = rebalanced(model, [np.ones(8)] * 6)
    with pytest.raises(ValueError, match="save the model as it was loaded"):
        moe_jax.save(moved, tmp_path / "moved")
    with pytest.raises(ValueError, match="loads of 6 sparse layers, got 1"):
        rebalanced(model, [np.ones(8)])
    with pytest.raises(ValueError, match=r"expected 8 loads for every layer, got \(7,\)"):
        rebalanced(model, [np.ones(7)] * 6)
