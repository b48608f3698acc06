"""All families under every strategy, on eight devices, against the model on one."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import moe_jax
import sharding

sys.path.insert(0, str(Path(__file__).parent))
import families

# float32 sums in another order: one rounding is 6e-8 of a value, and a model adds up some tens of them.
TOLERANCE = 1e-6
MESHES = ("ep=4,tp=2", "dp=2,ep=2,tp=2", "ep=8", "ep=2,tp=4", "tp=8", "dp=2,ep=4", "dp=4,tp=2")
# Prefill and decode; over the families every strategy is both.
PAIRS = {
    "mixtral": ("ep_psum/ep_agrs", "eptp_dp/eptp_psum"),
    "olmoe": ("ep_agrs/ep_a2a", "tp"),
    "qwen2_moe": ("ep_a2a/ep_ragged", "eptp_dp"),
    "qwen3_moe": ("ep_ragged/ep_psum", "eptp_psum"),
    "switch_transformers": ("ep_ragged/ep_a2a", "eptp_psum/eptp_dp"),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return families.saved(tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="module", params=families.CONFIGS)
def model_type(request):
    return request.param


@pytest.fixture(scope="module")
def alone(directory, model_type):
    """The model on one device."""
    return moe_jax.load(directory / model_type, dtype="float32")


@pytest.fixture(scope="module")
def logits_XV(alone):
    return families.logits(alone)


@pytest.mark.parametrize("strategy", sharding.STRATEGIES)
def test_logits(directory, model_type, logits_XV, strategy):
    # Each family meets each strategy on another mesh.
    mesh = MESHES[(list(sharding.STRATEGIES).index(strategy) + list(families.CONFIGS).index(model_type)) % len(MESHES)]
    split = moe_jax.load(directory / model_type, dtype="float32", mesh=mesh, strategy=strategy)
    error = np.abs(families.logits(split) - logits_XV).max() / np.abs(logits_XV).max()
    assert error <= TOLERANCE, f"on {mesh}"


def test_tokens_and_routing(directory, model_type, alone):
    want = families.generated(alone)
    for strategy, mesh in zip(PAIRS[model_type], ("ep=4,tp=2", "dp=2,ep=2,tp=2"), strict=True):
        out = families.generated(moe_jax.load(directory / model_type, dtype="float32", mesh=mesh, strategy=strategy))
        np.testing.assert_array_equal(out.tokens, want.tokens, err_msg=strategy)
        np.testing.assert_array_equal(out.routing.experts_BLUA, want.routing.experts_BLUA)
        for request, prompt in enumerate(families.PROMPTS):
            experts_LTA, want_LTA = (
                each.routing.prompt_experts_BLTA[request, :, : len(prompt)] for each in (out, want)
            )
            np.testing.assert_array_equal(experts_LTA, want_LTA)


def test_bfloat16_is_off_by_reordering_only(directory):
    """Parts are rounded to 8 bits before they are summed: an ulp of the largest value is 0.4 %, a few add up."""
    alone = moe_jax.load(directory / "olmoe", dtype="bfloat16")
    want_XV = families.logits(alone)
    for strategy in ("eptp_psum", "ep_a2a"):
        split = moe_jax.load(directory / "olmoe", dtype="bfloat16", mesh="ep=2,tp=2", strategy=strategy)
        assert np.abs(families.logits(split) - want_XV).max() <= 0.02 * np.abs(want_XV).max()
