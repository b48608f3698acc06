"""Training on a tiny model: the losses against arithmetic by hand, and that a few steps help."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax
from moe_jax import training
from moe_jax.testing import random_model
from pallas_kernels import Routing

CONFIG = {
    "model_type": "mixtral",
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": True,
}
RECIPE = training.Recipe(
    steps=40, batch=4, length=16, learning_rate=1e-2, warmup_steps=4, dropout=0.0, compute_dtype="float32"
)
# Every token says which comes next: a model that learns gets far below log(32) = 3.47 nats.
TEXT_X = np.arange(640, dtype=np.int32) * 5 % 32


def routing(experts_TA, logits_TE) -> Routing:
    return Routing(jnp.ones(np.shape(experts_TA)), jnp.asarray(experts_TA), jnp.asarray(logits_TE, jnp.float32))


def test_load_balancing_loss_by_hand():
    # Probabilities (0.8, 0.2) twice, both tokens to expert 0: 2 * (1 * 0.8 + 0 * 0.2).
    logits_TE = np.log([[0.8, 0.2], [0.8, 0.2]])
    np.testing.assert_allclose(training.load_balancing_loss(routing([[0], [0]], logits_TE)), 1.6, rtol=1e-6)

    # Three experts, two each. Choices per token: (1, 1/2, 1/2); mean probabilities: (0.5, 0.25, 0.25).
    logits_TE = np.log([[0.6, 0.3, 0.1], [0.4, 0.2, 0.4]])
    want = 3 * (1 * 0.5 + 0.5 * 0.25 + 0.5 * 0.25)
    np.testing.assert_allclose(training.load_balancing_loss(routing([[0, 1], [2, 0]], logits_TE)), want, rtol=1e-6)


def test_load_balancing_loss_of_equal_shares_is_the_number_of_active_experts():
    experts_TA = [[0, 1], [2, 3]]
    np.testing.assert_allclose(training.load_balancing_loss(routing(experts_TA, np.zeros((2, 4)))), 2.0, rtol=1e-6)


def test_logits_without_dropout_are_the_model_s():
    model = random_model(CONFIG)
    tokens_BT = TEXT_X[:32].reshape(2, 16)
    logits_BTV, routings = training.logits(model.module, jnp.asarray(tokens_BT))
    np.testing.assert_allclose(logits_BTV, moe_jax.logits(model, tokens_BT), rtol=1e-5, atol=1e-6)
    assert [each.experts_TA.shape for each in routings] == [(32, 2)] * 2


@pytest.mark.parametrize("length", [7, 16, 639])
def test_windows_predict_every_token_but_the_first_once(length: int):
    cut = training.windows(TEXT_X, batch=3, length=length)
    np.testing.assert_array_equal(cut.tokens_CBT[cut.is_real_CBT], TEXT_X[:-1])
    np.testing.assert_array_equal(cut.targets_CBT[cut.is_real_CBT], TEXT_X[1:])
    assert cut.tokens_CBT.shape[1:] == (3, length)


def test_total_loss_sums_over_real_tokens():
    model = random_model(CONFIG)
    total = training.total_loss(model.module, training.windows(TEXT_X[:20], batch=3, length=16))
    # Two windows: tokens 0 to 15, and 16 to 18 with nothing before them.
    losses = [
        -jax.nn.log_softmax(moe_jax.logits(model, TEXT_X[None, start:end])[0])[
            np.arange(end - start), TEXT_X[start + 1 : end + 1]
        ]
        for start, end in ((0, 16), (16, 19))
    ]
    np.testing.assert_allclose(total, np.concatenate(losses).sum(), rtol=1e-5)


@pytest.mark.parametrize("num_experts, active", [(4, 2), (1, 1)])
def test_steps_reduce_the_loss_of_sparse_and_dense_models(num_experts: int, active: int):
    config = {**CONFIG, "num_local_experts": num_experts, "num_experts_per_tok": active}
    module = random_model(config).module
    held_out = training.windows(TEXT_X[:65], batch=4, length=16)
    before = training.total_loss(module, held_out) / 64

    step, state = training.trainer(module, RECIPE, seed=0)
    for _ in range(RECIPE.steps):
        state, losses = step(state, jnp.asarray(TEXT_X))
    after = training.total_loss(training.with_parameters(module, state.parameters, "float32"), held_out) / 64

    assert before == pytest.approx(np.log(32), abs=0.05)
    assert after < 1.0
    assert float(losses.balance) >= 0.95 * active


def test_dropout_disturbs_training_only():
    module = random_model(CONFIG).module
    first_losses = []
    for rate in (0.0, 0.5):
        step, state = training.trainer(module, dataclasses.replace(RECIPE, dropout=rate), seed=0)
        _, losses = step(state, jnp.asarray(TEXT_X))
        first_losses.append(float(losses.next_token))
    assert first_losses[0] != first_losses[1]
    text = training.windows(TEXT_X[:65], batch=4, length=16)
    assert training.total_loss(module, text) == training.total_loss(module, text)
