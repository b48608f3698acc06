"""Orbax checkpoints: round trip, resharding, and disagreements."""

import re
import shutil
import signal
import subprocess
import sys

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


def test_damaged_files_are_told_from_wrong_ones(tmp_path):
    whole, values = tmp_path / "whole", np.random.default_rng(0).normal(size=(256, 256)).astype(np.float32)
    save_orbax(whole, {"w": jax.numpy.asarray(values)}, {"model_type": "toy"})
    largest = max((file for file in whole.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    for file, message in (
        (largest, "all data of .*, got some that cannot be read"),
        (whole / "parameters" / "state" / "manifest.ocdbt", "a list of parameters in .*, got none that can be read"),
        (whole / "parameters" / "_CHECKPOINT_METADATA", "expected a model's config"),
    ):
        damaged = tmp_path / file.name
        shutil.copytree(whole, damaged)
        (damaged / file.relative_to(whole)).write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        with pytest.raises(CheckpointError, match=f"{message}.*missing or cut short"):
            read_orbax_config(damaged)
            load_orbax(damaged, {"w": jax.ShapeDtypeStruct(values.shape, values.dtype)})


def test_paths_are_checked(toy, tmp_path, parameters):
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(CheckpointError, match=re.escape(f"expected a directory that save_orbax wrote, got {path}")):
            load_orbax(path, toy.abstract())
    with pytest.raises(ValueError, match="to be a new or empty directory"):
        save_orbax(tmp_path, parameters, {})


def test_what_is_there_is_replaced_when_told(toy, tmp_path, parameters):
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    save_orbax(tmp_path / "saved", {"old": parameters["embedding.weight_VD"]}, {}, tokenizer_files=[tokenizer])
    save_orbax(tmp_path / "saved", parameters, {"new": True}, overwrite=True)
    assert read_orbax_config(tmp_path / "saved") == {"new": True}
    assert load_orbax(tmp_path / "saved", toy.abstract("bfloat16")).keys() == parameters.keys()
    assert [each.name for each in (tmp_path / "saved").iterdir()] == ["parameters"]
    assert not list(tmp_path.glob(".saved*"))


# A save over an earlier one, in a process that kills itself: when the first bytes are there, or when all are.
KILLED = """
import os, pathlib, signal, sys, threading
import jax, numpy as np
from moe_jax.checkpoints import orbax, save

directory, moment = pathlib.Path(sys.argv[1]), sys.argv[2]

def kill(*args):
    os.kill(os.getpid(), signal.SIGKILL)

def kill_at_first_bytes():
    while not any(file.is_file() for file in directory.with_name(".saved.incomplete").rglob("*")):
        pass
    kill()

if moment == "midway":
    threading.Thread(target=kill_at_first_bytes, daemon=True).start()
else:
    save._exchange = kill
orbax.save_orbax(directory, {"w": jax.numpy.ones((2048, 2048))}, {"save": 2}, overwrite=True)
"""


@pytest.mark.parametrize("moment", ["midway", "complete"])
def test_a_killed_save_leaves_the_previous_checkpoint(tmp_path, moment):
    directory = tmp_path / "saved"
    save_orbax(directory, {"w": jax.numpy.arange(6.0).reshape(2, 3)}, {"save": 1})
    process = subprocess.run([sys.executable, "-c", KILLED, directory, moment], capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert (tmp_path / ".saved.incomplete").exists()
    assert read_orbax_config(directory) == {"save": 1}
    loaded = load_orbax(directory, {"w": jax.ShapeDtypeStruct((2, 3), "float32")})
    np.testing.assert_array_equal(loaded["w"], np.arange(6.0).reshape(2, 3))
    save_orbax(directory, {"w": jax.numpy.zeros(1)}, {"save": 3}, overwrite=True)
    assert read_orbax_config(directory) == {"save": 3}
    assert [each.name for each in tmp_path.iterdir()] == ["saved"], "the next save removes what the killed one left"


MESHES = {
    "one axis": ((8,), ("a",), PartitionSpec("a")),
    "two axes": ((2, 4), ("a", "b"), PartitionSpec("b", "a")),
    "partly replicated": ((4, 2), ("a", "b"), PartitionSpec(None, "a")),
}


@pytest.mark.parametrize("saved", MESHES)
@pytest.mark.parametrize("restored", MESHES)
def test_one_mesh_to_another(tmp_path, saved, restored):
    def placement(name: str) -> NamedSharding:
        shape, axes, spec = MESHES[name]
        return NamedSharding(jax.make_mesh(shape, axes), spec)

    values = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    save_orbax(tmp_path / "saved", {"w": jax.device_put(values, placement(saved))}, {})
    abstract = jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=placement(restored))
    loaded = load_orbax(tmp_path / "saved", {"w": abstract})["w"]
    assert loaded.sharding == placement(restored)
    for shard in loaded.addressable_shards:
        np.testing.assert_array_equal(shard.data, values[shard.index])


# Peak memory of restoring a parameter of argv[2] MiB, saved in rows, in columns over eight devices.
RESTORES = """
import resource, sys
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from moe_jax.checkpoints.orbax import load_orbax, save_orbax

mesh = jax.make_mesh((8,), ("a",))
rows = int(sys.argv[2]) * 2**20 // 4 // 1024
if sys.argv[3] == "save":
    made = jax.jit(lambda: jnp.ones((rows, 1024)), out_shardings=NamedSharding(mesh, PartitionSpec("a")))()
    save_orbax(sys.argv[1], {"w": made}, {})
else:
    small = {"w": jax.ShapeDtypeStruct((8, 1024), "float32", sharding=NamedSharding(mesh, PartitionSpec("a")))}
    save_orbax(sys.argv[1] + "-small", {"w": jnp.ones((8, 1024))}, {})
    load_orbax(sys.argv[1] + "-small", small)  # what loading needs whatever the size
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    columns = NamedSharding(mesh, PartitionSpec(None, "a"))
    jax.block_until_ready(load_orbax(sys.argv[1], {"w": jax.ShapeDtypeStruct((rows, 1024), "float32", sharding=columns)}))
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_no_host_holds_a_whole_parameter_beside_its_shards(tmp_path):
    """Here the devices' memory is the host's: the shards themselves take the parameter's size once."""
    size_mib = 512

    def run(what: str) -> str:
        command = [sys.executable, "-c", RESTORES, tmp_path / "saved", str(size_mib), what]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    run("save")
    peak_mib = float(run("restore"))
    assert peak_mib < 1.6 * size_mib, "twice the size would be the parameter and a copy of it"
