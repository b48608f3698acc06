"""Training a decoder: next-token loss with the router's auxiliary loss, dropout, and one jitted optimiser step.

Inference's modules know nothing of this: `logits` walks through their parts and adds the dropout. Parameters and optimiser
state are float32; each step computes with a copy in `Recipe.compute_dtype`, so a checkpoint saved in that type is the model
that was trained. Needs optax (`pip install moe-jax[train]`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from moe_jax.layers.embedding import Embedding
from moe_jax.layers.linear import linear
from moe_jax.layers.moe import MoE
from pallas_kernels import Routing

# Kernels have no derivatives; plain JAX has, and this implementation's need no scatter.
DIFFERENTIABLE = "reference"

Parameters = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is trained. The learning rate rises linearly, then falls along a cosine to a tenth of its peak."""

    steps: int = 2000
    batch: int = 32
    """Windows of text per step."""
    length: int = 512
    """Tokens per window."""
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    """Of matrices; norms have none."""
    dropout: float = 0.2
    auxiliary_loss: float = 0.01
    """Factor on the load-balancing loss (arXiv:2101.03961)."""
    gradient_norm: float = 1.0
    """Gradients of a larger norm are scaled down to it."""
    compute_dtype: str = "bfloat16"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything a step changes. `parameters` are the flat leaves of an `nnx.State`, float32."""

    step: Int[Array, ""]
    parameters: Parameters
    optimizer: optax.OptState
    key: jax.Array


class Losses(NamedTuple):
    """Means over a batch, in nats per token; the balance is A (experts per token) when all experts get the same share."""

    next_token: jax.Array
    balance: jax.Array


class Trainer(NamedTuple):
    """`step(state, text_X)` trains on random windows of a text and consumes the state; `losses` are those of its batch."""

    step: Callable[[TrainState, jax.Array], tuple[TrainState, Losses]]
    first_state: TrainState


class Windows(NamedTuple):
    """A text cut into windows, in batches: every token but the first is predicted once, where `is_real_CBT`."""

    tokens_CBT: Int[np.ndarray, "C B T"]
    targets_CBT: Int[np.ndarray, "C B T"]
    is_real_CBT: Bool[np.ndarray, "C B T"]


def trainer(module: nnx.Module, recipe: Recipe, *, seed: int) -> Trainer:
    """The first state and the jitted step of a float32 module."""
    graphdef, parameters, treedef = _split(module)
    optimizer = _optimizer(recipe)

    def loss(parameters: Parameters, tokens_BT, targets_BT, key):
        computed = _cast(parameters, recipe.compute_dtype)
        merged = nnx.merge(graphdef, jax.tree.unflatten(treedef, computed))
        logits_BTV, routings = logits(merged, tokens_BT, dropout=_Dropout(recipe.dropout, key))
        next_token = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT).mean()
        balance = jnp.mean(jnp.stack([load_balancing_loss(routing) for routing in routings]))
        return next_token + recipe.auxiliary_loss * balance, Losses(next_token, balance)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, text_X: jax.Array) -> tuple[TrainState, Losses]:
        window_key, dropout_key = jax.random.split(jax.random.fold_in(state.key, state.step))
        tokens_BT, targets_BT = random_windows(text_X, recipe.batch, recipe.length, window_key)
        gradients, losses = jax.grad(loss, has_aux=True)(state.parameters, tokens_BT, targets_BT, dropout_key)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.parameters)
        parameters = optax.apply_updates(state.parameters, updates)
        return TrainState(state.step + 1, parameters, optimizer_state, state.key), losses

    # A copy: the step consumes its state, and the module stays usable.
    parameters = jax.tree.map(jnp.copy, parameters)
    return Trainer(step, TrainState(jnp.int32(0), parameters, optimizer.init(parameters), jax.random.key(seed)))


def flat_parameters(module: nnx.Module) -> Parameters:
    """The leaves of a module's state, in the order that `with_parameters` takes them."""
    return _split(module)[1]


def with_parameters(module: nnx.Module, parameters: Parameters, dtype: str) -> Any:
    """A module like the given one with other parameters, cast to `dtype`."""
    graphdef, _, treedef = _split(module)
    return nnx.merge(graphdef, jax.tree.unflatten(treedef, _cast(parameters, dtype)))


def logits(
    module: Any, tokens_BT: Int[Array, "B T"], *, dropout: Callable[[jax.Array], jax.Array] = lambda x: x
) -> tuple[Float[Array, "B T V"], tuple[Routing, ...]]:
    """float32 logits after every token and the sparse layers' routings: `CausalLM.logits` with dropout.

    `dropout` is applied to the embedding and to what each attention and feed-forward part adds to the residual stream.
    """
    batch, length = tokens_BT.shape
    positions_BT = jnp.broadcast_to(jnp.arange(length), (batch, length))
    tables = module.rope.tables(positions_BT, jnp.full((batch,), length))
    x_BTD = dropout(_embedded(module.embedding, tokens_BT))
    routings = []
    for layer in module.layers:
        attended_BTD, _ = layer.attention.prefill(x_BTD, layer.attention_norm, tables, None)
        x_BTD = x_BTD + dropout(attended_BTD - x_BTD)
        normed_BTD = layer.feed_forward_norm(x_BTD)
        if isinstance(layer.feed_forward, MoE):
            fed_BTD, routing = layer.feed_forward(normed_BTD, implementation=DIFFERENTIABLE)
            routings.append(routing)
        else:
            fed_BTD = layer.feed_forward(normed_BTD)
        x_BTD = x_BTD + dropout(fed_BTD)
    head = module.embedding if module.head is None else module.head
    return head.logits(module.norm(x_BTD)), tuple(routings)


def load_balancing_loss(routing: Routing) -> Float[Array, ""]:
    """The auxiliary loss of arXiv:2101.03961, equations 4 to 6, for A experts per token: at least about A.

    E * sum over experts of (choices of e per token) * (mean probability of e). Of one layer: Hugging Face's
    `load_balancing_loss_func` pools the tokens of all layers first, where opposite imbalances cancel.
    Example: 2 experts, A = 1, both tokens choose expert 0 with probability 0.8: 2 * (1 * 0.8 + 0 * 0.2) = 1.6.
    """
    num_experts = routing.logits_TE.shape[1]
    chosen_TAE = jax.nn.one_hot(routing.experts_TA, num_experts)
    choices_E = chosen_TAE.sum(axis=1).mean(axis=0)
    probability_E = jax.nn.softmax(routing.logits_TE).mean(axis=0)
    return num_experts * jnp.sum(choices_E * probability_E)


def random_windows(text_X: Int[Array, "X"], batch: int, length: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Windows of a text that start anywhere, and the tokens that follow each of theirs."""
    starts_B = jax.random.randint(key, (batch,), 0, text_X.shape[0] - length)
    windows = text_X[starts_B[:, None] + jnp.arange(length + 1)]
    return windows[:, :-1], windows[:, 1:]


def windows(text_X: Int[np.ndarray, "X"], *, batch: int, length: int) -> Windows:
    """Cuts a text one window after the other, for `total_loss`; the last batch is padded."""
    count = -(-(len(text_X) - 1) // length)
    shape = (-(-count // batch), batch, length)
    padded = np.zeros(np.prod(shape) + 1, np.int32)
    padded[: len(text_X)] = text_X
    is_real = np.arange(len(padded) - 1) < len(text_X) - 1
    return Windows(padded[:-1].reshape(shape), padded[1:].reshape(shape), is_real.reshape(shape))


def total_loss(module: nnx.Module, text: Windows) -> float:
    """The summed loss of all tokens of a text, in nats, each window on its own; in the module's dtype, without dropout."""
    graphdef, parameters, treedef = _split(module)
    return float(_total_loss(graphdef, treedef)(parameters, text))


@functools.lru_cache(maxsize=16)
def _total_loss(graphdef, treedef):
    @jax.jit
    def run(parameters: Parameters, text: Windows) -> jax.Array:
        module = nnx.merge(graphdef, jax.tree.unflatten(treedef, parameters))

        def of_batch(batch: Windows) -> jax.Array:
            logits_BTV, _ = logits(module, jnp.asarray(batch.tokens_CBT))
            losses_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, batch.targets_CBT)
            return jnp.where(batch.is_real_CBT, losses_BT, 0.0).sum()

        return lax.map(of_batch, text).sum()

    return run


def _embedded(embedding: Embedding, tokens_BT: jax.Array) -> jax.Array:
    """A product with one-hot rows: its derivative sums in float32, where a gather's adds bfloat16 rows one by one."""
    weight_VD = embedding.weight_VD[...]
    one_hot_BTV = jax.nn.one_hot(tokens_BT, weight_VD.shape[0], dtype=weight_VD.dtype)
    return linear(one_hot_BTV, weight_VD.T)


class _Dropout:
    """Zeroes each element with probability `rate` and scales the others up; every call draws anew."""

    def __init__(self, rate: float, key: jax.Array):
        self._rate, self._key = rate, key

    def __call__(self, x: jax.Array) -> jax.Array:
        if self._rate == 0:
            return x
        self._key, key = jax.random.split(self._key)
        is_kept = jax.random.bernoulli(key, 1 - self._rate, x.shape)
        return jnp.where(is_kept, x / (1 - self._rate), 0).astype(x.dtype)


def _optimizer(recipe: Recipe) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, recipe.learning_rate, recipe.warmup_steps, recipe.steps, end_value=recipe.learning_rate / 10
    )

    def is_matrix(parameters):
        return jax.tree.map(lambda leaf: leaf.ndim > 1, parameters)

    return optax.chain(
        optax.clip_by_global_norm(recipe.gradient_norm),
        optax.adamw(schedule, b2=0.99, weight_decay=recipe.weight_decay, mask=is_matrix),
    )


def _split(module: nnx.Module) -> tuple[Any, Parameters, Any]:
    graphdef, state = nnx.split(module)
    leaves, treedef = jax.tree.flatten(state)
    return graphdef, tuple(leaves), treedef


def _cast(parameters: Parameters, dtype: str) -> Parameters:
    return tuple(leaf.astype(dtype) for leaf in parameters)
