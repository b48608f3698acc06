"""The ways of `logits`, each with the numbers of the plain one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.layers.linear import MOST_ROWS_NORMALISED_OFTEN, logits
from moe_jax.layers.norm import RMSNorm
from pallas_kernels import dispatch

# It has no kernels of ours: XLA sums one row up there, and multiplies several.
OTHER_GPU = dispatch.Device("gpu", "NVIDIA A100", 108)


@pytest.mark.parametrize("rows", [1, 3, MOST_ROWS_NORMALISED_OFTEN + 1])
@pytest.mark.parametrize("has_norm", [False, True])
def test_logits_of_few_and_many_rows(rows: int, has_norm: bool) -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    x_BTD, weight_VD = jax.random.normal(keys[0], (rows, 1, 64)), jax.random.normal(keys[1], (37, 64))
    norm = RMSNorm(64, epsilon=1e-6, dtype=jnp.float32)
    norm.weight_D = nnx.Param(jax.random.uniform(keys[2], (64,), minval=0.5, maxval=1.5))
    with dispatch.compiling_for(OTHER_GPU):
        got_BTV = logits(x_BTD, weight_VD, norm=norm if has_norm else None)
    assert got_BTV.dtype == jnp.float32 and got_BTV.shape == (rows, 1, 37)
    exact_BTD = np.asarray(norm(x_BTD) if has_norm else x_BTD, np.float64)
    # Sums of 64 float32 products, in any order.
    np.testing.assert_allclose(got_BTV, exact_BTD @ np.asarray(weight_VD, np.float64).T, rtol=1e-5, atol=1e-5)
