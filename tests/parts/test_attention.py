"""Attention among a prompt's tokens: which implementation, and that all of them mean the same by a window."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.layers import attention
from pallas_kernels import dispatch, interpret

H200 = dispatch.Device("gpu", "NVIDIA H200", 132)


def _random(batch: int, length: int, *heads: int, width: int, dtype: str) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), len(heads))
    return [jax.random.normal(key, (batch, length, n, width), dtype) for key, n in zip(keys, heads, strict=True)]


@pytest.mark.parametrize("window", [None, 1, 4, 50])
def test_window_means_the_same_to_jax(window: int | None) -> None:
    """`jax.nn.dot_product_attention` in plain XLA, called as for cuDNN. Sums of 33 float32 products, in another order."""
    q_BTNH, k_BTKH, v_BTKH = _random(2, 33, 4, 2, 2, width=16, dtype="float32")
    ours = attention.attend_causally(q_BTNH, k_BTKH, v_BTKH, window=window)
    left = None if window is None else (window - 1, 0)
    theirs = jax.nn.dot_product_attention(
        q_BTNH, k_BTKH, v_BTKH, is_causal=True, local_window_size=left, implementation="xla"
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_cudnn_is_refused_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(dtype, width: int = 64) -> str | None:
        return attention.why_not_cudnn(jnp.zeros((1, 8, 2, width), dtype))

    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    with dispatch.compiling_for(dispatch.Device("cpu", "cpu")):
        assert reason(jnp.bfloat16) == "it needs an NVIDIA GPU, and this is cpu"
    with interpret.interpreting():
        assert "it needs an NVIDIA GPU" in str(reason(jnp.bfloat16))
    with dispatch.compiling_for(H200):
        assert "there is no GPU here" in str(reason(jnp.bfloat16))
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        assert reason(jnp.float32) == "it multiplies bfloat16 and float16, and the queries are float32"
        assert reason(jnp.bfloat16, 136) == "its heads are multiples of 8 up to 128 wide, and these 136"
        assert reason(jnp.bfloat16, 4) == "its heads are multiples of 8 up to 128 wide, and these 4"
        assert reason(jnp.bfloat16) is None


@pytest.mark.gpu
@pytest.mark.parametrize(("length", "window"), [(133, None), (200, 50), (2048, 1024)])
def test_cudnn_attends_as_the_definition(length: int, window: int | None) -> None:
    """Within the three roundings to bfloat16 (probabilities, products, result) that both make."""
    q_BTNH, k_BTKH, v_BTKH = _random(2, length, 8, 2, 2, width=128, dtype="bfloat16")
    assert attention.why_not_cudnn(q_BTNH) is None
    result = jax.jit(lambda *each: attention.attend_causally(*each, window=window))(q_BTNH, k_BTKH, v_BTKH)
    exact = [each.astype(jnp.float32) for each in (q_BTNH, k_BTKH, v_BTKH)]
    expected = attention.attend_causally(*exact, window=window)
    error = jnp.linalg.norm(result.astype(jnp.float32) - expected) / jnp.linalg.norm(expected)
    assert error <= 5e-3
