"""What `decode_attention` takes and refuses; its numbers are tested with those of all ops in `test_kernels.py`."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import aot, decode_attention, dispatch, tuning
from pallas_kernels.decode_attention import cases
from pallas_kernels.decode_attention import mosaic_sm90 as kernel
from pallas_kernels.dispatch import Device

H200 = Device("gpu", "NVIDIA H200", 132)
HEADS = cases.Heads(4, 2, 64)
CASE = cases.Case("two_requests", 2, HEADS, 32, (3, 17))


def test_by_hand() -> None:
    """Head of width 2, one key in the cache: scores 0 and ln 3 * sqrt(2) / sqrt(2) weigh values 1/4 and 3/4."""
    cache = jnp.zeros((1, 1, 4, 2))
    k_BKSH = cache.at[0, 0, 0].set(jnp.array([0.0, 5.0]))
    v_BKSH = cache.at[0, 0, 0].set(jnp.array([4.0, 8.0]))
    q_BQ, k_BX, v_BX = jnp.array([[np.log(3) * 2**0.5, 0.0]]), jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 4.0]])
    tables = (jnp.ones((1, 1)), jnp.zeros((1, 1)))  # no rotation
    out_BQ, k_BKSH, v_BKSH = decode_attention(q_BQ, k_BX, v_BX, *tables, k_BKSH, v_BKSH, jnp.array([1]))
    np.testing.assert_allclose(out_BQ, [[1.0, 5.0]], rtol=1e-6)
    np.testing.assert_array_equal(k_BKSH[0, 0], [[0, 5], [1, 0], [0, 0], [0, 0]])
    np.testing.assert_array_equal(v_BKSH[0, 0], [[4, 8], [0, 4], [0, 0], [0, 0]])


def test_norm_clip_and_rotation_by_hand() -> None:
    """Key [3, 4] over its root mean square, 12.5 ** 0.5, is [0.849, 1.131]; clipped at 1; a quarter turn swaps it."""
    cache = jnp.zeros((1, 1, 2, 2))
    q_BQ = k_BX = jnp.array([[3.0, 4.0]])
    tables = (jnp.zeros((1, 1)), jnp.ones((1, 1)))
    named: dict[str, Any] = dict(q_norm_weight=jnp.ones(2), k_norm_weight=jnp.ones(2), norm_epsilon=0.0, clip=1.0)
    out_BQ, k_BKSH, v_BKSH = decode_attention(q_BQ, k_BX, -k_BX, *tables, cache, cache, jnp.array([0]), **named)
    np.testing.assert_allclose(k_BKSH[0, 0, 0], [-1.0, 3 / 12.5**0.5], rtol=1e-6)
    np.testing.assert_allclose(v_BKSH[0, 0, 0], [-1.0, -1.0])
    np.testing.assert_allclose(out_BQ, [[-1.0, -1.0]])


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        (r"expected k_BKSH \[B, K, S, H\] with H even, got \[2, 2, 32, 63\]", dict(k_BKSH=jnp.ones((2, 2, 32, 63)))),
        (r"N a multiple of K=2 and H=64, got \[2, 192\]", dict(q_BQ=jnp.ones((2, 192)))),
        (r"expected k_BX \[2, 128\] beside k_BKSH .*, got \[2, 64\]", dict(k_BX=jnp.ones((2, 64)))),
        (r"expected v_BX \[2, 128\] beside k_BKSH .*, got \[1, 128\]", dict(v_BX=jnp.ones((1, 128)))),
        (r"expected sin_BR \[2, 32\] beside k_BKSH .*, got \[2, 64\]", dict(sin_BR=jnp.ones((2, 64)))),
        (r"expected v_BKSH \[2, 2, 32, 64\]", dict(v_BKSH=jnp.ones((2, 2, 16, 64)))),
        (r"expected positions_B \[2\]", dict(positions_B=jnp.zeros(3, jnp.int32))),
        ("expected positions_B to be whole numbers, got float32", dict(positions_B=jnp.zeros(2))),
        ("both q_norm_weight and k_norm_weight or neither", dict(q_norm_weight=jnp.ones(64))),
        (
            r"expected norm weights of 64 numbers each \(a head\), or 256 and 128",
            dict(q_norm_weight=jnp.ones(64), k_norm_weight=jnp.ones(128)),
        ),
        ("expected clip to be positive or None, got 0", dict(clip=0.0)),
        ("expected window to be at least 1 or None, got 0", dict(window=0)),
        ("cannot run this call: it needs a Hopper GPU", dict(implementation="mosaic_sm90")),
    ],
)
def test_refuses(message: str, changes: dict[str, Any]) -> None:
    names = ("q_BQ", "k_BX", "v_BX", "cos_BR", "sin_BR", "k_BKSH", "v_BKSH", "positions_B")
    operands, named = cases.arguments(CASE)
    given = dict(zip(names, operands, strict=True)) | named | changes
    with pytest.raises(ValueError, match=message):
        decode_attention(**given)


@pytest.mark.parametrize(
    ("reason", "case"),
    [
        ("it multiplies bfloat16, and q_BQ is float32", cases.Case("", 1, HEADS, 32, 3, dtype="float32")),
        ("its heads are 32, 64, 96, 128, 192, 256 wide, and these 80", cases.Case("", 1, cases.Heads(4, 2, 80), 32, 3)),
        ("up to 16 query heads of a key/value head", cases.Case("", 1, cases.Heads(17, 1, 64), 32, 3)),
        ("it reads the cache by 8 positions, and there are 12", cases.Case("", 1, HEADS, 12, 3)),
        ("it reads the cache by 16 positions, and there are 24", cases.Case("", 1, cases.Heads(4, 2, 32), 24, 3)),
    ],
)
def test_kernel_gives_its_reason(reason: str, case: cases.Case) -> None:
    operands, named = aot.shapes_of(functools.partial(cases.arguments, case))
    found = kernel.IMPLEMENTATION.supports(H200, *operands, **named)
    assert found is not None and reason in found


@pytest.mark.parametrize("num_sms", [1, 132])
@pytest.mark.parametrize("case", cases.REAL, ids=lambda case: case.name)
def test_default_settings_are_possible(case: cases.Case, num_sms: int) -> None:
    operands, named = aot.shapes_of(functools.partial(cases.arguments, case))
    default = kernel.default_settings(
        operands[0], operands[5], window=case.window, norms_whole=case.heads.norm == "projection", num_sms=num_sms
    )
    assert default["splits"] == 1 or default["splits"] * case.tokens * case.heads.kv <= 2 * num_sms
    assert default["stages"] >= 2 or case.positions < kernel.POSITIONS  # one tile of positions needs no second slot
    with dispatch.compiling_for(dataclasses.replace(H200, num_sms=num_sms)):
        offered = kernel.candidates(*operands, **named)
    assert offered[0] == default
    assert default not in offered[1:]
    for settings in offered:
        assert settings["workers"] >= 1
        assert settings["stages"] >= 1 and settings["stages"] % settings["workers"] == 0


def test_tuned_settings_are_those_of_like_calls(monkeypatch) -> None:
    """Of as many requests to a power of two, of the same heads and norm, of caches of 4096 up to 8191 positions."""
    key, tuned = "N32 K4 H128 S4096 norm", dict(splits=7, workers=2, stages=4)  # no default
    monkeypatch.setattr(tuning, "_table", lambda path: {f"decode_attention.{kernel.NAME}": {key: {8: tuned}}})
    run = []
    monkeypatch.setattr(kernel, "_decode_attention", lambda *arrays, splits, **static: run.append(splits))
    for tokens, capacity, heads in (
        (8, 4096, cases.QWEN3), (15, 8128, cases.QWEN3), (16, 4096, cases.QWEN3), (8, 2048, cases.QWEN3),
        (8, 4096, cases.Heads(32, 4, 128)),
    ):  # fmt: skip
        operands, named = aot.shapes_of(functools.partial(cases.arguments, cases.Case("", tokens, heads, capacity, 9)))
        with dispatch.compiling_for(H200):
            kernel.decode_attention(*operands, **named)
    assert [splits == 7 for splits in run] == [True, True, False, False, False]


# Every layout of heads, with one block for each and with clusters.
COMPILED = [case for case in cases.REAL if case.name.endswith(("-1x192", "-8x4095"))]


@pytest.mark.aot
@pytest.mark.parametrize("case", COMPILED, ids=lambda case: case.name)
def test_compiles(case: cases.Case) -> None:
    operands, named = aot.shapes_of(functools.partial(cases.arguments, case))
    arrays, static = aot.split_arrays(named)
    program = aot.compile_for_h200(
        lambda operands, arrays: kernel.decode_attention(*operands, **arrays, **static), operands, arrays
    )
    (compiled,) = program.kernels
    assert compiled.spill_bytes == 0
    assert compiled.shared_memory_bytes <= aot.SHARED_MEMORY_BYTES


@pytest.mark.aot
def test_a_loop_copies_no_cache() -> None:
    """Two layers in a `while_loop`, as in generation: one launch a layer, and the caches stay where they are."""
    operands, named = aot.shapes_of(functools.partial(cases.arguments, cases.Case("", 8, cases.QWEN3, 4096, 100)))
    arrays, static = aot.split_arrays(named)
    *rows, k_BKSH, v_BKSH, positions_B = operands

    def generate(rows, k_BKSH, v_BKSH, positions_B, arrays):
        def step(state):
            q_BQ, caches, positions_B = state
            written = []
            for cache in caches:
                q_BQ, *cache = kernel.decode_attention(q_BQ, *rows[1:], *cache, positions_B, **arrays, **static)
                written.append(tuple(cache))
            return q_BQ, written, positions_B + 1

        caches = [tuple(jnp.zeros_like(each) for each in (k_BKSH, v_BKSH)) for _ in range(2)]
        q_BQ, _, _ = jax.lax.while_loop(lambda state: state[2][0] < 200, step, (rows[0], caches, positions_B))
        return q_BQ

    program = aot.compile_for_h200(generate, rows, k_BKSH, v_BKSH, positions_B, arrays)
    cache_bytes = 4 * k_BKSH.size * k_BKSH.dtype.itemsize
    assert program.launches.count("decode_attention") == 2
    assert not program.large_copies
    assert program.temporary_bytes < cache_bytes + (1 << 20)
