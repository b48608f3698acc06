"""Expert capacity by hand."""

import jax.numpy as jnp
import numpy as np

from moe_jax.layers.moe import DROPPED, dropped_over_capacity
from pallas_kernels import Routing
from pallas_kernels.route.api import DecodePlan


def test_capacity_is_counted_per_sequence_in_order():
    """Two sequences of four tokens, three experts, room for two: the third token of expert 0 in the first one is dropped."""
    experts_TA = jnp.array([[0], [0], [1], [0], [0], [2], [2], [0]])
    plan = DecodePlan(jnp.ones((3, 8)), jnp.arange(3), jnp.array([3]))
    routing = Routing(jnp.arange(1.0, 9.0)[:, None], experts_TA, jnp.zeros((8, 3)), plan=plan)
    kept = dropped_over_capacity(routing, batch=2, capacity=2)
    np.testing.assert_array_equal(kept.experts_TA[:, 0], [0, 0, 1, DROPPED, 0, 2, 2, 0])
    np.testing.assert_array_equal(kept.weights_TA[:, 0], [1, 2, 3, 0, 5, 6, 7, 8])
    # A plan made before the drop would still send the token.
    assert kept.plan is None
    assert kept.places is None
