"""Matrix products with the checkpoints' `[out, in]` matrices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.layers.norm import RMSNorm
from pallas_kernels import Activation, activate, dispatch
from pallas_kernels.matvec import has_kernel, matvec

MOST_ROWS_NORMALISED_OFTEN = 16


def linear(x_XI: jax.Array, weight_OI: jax.Array, bias_O: jax.Array | None = None) -> jax.Array:
    """`x @ weight.T + bias` over the last dimension of x, accumulated in float32, in x's dtype.

    float32 operands are multiplied in full float32, on GPUs too (they would take TF32 otherwise).
    """
    return _accumulated(x_XI, weight_OI, bias_O).astype(x_XI.dtype)


def projected(
    x_BTI: jax.Array,
    weights: tuple[jax.Array, ...],
    biases: tuple[jax.Array, ...] | None = None,
    *,
    norm: RMSNorm | None = None,
    residual_BTO: jax.Array | None = None,
) -> tuple[jax.Array, ...]:
    """`residual + linear(norm(x), weight, bias)` for each weight `[O, I]`; norm, biases and residual may be absent.

    Few rows are one launch of `pallas_kernels.matvec` where it has a kernel, which rounds once, at the end. Elsewhere the
    sublayer's result is rounded before the residual is added, as Hugging Face does.

    Raises:
      ValueError: there are several weights beside a residual.
    """
    if residual_BTO is not None and len(weights) > 1:
        raise ValueError(f"projected: expected one weight beside residual_BTO, got {len(weights)}")
    rows_TI = x_BTI.reshape(-1, x_BTI.shape[-1])
    named: dict[str, Any] = dict(
        _norm_arguments(norm),
        bias_O=biases,
        residual_TO=None if residual_BTO is None else residual_BTO.reshape(-1, residual_BTO.shape[-1]),
    )
    if has_kernel(rows_TI, weights, **named):
        return tuple(y_TO.reshape(*x_BTI.shape[:-1], -1) for y_TO in matvec(rows_TI, weights, **named))
    x_BTI = x_BTI if norm is None else norm(x_BTI)
    addends = (None,) * len(weights) if biases is None else biases
    results = tuple(linear(x_BTI, weight, bias) for weight, bias in zip(weights, addends, strict=True))
    return results if residual_BTO is None else (residual_BTO + results[0],)


def activated(
    x_BTI: jax.Array, weight_GFI: jax.Array, activation: Activation, *, norm: RMSNorm | None = None
) -> jax.Array:
    """`act(gate @ norm(x)) * (up @ norm(x))` with G of 2, `act(up @ norm(x))` with G of 1; as `projected` in one launch."""
    G, F, width = weight_GFI.shape
    rows_TI = x_BTI.reshape(-1, width)
    named: dict[str, Any] = dict(_norm_arguments(norm), activation=activation)
    if has_kernel(rows_TI, weight_GFI, **named):
        return matvec(rows_TI, weight_GFI, **named).reshape(*x_BTI.shape[:-1], F)
    x_BTI = x_BTI if norm is None else norm(x_BTI)
    up_BTGF = linear(x_BTI, weight_GFI.reshape(G * F, width)).reshape(*x_BTI.shape[:-1], G, F)
    return activate(up_BTGF.astype(jnp.float32), activation, axis=x_BTI.ndim - 1).astype(x_BTI.dtype)


def logits(x_XD: jax.Array, weight_VD: jax.Array, *, norm: RMSNorm | None = None) -> jax.Array:
    """`norm(x) @ weight.T` left in float32: vocabulary logits are not rounded to the model's dtype.

    As `projected`, one launch where there is a kernel; many rows are normalised before it, as each of its thousands of blocks
    would normalise all of them. Elsewhere on a GPU one row is multiplied and summed up, which XLA does in one pass over the
    weight; of a product with one row it makes a slow one, or a float32 copy of the weight first.
    """
    if norm is not None and x_XD.size > MOST_ROWS_NORMALISED_OFTEN * x_XD.shape[-1]:
        x_XD, norm = norm(x_XD), None
    rows_TD = x_XD.reshape(-1, x_XD.shape[-1])
    named: dict[str, Any] = dict(_norm_arguments(norm), out_dtype=jnp.float32)
    if has_kernel(rows_TD, weight_VD, **named):
        return matvec(rows_TD, weight_VD, **named).reshape(*x_XD.shape[:-1], -1)
    x_XD = x_XD if norm is None else norm(x_XD)
    if len(rows_TD) == 1 and dispatch.current_device().platform == "gpu":
        return (x_XD.astype(jnp.float32)[..., None, :] * weight_VD.astype(jnp.float32)).sum(axis=-1)
    return _accumulated(x_XD, weight_VD, None)


def _norm_arguments(norm: RMSNorm | None) -> dict[str, Any]:
    return {} if norm is None else dict(norm_weight_I=norm.weight_D[...], norm_epsilon=norm.epsilon)


def _accumulated(x_XI, weight_OI, bias_O):
    y_XO = lax.dot_general(
        x_XI,
        weight_OI,
        (((x_XI.ndim - 1,), (1,)), ((), ())),
        precision=lax.Precision.HIGHEST if x_XI.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    return y_XO if bias_O is None else y_XO + bias_O.astype(jnp.float32)
