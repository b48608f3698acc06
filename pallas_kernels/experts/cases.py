"""What `experts` is tested, compiled and measured on: layers of real checkpoints, and cases chosen to be awkward."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pallas_kernels.experts.api import Activation
from pallas_kernels.route.api import Routing


@dataclasses.dataclass(frozen=True)
class Layer:
    """The experts of one MoE layer: E of them, A active per token, F wide inside, D outside."""

    num_experts: int
    active: int
    width: int
    model_width: int
    activation: Activation = "silu"
    gates: int = 2
    has_biases: bool = False

    @property
    def key(self) -> str:
        """How tuned tables name it."""
        suffix = "" if self.gates == 2 else " G1"
        return f"E{self.num_experts} A{self.active} F{self.width} D{self.model_width}{suffix}"

    @property
    def expert_bytes(self) -> int:
        """What reading one expert's bfloat16 matrices costs."""
        return 2 * (self.gates + 1) * self.width * self.model_width


LAYERS: dict[str, Layer] = {
    "tinymistral": Layer(6, 2, 4096, 1024),
    "olmoe": Layer(64, 8, 1024, 2048),
    "qwen1.5": Layer(60, 4, 1408, 2048),
    "qwen3-30b": Layer(128, 8, 768, 2048),
    "mixtral": Layer(8, 2, 14336, 4096),
    "gpt-oss": Layer(32, 4, 2880, 2880, activation="swiglu_clamped", has_biases=True),
    "deepseek-v3": Layer(256, 8, 2048, 7168),
    "switch-base-128": Layer(128, 1, 3072, 768, activation="relu", gates=1),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """`tokens` through `layer`.

    chosen: the experts that tokens go to; all of them unless said.
    local: (first, count) of the experts whose weights are there; all of them unless said.
    """

    name: str
    tokens: int
    layer: Layer
    chosen: tuple[int, ...] | None = None
    local: tuple[int, int] | None = None
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    has_residual: bool = False

    @property
    def key(self) -> str:
        return self.layer.key

    @property
    def read_bytes(self) -> int:
        """An upper bound on the weights that a call reads."""
        return min(self.layer.num_experts, self.tokens * self.layer.active) * self.layer.expert_bytes


_TOY = Layer(4, 2, 64, 128)
AWKWARD: tuple[Case, ...] = (
    Case("one_token", 1, _TOY),
    Case("empty_experts", 5, Layer(8, 2, 64, 128), chosen=(1, 6)),
    Case("all_on_one_expert", 12, Layer(4, 1, 64, 128), chosen=(2,)),
    Case("off_the_tile", 13, _TOY),
    Case("one_past_the_tile", 33, _TOY),
    Case("last_tile_partial", 150, _TOY),
    Case("top1", 9, Layer(4, 1, 64, 128)),
    Case("six_experts", 7, Layer(6, 2, 64, 128)),
    Case("sixty_experts", 6, Layer(60, 4, 64, 64)),
    Case("every_expert", 3, Layer(4, 4, 64, 128)),
    Case("odd_multiples_of_64", 5, Layer(4, 2, 192, 320)),
    Case("odd_multiples_of_16", 5, Layer(4, 2, 48, 80)),
    Case("upper_half_local", 9, Layer(8, 2, 64, 128), local=(4, 4)),
    Case("nothing_local", 4, Layer(8, 2, 64, 128), chosen=(0, 1, 2), local=(4, 4)),
    Case("clamped_with_biases", 6, Layer(4, 2, 64, 128, activation="swiglu_clamped", has_biases=True)),
    Case("relu_without_gate", 6, Layer(4, 1, 64, 128, activation="relu", gates=1)),
    Case("gelu", 4, Layer(4, 2, 64, 128, activation="gelu")),
    Case("gelu_tanh", 4, Layer(4, 2, 64, 128, activation="gelu_tanh")),
    Case("biases_upper_half", 40, Layer(8, 2, 64, 128, has_biases=True), local=(4, 4)),
    Case("residual", 6, _TOY, has_residual=True),
    Case("residual_many_tokens", 70, Layer(4, 2, 64, 128, has_biases=True), has_residual=True),
    Case("float32", 7, _TOY, dtype="float32", has_residual=True),
)
TOKENS = (1, 8, 32, 64, 512, 4096)
REAL: tuple[Case, ...] = tuple(
    Case(f"{name}-{tokens}", tokens, layer) for name, layer in LAYERS.items() for tokens in TOKENS
)


def arguments(case: Case, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The case's positional and keyword arguments: random, scaled so that values stay of unit size."""
    operands, biases = _random(case, jax.random.key(seed, impl="rbg"))  # compiles and runs faster than the default
    first = case.local[0] if case.local else 0
    return operands, dict(activation=case.layer.activation, first_expert=first, **biases)


@functools.partial(jax.jit, static_argnums=0)  # jitted: the largest weights would not fit in float32
def _random(case: Case, key: jax.Array) -> tuple[tuple[Any, ...], dict[str, Any]]:
    layer = case.layer
    count = case.local[1] if case.local else layer.num_experts
    keys = iter(jax.random.split(key, 7))

    def uniform(*shape: int, scale: float = 1.0) -> jax.Array:
        bound = 3**0.5 * scale  # of variance scale squared
        return jax.random.uniform(next(keys), shape, minval=-bound, maxval=bound).astype(case.dtype)

    operands = (
        uniform(case.tokens, layer.model_width),
        routing(next(keys), case.tokens, layer, chosen=case.chosen),
        uniform(count, layer.gates, layer.width, layer.model_width, scale=layer.model_width**-0.5),
        uniform(count, layer.model_width, layer.width, scale=layer.width**-0.5),
    )
    up_bias_EGF = uniform(count, layer.gates, layer.width) if layer.has_biases else None
    down_bias_ED = uniform(count, layer.model_width) if layer.has_biases else None
    residual_TD = uniform(case.tokens, layer.model_width) if case.has_residual else None
    return operands, dict(up_bias_EGF=up_bias_EGF, down_bias_ED=down_bias_ED, residual_TD=residual_TD)


def routing(key: jax.Array, tokens: int, layer: Layer, *, chosen: tuple[int, ...] | None = None) -> Routing:
    """Uniformly random experts for each token, different ones among `chosen`, with weights that sum to one."""
    candidates_E = jnp.array(range(layer.num_experts) if chosen is None else chosen, jnp.int32)
    logits_TE = jax.random.uniform(key, (tokens, layer.num_experts), minval=-2, maxval=2)
    weights_TA, positions_TA = jax.lax.top_k(logits_TE[:, : len(candidates_E)], layer.active)
    return Routing(jax.nn.softmax(weights_TA), candidates_E[positions_TA], logits_TE)
