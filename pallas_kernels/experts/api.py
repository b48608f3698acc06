"""The expert layer: every token through its experts' feed-forward networks, weighted and summed."""

from __future__ import annotations

from typing import Any, Literal, get_args

from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.route.api import Routing

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "swiglu_clamped"]
ACTIVATIONS: tuple[str, ...] = get_args(Activation)


def experts(
    x_TD: Float[Array, "T D"],
    routing: Routing,
    up_EGFD: Float[Array, "E G F D"],
    down_EDF: Float[Array, "E D F"],
    *,
    activation: Activation = "silu",
    up_bias_EGF: Float[Array, "E G F"] | None = None,
    down_bias_ED: Float[Array, "E D"] | None = None,
    residual_TD: Float[Array, "T D"] | None = None,
    first_expert: int = 0,
    implementation: str | None = None,
) -> Float[Array, "T D"]:
    """Sum over a token's experts of weight * (down @ act(up @ x)), accumulated in float32, returned in `x_TD`'s dtype.

    G is 2 for gated experts, `up_EGFD[e, 0]` being the gate and `[e, 1]` the linear part: `act(gate) * linear`; it is 1 for
    experts without a gate: `act(up)`. `swiglu_clamped` is gpt-oss's: gate and linear are clamped at 7 and
    `gate * sigmoid(1.702 * gate) * (linear + 1)`.

    The arrays hold the experts `first_expert` up to `first_expert + E`. A token's choices outside that range cost nothing and
    add nothing, so that devices which hold different ranges can sum their results.

    `residual_TD` is added to the rounded sum, and the result rounded again, as Hugging Face's layers do.

    Raises:
      ValueError: shapes disagree, or the activation is unknown.
    """
    _check(x_TD, routing, up_EGFD, down_EDF, activation, up_bias_EGF, down_bias_ED, residual_TD)
    arguments = dict(
        activation=activation,
        up_bias_EGF=up_bias_EGF,
        down_bias_ED=down_bias_ED,
        residual_TD=residual_TD,
        first_expert=first_expert,
    )
    operands = (x_TD, routing, up_EGFD, down_EDF)
    chosen = dispatch.choose("experts", _implementations(), *operands, implementation=implementation, **arguments)
    return chosen.run(*operands, **arguments)


def explain(x_TD, routing, up_EGFD, down_EDF, **arguments: Any) -> list[tuple[str, str | None]]:
    """Each implementation with None (it can run this call) or the reason why it cannot, fastest first."""
    return dispatch.explain(_implementations(), x_TD, routing, up_EGFD, down_EDF, **arguments)


def _implementations() -> tuple[dispatch.Implementation, ...]:
    from pallas_kernels.experts import compact_sm90, decode_sm90, gathered, grouped_sm90, ragged, reference

    return (
        decode_sm90.IMPLEMENTATION,
        compact_sm90.IMPLEMENTATION,
        grouped_sm90.IMPLEMENTATION,
        gathered.IMPLEMENTATION,
        ragged.IMPLEMENTATION,
        reference.IMPLEMENTATION,
    )


def _check(x_TD, routing: Routing, up_EGFD, down_EDF, activation, up_bias_EGF, down_bias_ED, residual_TD) -> None:
    if up_EGFD.ndim != 4 or up_EGFD.shape[1] not in (1, 2):
        raise ValueError(f"experts: expected up_EGFD [E, 1 or 2, F, D], got {up_EGFD.shape}")
    num_experts, gates, width, model_width = up_EGFD.shape
    num_tokens = x_TD.shape[0]
    expected = {
        "x_TD": (x_TD, (num_tokens, model_width)),
        "down_EDF": (down_EDF, (num_experts, model_width, width)),
        "routing.experts_TA": (routing.experts_TA, (num_tokens, *routing.weights_TA.shape[1:])),
        "routing.weights_TA": (routing.weights_TA, (num_tokens, *routing.experts_TA.shape[1:])),
        "up_bias_EGF": (up_bias_EGF, (num_experts, gates, width)),
        "down_bias_ED": (down_bias_ED, (num_experts, model_width)),
        "residual_TD": (residual_TD, x_TD.shape),
    }
    for name, (array, shape) in expected.items():
        if array is not None and array.shape != shape:
            raise ValueError(
                f"experts: expected {name} of shape {shape} beside up_EGFD {up_EGFD.shape}, got {array.shape}"
            )
    if activation not in ACTIVATIONS:
        raise ValueError(f"experts: expected activation to be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if activation == "swiglu_clamped" and gates != 2:
        raise ValueError(
            f"experts: activation 'swiglu_clamped' needs gated experts, up_EGFD [E, 2, F, D]; got {up_EGFD.shape}"
        )
