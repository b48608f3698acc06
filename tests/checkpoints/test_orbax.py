"""Orbax checkpoints: round trip, resharding, and disagreements."""

import re

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.checkpoints import CheckpointError
from moe_jax.checkpoints.orbax import load_orbax, read_orbax_config, save_orbax


@pytest.fixture
def parameters(toy) -> dict[str, jax.Array]:
    return {path: jax.numpy.asarray(values, "bfloat16") for path, values in toy.parameters.items()}


def test_round_trip_is_bit_equal(toy, tmp_path, parameters):
    save_orbax(tmp_path / "saved", parameters, {"model_type": "toy", "rope": {"theta": 1e4}, "none": None})
    assert read_orbax_config(tmp_path / "saved") == {"model_type": "toy", "rope": {"theta": 1e4}, "none": None}
    mesh = jax.make_mesh((1,), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    loaded = load_orbax(tmp_path / "saved", toy.abstract("bfloat16", sharding))
    assert loaded.keys() == parameters.keys()
    for path, values in parameters.items():
        assert loaded[path].sharding == sharding
        np.testing.assert_array_equal(np.asarray(loaded[path]), np.asarray(values), strict=True)


def test_casts(toy, tmp_path, parameters):
    save_orbax(tmp_path / "saved", parameters, {})
    loaded = load_orbax(tmp_path / "saved", toy.abstract("float32"))
    np.testing.assert_array_equal(
        loaded["layers.0.moe.down_EDF"], np.asarray(parameters["layers.0.moe.down_EDF"], np.float32), strict=True
    )


def test_disagreements_are_told_together(toy, tmp_path, parameters):
    save_orbax(tmp_path / "saved", parameters, {})
    abstract = toy.abstract()
    abstract["new"] = jax.ShapeDtypeStruct((2,), "float32")
    abstract["layers.0.moe.down_EDF"] = jax.ShapeDtypeStruct((4, 8, 6), "float32")
    del abstract["embedding.weight_VD"]
    with pytest.raises(CheckpointError) as error:
        load_orbax(tmp_path / "saved", abstract)
    assert error.value.problems == (
        "missing: new [2]",
        "extra: embedding.weight_VD [16, 8]",
        "wrong shape: layers.0.moe.down_EDF, expected [4, 8, 6], got [4, 8, 5]",
    )


def test_paths_are_checked(toy, tmp_path, parameters):
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(CheckpointError, match=re.escape(f"expected a directory that save_orbax wrote, got {path}")):
            load_orbax(path, toy.abstract())
    with pytest.raises(ValueError, match="not to exist yet"):
        save_orbax(tmp_path, parameters, {})
