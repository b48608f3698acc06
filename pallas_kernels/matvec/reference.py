"""The definition of dense projections, in plain JAX. Runs on every device."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import precision
from pallas_kernels.dispatch import Implementation
from pallas_kernels.experts.reference import activate


def matvec(
    x_TI,
    weights,
    *,
    norm_weight_I=None,
    norm_epsilon=1e-6,
    bias_O=None,
    residual_TO=None,
    activation=None,
    out_dtype=None,
) -> tuple[jax.Array, ...]:
    """One result for each weight; `weights` is a tuple here, and `bias_O` too unless it is None."""
    if norm_weight_I is not None:
        x_TI = rms_norm(x_TI, norm_weight_I, epsilon=norm_epsilon)
    biases = bias_O or (None,) * len(weights)
    return tuple(
        _project(x_TI, weight, bias, residual_TO, activation).astype(out_dtype or x_TI.dtype)
        for weight, bias in zip(weights, biases, strict=True)
    )


def rms_norm(x_TI, weight_I, *, epsilon: float) -> jax.Array:
    """`x / sqrt(mean(x**2) + epsilon)` in float32, rounded, times the weight: as transformers does it."""
    x32_TI = x_TI.astype(jnp.float32)
    inverse_T1 = lax.rsqrt(jnp.mean(x32_TI * x32_TI, axis=1, keepdims=True) + epsilon)
    return (x32_TI * inverse_T1).astype(x_TI.dtype) * weight_I.astype(x_TI.dtype)


def _project(x_TI, weight, bias_O, residual_TO, activation) -> jax.Array:
    """`x @ weight.T` and all that follows it in float32."""
    product = functools.partial(jnp.einsum, precision=precision.full(x_TI.dtype), preferred_element_type=jnp.float32)
    if activation is None:
        y_TO = product("TI,OI->TO", x_TI, weight)
    else:
        up_TGO = product("TI,GOI->TGO", x_TI, weight)
        y_TO = activate(up_TGO, activation, axis=1)
    for addend in (bias_O, residual_TO):
        if addend is not None:
            y_TO = y_TO + addend.astype(jnp.float32)
    return y_TO


IMPLEMENTATION = Implementation("reference", supports=lambda device, *args, **kwargs: None, run=matvec)
