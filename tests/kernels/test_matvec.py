"""What `matvec` takes and refuses; its numbers are tested with those of all ops in `test_kernels.py`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import matvec
from pallas_kernels.dispatch import Device
from pallas_kernels.matvec import mosaic_sm90 as kernel

X_TI = jnp.ones((3, 32), jnp.bfloat16)
WEIGHT_OI = jnp.ones((16, 32), jnp.bfloat16)


def test_norm_by_hand() -> None:
    """One row [3, 4]: its mean square is 12.5, and the weight doubles its second element."""
    x_TI, weight_OI = jnp.array([[3.0, 4.0]]), jnp.eye(2)
    y_TO = matvec(x_TI, weight_OI, norm_weight_I=jnp.array([1.0, 2.0]), norm_epsilon=0.0, residual_TO=jnp.ones((1, 2)))
    np.testing.assert_allclose(y_TO, [[1 + 3 / 12.5**0.5, 1 + 8 / 12.5**0.5]], rtol=1e-6)


def test_a_tuple_of_weights_gives_a_tuple() -> None:
    y_TO = matvec(X_TI, WEIGHT_OI, bias_O=jnp.ones(16))
    several = matvec(X_TI, (WEIGHT_OI, WEIGHT_OI[:8]), bias_O=(jnp.ones(16), jnp.ones(8)))
    assert isinstance(several, tuple) and [y.shape for y in several] == [(3, 16), (3, 8)]
    np.testing.assert_array_equal(several[0], y_TO)
    assert y_TO.dtype == jnp.bfloat16 and y_TO[0, 0] == 33


@pytest.mark.parametrize(
    ("message", "weights", "named"),
    [
        (r"expected weights \[O, I\] for x_TI \(3, 32\), got \(16, 16\)", WEIGHT_OI[:, :16], {}),
        (r"expected weights \[1 or 2, O, I\] beside 'silu'", WEIGHT_OI, dict(activation="silu")),
        (r"expected weights \[2, O, I\] beside 'swiglu_clamped'", WEIGHT_OI[None], dict(activation="swiglu_clamped")),
        ("expected activation to be one of", WEIGHT_OI, dict(activation="tanh")),
        (r"expected norm_weight_I of shape \(32,\), got \(16,\)", WEIGHT_OI, dict(norm_weight_I=jnp.ones(16))),
        (r"expected bias_O of shape \(16,\), got \(32,\)", WEIGHT_OI, dict(bias_O=jnp.ones(32))),
        ("expected a bias for each of 2 weights, got 1", (WEIGHT_OI,) * 2, dict(bias_O=(jnp.ones(16),))),
        (r"expected residual_TO of shape \(3, 16\), got \(1, 16\)", WEIGHT_OI, dict(residual_TO=jnp.ones((1, 16)))),
        (
            "expected out_dtype to be float32 or bfloat16, that of x_TI, got float16",
            WEIGHT_OI,
            dict(out_dtype="float16"),
        ),
        ("expected one weight beside residual_TO, got 2", (WEIGHT_OI,) * 2, dict(residual_TO=jnp.ones((3, 16)))),
    ],
)
def test_refuses(message, weights, named) -> None:
    with pytest.raises(ValueError, match=message):
        matvec(X_TI, weights, **named)


@pytest.mark.parametrize(
    ("reason", "x_TI", "weight_OI", "named"),
    [
        ("at most 64, got 65", jnp.ones((65, 64), jnp.bfloat16), jnp.ones((16, 64), jnp.bfloat16), {}),
        ("64 columns at a time, and x_TI has 32", X_TI, WEIGHT_OI, {}),
        (
            "multiples of 16 columns, and the weights have 8",
            jnp.ones((3, 64), jnp.bfloat16),
            jnp.ones((8, 64), jnp.bfloat16),
            dict(bias_O=(jnp.ones(8),)),
        ),
        (
            "multiples of 8 columns, and the weights have 4",
            jnp.ones((3, 64), jnp.bfloat16),
            jnp.ones((4, 64), jnp.bfloat16),
            {},
        ),
        ("a weight is float32", X_TI, WEIGHT_OI.astype(jnp.float32), {}),
    ],
)
def test_the_kernel_says_why_not(reason, x_TI, weight_OI, named) -> None:
    assert reason in kernel.IMPLEMENTATION.supports(Device("gpu", "NVIDIA H200", 132), x_TI, (weight_OI,), **named)


@pytest.mark.parametrize("tokens", [1, 16, 64])
@pytest.mark.parametrize("shape", [(2048, 2048), (151936, 2048), (64, 64), (2, 2048, 7168)])
def test_settings_fit_shared_memory(tokens: int, shape: tuple[int, ...]) -> None:
    weights = (jax.ShapeDtypeStruct(shape, jnp.bfloat16),)
    x_TI = jax.ShapeDtypeStruct((tokens, shape[-1]), jnp.bfloat16)
    settings = kernel.default_settings(x_TI, weights, num_sms=132)
    steps = shape[-1] / settings["depth"]
    assert settings["stages"] >= 2 and settings["parts"] <= max(1, steps)
    slot_bytes = 2 * settings["depth"] * (tokens + 64 * (len(shape) - 1))
    assert settings["stages"] * slot_bytes + kernel._sums_bytes(x_TI, weights, settings["parts"]) < 227 << 10
