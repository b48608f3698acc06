"""Dense projections of a few rows, at the speed at which their weights can be read."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.experts.api import ACTIVATIONS, Activation


def matvec(
    x_TI: Float[Array, "T I"],
    weights: Float[Array, "*G O I"] | tuple[Float[Array, "_ I"], ...],
    *,
    norm_weight_I: Float[Array, "I"] | None = None,
    norm_epsilon: float = 1e-6,
    bias_O: Float[Array, "O"] | tuple[Float[Array, "_"], ...] | None = None,
    residual_TO: Float[Array, "T O"] | None = None,
    activation: Activation | None = None,
    out_dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> Any:
    """`act(rms_norm(x) @ weight.T) + bias + residual`, in float32 from the product on, rounded once to `out_dtype`.

    Several projections of the same `x_TI` (query, key and value) go in as a tuple `[O, I]` each, their biases as well, and
    come out as a tuple: they share a launch. Beside an `activation`, the weight is `[G, O, I]` as in `experts`: gate and
    linear part with G of 2, `act(x @ gate.T) * (x @ linear.T)`, or no gate with G of 1.

    norm_weight_I: RMSNorm in front, with float32 statistics; the normalised row is rounded to `x_TI`'s dtype before and after
      it is multiplied by the weight, as Hugging Face's modules do.
    out_dtype: `x_TI`'s, or float32, which nothing is rounded for (vocabulary logits); `x_TI`'s by default.

    Raises:
      ValueError: shapes disagree, the activation or `out_dtype` is unknown, or there are several weights beside a residual.
    """
    all_weights, biases = _tuple(weights), None if bias_O is None else _tuple(bias_O)
    _check(x_TI, all_weights, norm_weight_I, biases, residual_TO, activation, out_dtype)
    arguments = dict(
        norm_weight_I=norm_weight_I,
        norm_epsilon=norm_epsilon,
        bias_O=biases,
        residual_TO=residual_TO,
        activation=activation,
        out_dtype=out_dtype,
    )
    chosen = dispatch.choose(
        "matvec", _implementations(), x_TI, all_weights, implementation=implementation, **arguments
    )
    results = chosen.run(x_TI, all_weights, **arguments)
    return results if isinstance(weights, tuple) else results[0]


def has_kernel(x_TI, weights, **arguments: Any) -> bool:
    """Whether a kernel would run this call: not the definition, which XLA splits into several launches."""
    return any(reason is None for name, reason in explain(x_TI, weights, **arguments) if name != "reference")


def explain(x_TI, weights, **arguments: Any) -> list[tuple[str, str | None]]:
    """Each implementation with None (it can run this call) or the reason why it cannot, fastest first."""
    return dispatch.explain(_implementations(), x_TI, _tuple(weights), **arguments)


def _tuple(arrays) -> tuple:
    return arrays if isinstance(arrays, tuple) else (arrays,)


def _implementations() -> tuple[dispatch.Implementation, ...]:
    from pallas_kernels.matvec import mosaic_sm90, reference

    return (mosaic_sm90.IMPLEMENTATION, reference.IMPLEMENTATION)


def _check(x_TI, weights, norm_weight_I, biases, residual_TO, activation, out_dtype) -> None:
    if out_dtype is not None and jnp.dtype(out_dtype) not in (x_TI.dtype, jnp.float32):
        raise ValueError(f"matvec: expected out_dtype to be float32 or {x_TI.dtype}, that of x_TI, got {out_dtype}")
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"matvec: expected activation to be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    gates: tuple[int, ...] = () if activation is None else (2,) if activation == "swiglu_clamped" else (1, 2)
    letters = "[O, I]" if activation is None else f"[{' or '.join(map(str, gates))}, O, I] beside {activation!r}"
    for weight in weights:
        leading = weight.shape[:-2]
        if weight.shape[-1:] != x_TI.shape[1:] or not (
            leading == gates == () or (len(leading) == 1 and leading[0] in gates)
        ):
            raise ValueError(f"matvec: expected weights {letters} for x_TI {x_TI.shape}, got {weight.shape}")
    if residual_TO is not None and len(weights) > 1:
        raise ValueError(f"matvec: expected one weight beside residual_TO, got {len(weights)}")
    if biases is not None and len(biases) != len(weights):
        raise ValueError(f"matvec: expected a bias for each of {len(weights)} weights, got {len(biases)}")
    expected = [
        ("norm_weight_I", norm_weight_I, x_TI.shape[1:]),
        ("residual_TO", residual_TO, (x_TI.shape[0], weights[0].shape[-2])),
        *(("bias_O", bias, weight.shape[-2:-1]) for bias, weight in zip(biases or (), weights, strict=False)),
    ]
    for name, array, shape in expected:
        if array is not None and array.shape != shape:
            raise ValueError(f"matvec: expected {name} of shape {shape}, got {array.shape}")
