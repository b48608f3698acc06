"""Saving is loading backwards, all or nothing."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from moe_jax.checkpoints import load_parameters, save, save_parameters


def _saved(toy, directory, **options):
    save_parameters(directory, toy.parameters, toy.rules, config={"model_type": "toy"}, **options)
    return directory


def test_writes_the_hub_spelling_that_others_read(toy, tmp_path):
    directory = _saved(toy, tmp_path / "new" / "saved")
    assert {file.name for file in directory.iterdir()} == {"config.json", "model.safetensors"}
    assert json.loads((directory / "config.json").read_text()) == {"model_type": "toy"}
    written = load_file(directory / "model.safetensors")
    assert written.keys() == toy.tensors.keys()
    for name, expected in toy.tensors.items():
        np.testing.assert_array_equal(written[name], expected, strict=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("spelling", ["one by one", "fused"])
def test_round_trip_is_bit_equal(toy, tmp_path, dtype, spelling):
    toy.write(toy.fused() if spelling == "fused" else toy.tensors)
    loaded = load_parameters(toy.directory, toy.abstract(dtype), toy.rules)
    save_parameters(tmp_path / "saved", loaded, toy.rules, config={})
    again = load_parameters(tmp_path / "saved", toy.abstract(dtype), toy.rules)
    for path, values in loaded.items():
        np.testing.assert_array_equal(np.asarray(values).view(np.uint8), np.asarray(again[path]).view(np.uint8))


def test_shards_hold_at_most_their_bytes(toy, tmp_path):
    directory = _saved(toy, tmp_path / "saved", max_shard_bytes=1000)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    shards = sorted(directory.glob("*.safetensors"))
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    sizes = [sum(values.nbytes for values in load_file(shard).values()) for shard in shards]
    assert max(sizes) <= 1000
    assert sum(sizes) == index["metadata"]["total_size"]
    loaded = load_parameters(directory, toy.abstract(), toy.rules)
    np.testing.assert_array_equal(loaded["layers.1.moe.up_EGFD"], toy.parameters["layers.1.moe.up_EGFD"])


def test_wide_dtypes_come_first_so_that_all_are_aligned(toy, tmp_path):
    odd = {"a": np.ones(3, np.float16), "b": np.ones(2, np.float32)}
    rules = [save.Rule(name, name) for name in odd]
    save_parameters(tmp_path / "saved", odd, rules, config={})
    text = (tmp_path / "saved" / "model.safetensors").read_bytes()
    header = json.loads(text[8 : 8 + int.from_bytes(text[:8], "little")])
    assert header["b"]["data_offsets"] == [0, 8]
    assert header["a"]["data_offsets"] == [8, 14]


def test_tokenizer_files_are_copied(toy, tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    assert (_saved(toy, tmp_path / "saved", tokenizer_files=[file]) / "tokenizer.json").read_text() == "{}"


def test_what_is_there_stays_unless_told(toy, tmp_path):
    directory = tmp_path / "saved"
    directory.mkdir()
    _saved(toy, directory)
    with pytest.raises(ValueError, match=r"saved to be a new or empty directory.* or pass overwrite=True"):
        _saved(toy, directory)
    (directory / "old").touch()
    _saved(toy, directory, overwrite=True)
    assert not (directory / "old").exists()
    assert [each.name for each in sorted(tmp_path.iterdir())] == ["saved", "toy"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_that_fails_leaves_nothing_half_written(toy, tmp_path, monkeypatch, overwrite):
    directory = tmp_path / "saved"
    if overwrite:
        _saved(toy, directory)
    before = {file: file.read_bytes() for file in directory.glob("*")}

    def full_disk(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(save, "write", full_disk)
    with pytest.raises(OSError, match="no space left"):
        _saved(toy, directory, overwrite=overwrite)
    assert {file: file.read_bytes() for file in directory.glob("*")} == before
    assert [each.name for each in sorted(tmp_path.iterdir())] == (["saved", "toy"] if overwrite else ["toy"])


def test_parameters_without_a_rule_are_named(toy, tmp_path):
    with pytest.raises(ValueError, match="no rule fills the parameter stray"):
        save_parameters(tmp_path / "saved", {"stray": np.ones(2)}, toy.rules, config={})
    assert not (tmp_path / "saved").exists()
