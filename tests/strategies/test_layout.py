"""What a mesh and a strategy make of a model: places, fillings, refusals; one device as if there were no mesh."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import moe_jax
import sharding
from moe_jax.model import parameters
from moe_jax.program import Record, compiled_for
from moe_jax.sampling import Filters

sys.path.insert(0, str(Path(__file__).parent))
import families


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return families.saved(tmp_path_factory.mktemp("families"))


def layout(mesh: str, **choices) -> sharding.Layout:
    return sharding.plan_layout(sharding.make_mesh(mesh), **choices)


UP = ("experts", None, "expert_mlp", "embed")


@pytest.mark.parametrize(
    "strategy, spec, padded",
    [
        ("tp", P(None, None, ("ep", "tp"), None), 6),
        ("ep_agrs", P(("ep", "tp"), None, None, None), 8),
        ("eptp_dp", P("ep", None, "tp", None), 8),
    ],
)
def test_places_of_experts(strategy, spec, padded):
    """6 experts: on 8 devices, or 4, two more are empty."""
    place = layout("ep=4,tp=2", strategy=strategy).placement("up_EGFD", UP, (6, 2, 16, 32))
    assert place.sharding.spec == spec
    assert place.padded_shape == (padded, 2, 16, 32)


def test_heads_go_as_far_as_they_divide():
    """2 key/value heads on 4 x 2 devices: not even the first axis divides them, so all have both; 4 are split over ep."""
    of = layout("ep=4,tp=2", attention="tp")
    dimensions = ("kv_heads", None, "embed")
    assert of.placement("k_KHD", dimensions, (2, 8, 32)).sharding.spec == P(None, None, None)
    assert of.placement("k_KHD", dimensions, (4, 8, 32)).sharding.spec == P("ep", None, None)
    assert of.cache_sharding((3, 8, 64, 8)).spec == P(("dp",), ("ep", "tp"))
    by_requests = layout("ep=4,tp=2", attention="dp")
    assert by_requests.cache_sharding((8, 8, 64, 8)).spec == P(("dp", "ep", "tp"), None)
    assert by_requests.cache_sharding((3, 8, 64, 8)).spec == P(("dp",), None)


@pytest.mark.parametrize(
    "choices, message",
    [
        (dict(strategy="magic"), "expected strategy to be one of tp, ep_psum, .*got 'magic'"),
        (dict(strategy="ep_agrs/tp"), "keep different weights .* decode can use ep_psum, ep_agrs, ep_a2a, ep_ragged"),
        (dict(strategy="ep_agrs/ep_psum/tp"), "or two of them for prefill and decode"),
        (dict(attention="pp"), "expected attention to be one of tp, dp, got 'pp'"),
        (dict(capacity_factor=1.5), "only ep_a2a, eptp_dp have a capacity, got eptp_psum"),
        (dict(strategy="ep_a2a", capacity_factor=0), "positive number, or None for lossless, got 0"),
    ],
)
def test_refused_choices(choices, message):
    with pytest.raises(ValueError, match=message):
        layout("ep=4,tp=2", **choices)


def test_strategies_that_place_alike_on_a_mesh_mix():
    """Without tp, experts over ("ep", "tp") and over ("ep",) are the same."""
    chosen = layout("ep=8", strategy="ep_agrs/eptp_psum")
    assert (chosen.prefill.name, chosen.decode.name) == ("ep_agrs", "eptp_psum")


@pytest.mark.parametrize(
    "name, dimensions, shape, message",
    [
        ("q_NHD", ("q_heads", None, "embed"), (6, 8, 32), 'q_heads has 6 entries.*ep x tp.*or attention="dp"'),
        ("down_EDF", ("experts", "embed", "expert_mlp"), (8, 32, 15), "expert_mlp has 15 .*splits whole experts"),
        ("x", ("flavour",), (8,), "unknown dimension 'flavour'"),
    ],
)
def test_refused_parameters(name, dimensions, shape, message):
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        layout("ep=4,tp=2").placement(name, dimensions, shape)


def test_one_device_is_no_mesh(directory):
    """A mesh of one device compiles the very same program: it cannot cost anything."""
    model = moe_jax.load(directory / "olmoe", dtype="float32", mesh="dp=1,ep=1,tp=1", strategy="ep_a2a")
    plain = moe_jax.load(directory / "olmoe", dtype="float32")
    assert model.layout is None
    for name, values in parameters(model.module).items():
        assert values.sharding == parameters(plain.module)[name].sharding
    assert model.module.layers[0].feed_forward.exchange is None


def test_a_split_model_is_saved_without_its_empty_experts(directory, tmp_path):
    split = moe_jax.load(directory / "mixtral", dtype="float32", mesh="ep=4,tp=2", strategy="ep_psum")
    assert parameters(split.module)["layers.0.feed_forward.up_EGFD"].shape[0] == 8
    plain = moe_jax.load(directory / "mixtral", dtype="float32")
    assert split.num_parameters == plain.num_parameters
    moe_jax.save(split, tmp_path / "hf")
    moe_jax.save_orbax(split, tmp_path / "orbax")
    for again in (
        moe_jax.load(tmp_path / "hf", dtype="float32"),
        moe_jax.load_orbax(tmp_path / "orbax", dtype="float32"),
    ):
        for name, values in parameters(again.module).items():
            np.testing.assert_array_equal(values, parameters(plain.module)[name])


def test_a_capacity_drops_choices_and_shows_them(directory):
    """The prompt's padding is routed too, so how many are dropped depends on it; that some are, and are shown, does not."""
    mesh = dict(dtype="float32", mesh="ep=8", strategy="ep_a2a")
    lossless = families.generated(moe_jax.load(directory / "olmoe", **mesh))
    assert (lossless.routing.prompt_experts_BLTA >= 0).all()
    dropping = families.generated(moe_jax.load(directory / "olmoe", **mesh, capacity_factor=0.25))
    is_dropped_BLTA = dropping.routing.prompt_experts_BLTA == -1
    assert is_dropped_BLTA.any()
    assert (dropping.routing.prompt_weights_BLTA[is_dropped_BLTA] == 0).all()


def test_a_mesh_of_one_device_runs_the_very_programs_of_no_mesh():
    """Being shardable costs one device nothing: the jitted functions are the same objects, with no layout in them."""
    greedy = Filters(samples=False, sorts=False, min_p=False, repetition=False)
    meshes = (None, "dp=1,ep=1,tp=1")
    models = [moe_jax.load("shakespeare", dtype="float32", mesh=mesh) for mesh in meshes]
    programs = [compiled_for(model, greedy, Record())[1] for model in models]
    assert programs[0] is programs[1]
