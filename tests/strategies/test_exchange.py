"""Every way that tokens meet experts, on arrays: against a float64 definition, with routings chosen to be awkward."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

import sharding
from pallas_kernels import Routing, interpret
from pallas_kernels.experts import experts
from sharding.expert_parallel import NO_EXPERT

D, F, E, A = 16, 16, 8, 2
DIMENSIONS = (("experts", None, "expert_mlp", "embed"), ("experts", "embed", "expert_mlp"))
TOLERANCE = 1e-6  # of the largest value: float32 sums of some tens of terms in another order


def expert_fn(x_TD, experts_TA, weights_TA, up_EGFD, down_EDF):
    routing = Routing(weights_TA, experts_TA, jnp.zeros((len(x_TD), len(up_EGFD))))
    return experts(x_TD, routing, up_EGFD, down_EDF)


def weights(num_experts=E):
    rng = np.random.default_rng(0)
    up_EGFD, down_EDF = rng.normal(size=(num_experts, 2, F, D)), rng.normal(size=(num_experts, D, F))
    return (up_EGFD / 4).astype(np.float32), (down_EDF / 4).astype(np.float32)


def routed(name: str, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Experts and weights of routings: `uneven` leaves experts empty, `one` sends every first choice to expert 5."""
    rng = np.random.default_rng(1)
    experts_TA = np.stack([rng.permutation(E)[:A] for _ in range(tokens)])
    if name == "uneven":
        experts_TA = np.stack([rng.permutation(3)[:A] for _ in range(tokens)])
    elif name == "one":
        experts_TA = np.broadcast_to([5, NO_EXPERT], (tokens, A))
    weights_TA = np.where(experts_TA == NO_EXPERT, 0, rng.uniform(0.1, 1, (tokens, A)))
    return experts_TA.astype(np.int32), weights_TA.astype(np.float32)


def definition(x_TD, experts_TA, weights_TA, up_EGFD, down_EDF, is_kept_TA=None) -> np.ndarray:
    y_TD = np.zeros(x_TD.shape)
    for t, a in np.argwhere((experts_TA != NO_EXPERT) if is_kept_TA is None else is_kept_TA):
        up_GF = up_EGFD[experts_TA[t, a]].astype(np.float64) @ x_TD[t]
        hidden_F = up_GF[0] / (1 + np.exp(-up_GF[0])) * up_GF[1]
        y_TD[t] += weights_TA[t, a] * (down_EDF[experts_TA[t, a]] @ hidden_F)
    return y_TD


def run(mesh: str, strategy: str, x_TD, experts_TA, weights_TA, parameters, **options):
    exchange = sharding.plan_layout(sharding.make_mesh(mesh), strategy=strategy, **options).exchange()

    @jax.jit
    def layer(x_TD, experts_TA, weights_TA, *parameters):
        rows = (x_TD, experts_TA, weights_TA)
        return exchange.experts(expert_fn, *rows, *parameters, dimensions=DIMENSIONS, is_decode=False)

    return layer(x_TD, experts_TA, weights_TA, *parameters)


def close(y_TD, want_TD) -> bool:
    return np.abs(y_TD - want_TD).max() <= TOLERANCE * np.abs(want_TD).max()


@pytest.mark.parametrize("strategy", sharding.STRATEGIES)
def test_every_strategy_is_the_definition(strategy):
    """19 tokens: no mesh divides them. The routings keep experts, and with them whole devices, empty."""
    x_TD = np.random.default_rng(2).normal(size=(19, D)).astype(np.float32)
    for mesh, routing in (("ep=4,tp=2", "even"), ("ep=4,tp=2", "uneven"), ("dp=2,ep=2,tp=2", "one"), ("ep=8", "one")):
        rows, parameters = (x_TD, *routed(routing, 19)), weights()
        y_TD, is_kept_TA = run(mesh, strategy, *rows, parameters)
        assert close(y_TD, definition(*rows, *parameters)), (mesh, routing)
        np.testing.assert_array_equal(is_kept_TA, rows[1] != NO_EXPERT)


def test_a_capacity_keeps_the_first_tokens_and_says_which():
    """8 devices, 2 tokens each, all to expert 5: with room for one row a trip, each device's second token is dropped."""
    x_TD = np.random.default_rng(2).normal(size=(16, D)).astype(np.float32)
    rows, parameters = (x_TD, *routed("one", 16)), weights()
    y_TD, is_kept_TA = run("ep=8", "ep_a2a", *rows, parameters, capacity_factor=1.0)
    np.testing.assert_array_equal(is_kept_TA[:, 0], np.arange(16) % 2 == 0)
    assert not is_kept_TA[:, 1].any()
    assert close(y_TD, definition(*rows, *parameters, is_kept_TA=np.asarray(is_kept_TA)))


def test_a_generous_capacity_drops_nothing():
    x_TD = np.random.default_rng(2).normal(size=(16, D)).astype(np.float32)
    rows = (x_TD, *routed("one", 16))
    _, is_kept_TA = run("ep=4,tp=2", "eptp_dp", *rows, weights(), capacity_factor=4.0)
    np.testing.assert_array_equal(is_kept_TA, rows[1] != NO_EXPERT)


def test_ragged_rows_travel_by_xla_on_a_gpu():
    """The emulation is for CPUs only: lowered for CUDA, the same program holds the collective itself."""
    exchange = sharding.plan_layout(sharding.make_mesh("ep=8"), strategy="ep_ragged").exchange()

    def layer(*rows_and_parameters):
        return exchange.experts(expert_fn, *rows_and_parameters, dimensions=DIMENSIONS, is_decode=False)

    operands = (np.zeros((16, D), np.float32), *routed("even", 16), *weights())
    traced = jax.jit(layer).trace(*operands)
    assert "ragged_all_to_all" in traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "ragged_all_to_all" not in traced.lower(lowering_platforms=("cpu",)).as_text()


@pytest.mark.parametrize("strategy", ["ep_psum", "ep_a2a"])
def test_interpreted_kernels_inside_shard_map(strategy, monkeypatch):
    """The decode kernel on a range of the experts, as a GPU of the mesh runs it."""
    # The interpreter's check of itself: the device that is done first finds the barriers of the other still allocated.
    monkeypatch.setattr(gpu_callbacks, "call_assert_no_barriers_allocated", lambda token: token)
    rng = np.random.default_rng(3)
    D, F, E, T = 128, 128, 4, 4
    up_EGFD, down_EDF = (jnp.asarray(rng.normal(size=shape) / 8, jnp.bfloat16) for shape in ((E, 2, F, D), (E, D, F)))
    x_TD = jnp.asarray(rng.normal(size=(T, D)), jnp.bfloat16)
    rows = (x_TD, np.array([[0, 3], [3, 1], [1, 3], [3, 0]], np.int32), np.full((T, 2), 0.5, np.float32))
    seen = []

    def kernel(x_TD, experts_TA, weights_TA, up_EGFD, down_EDF):
        seen.append(up_EGFD.shape[0])
        routing = Routing(weights_TA, experts_TA, jnp.zeros((len(x_TD), len(up_EGFD))))
        return experts(x_TD, routing, up_EGFD, down_EDF, implementation="decode")

    exchange = sharding.plan_layout(sharding.make_mesh("ep=2"), strategy=strategy).exchange()
    with interpret.interpreting():
        y_TD, _ = jax.block_until_ready(
            jax.jit(lambda *each: exchange.experts(kernel, *each, dimensions=DIMENSIONS, is_decode=True))(
                *rows, up_EGFD, down_EDF
            )
        )
    assert set(seen) == {2}
    want_TD = definition(np.asarray(x_TD, np.float32), *rows[1:], np.asarray(up_EGFD), np.asarray(down_EDF))
    # bfloat16: hidden values, each device's part and the result are rounded to 8 bits.
    assert np.abs(np.asarray(y_TD, np.float32) - want_TD).max() <= 0.02 * np.abs(want_TD).max()
