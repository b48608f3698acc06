"""The loader: values, casts, and every way in which files and model can disagree, several at once."""

import re

import jax
import ml_dtypes
import numpy as np
import pytest

from moe_jax.checkpoints import CheckpointError, Copy, Rule, load_parameters


def _assert_same(loaded, toy, dtype=np.float32):
    assert loaded.keys() == toy.parameters.keys()
    for path, expected in toy.parameters.items():
        np.testing.assert_array_equal(np.asarray(loaded[path]), expected.astype(dtype), strict=True)


@pytest.mark.parametrize("spelling", ["one by one", "fused", "sharded"])
def test_both_spellings_and_shards_give_the_same(toy, spelling):
    if spelling == "sharded":
        toy.write_shards()
    else:
        toy.write(toy.fused() if spelling == "fused" else toy.tensors)
    _assert_same(load_parameters(toy.directory, toy.abstract(), toy.rules), toy)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_casts(toy, dtype):
    _assert_same(load_parameters(toy.write(), toy.abstract(dtype), toy.rules), toy, np.dtype(dtype))


def test_arrays_do_not_depend_on_the_files(toy):
    toy.write()
    loaded = load_parameters(toy.directory, toy.abstract(), toy.rules)
    (toy.directory / "model.safetensors").write_bytes(b"")
    _assert_same(loaded, toy)


def test_eight_bit_floats_load_as_they_are_and_are_not_cast(toy):
    eight_bit = {name: values.astype(ml_dtypes.float8_e4m3fn) for name, values in toy.tensors.items()}
    toy.write(eight_bit)
    _assert_same(load_parameters(toy.directory, toy.abstract("float8_e4m3fn"), toy.rules), toy, ml_dtypes.float8_e4m3fn)
    with pytest.raises(
        CheckpointError, match=r"o_proj.weight, expected bfloat16 or a floating dtype .* got float8_e4m3fn"
    ):
        load_parameters(toy.directory, toy.abstract("bfloat16"), toy.rules)


def test_scalars_and_empty_parameters(toy):
    toy.write({"scale": np.array(3, np.float32), "empty": np.zeros((0, 2), np.float32)})
    abstract = {"s": jax.ShapeDtypeStruct((), "float32"), "e": jax.ShapeDtypeStruct((0, 2), "float32")}
    loaded = load_parameters(toy.directory, abstract, [Rule("scale", "s"), Rule("empty", "e")])
    assert loaded["s"] == 3
    assert loaded["e"].shape == (0, 2)


def test_ignored_tensors_are_allowed(toy):
    toy.tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    _assert_same(load_parameters(toy.write(), toy.abstract(), toy.rules), toy)


def test_everything_wrong_is_in_one_message(toy):
    del toy.tensors["model.layers.0.mlp.experts.2.up_proj.weight"]
    toy.tensors["model.layers.1.mlp.experts.4.up_proj.weight"] = np.zeros((5, 8), np.float32)
    toy.tensors["model.layers.0.self_attn.q_proj.weight"] = np.zeros((8, 6), np.float32)
    toy.tensors["model.layers.1.self_attn.o_proj.weight"] = np.zeros((8, 6), np.int32)
    toy.tensors["model.layers.1.mlp.experts.down_proj"] = toy.parameters["layers.1.moe.down_EDF"]
    with pytest.raises(CheckpointError) as error:
        load_parameters(toy.write(), toy.abstract(), toy.rules)
    assert str(error.value) == "\n".join(
        [
            f"{toy.directory} does not hold exactly this model's tensors",
            "  missing: model.layers.0.mlp.experts.2.up_proj.weight [5, 8]",
            "  extra: model.layers.1.mlp.experts.4.up_proj.weight [5, 8]",
            "  twice: layers.1.moe.down_EDF, by model.layers.1.mlp.experts.0.down_proj.weight "
            "and by model.layers.1.mlp.experts.down_proj",
            "  wrong shape: model.layers.0.self_attn.q_proj.weight, expected [6, 8], got [8, 6]",
            "  wrong dtype: model.layers.1.self_attn.o_proj.weight, expected float32 or a floating dtype "
            "of 16 bits or more to cast, got int32",
        ]
    )
    assert len(error.value.problems) == 5


def test_long_lists_are_counted(toy):
    toy.write({f"extra.{number}": np.zeros(1, np.float32) for number in range(100)})
    with pytest.raises(CheckpointError) as error:
        load_parameters(toy.directory, toy.abstract(), toy.rules)
    message = str(error.value)
    assert "missing: 9 more, 29 in all" in message
    assert "extra: 80 more, 100 in all" in message
    assert message.count("\n") == 42
    assert len(error.value.problems) == 129


def test_broken_shards_and_wrong_tensors_are_told_together(toy):
    toy.tensors["model.layers.0.self_attn.q_proj.weight"] = np.zeros((8, 6), np.float32)
    toy.write_shards()
    shard = toy.directory / "1.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(CheckpointError) as error:
        load_parameters(toy.directory, toy.abstract(), toy.rules)
    size_bytes = shard.stat().st_size
    truncated, wrong_shape = error.value.problems
    assert (
        f"file: 1.safetensors: truncated, expected {size_bytes + 10} bytes, got {size_bytes}; incomplete: " in truncated
    )
    assert wrong_shape == "wrong shape: model.layers.0.self_attn.q_proj.weight, expected [6, 8], got [8, 6]"


def test_missing_shards_are_all_named_and_their_tensors_are_not(toy):
    toy.write_shards()
    for shard in ("0.safetensors", "1.safetensors"):
        (toy.directory / shard).unlink()
    with pytest.raises(CheckpointError) as error:
        load_parameters(toy.directory, toy.abstract(), toy.rules)
    assert error.value.problems == (
        "file: 0.safetensors: missing file, listed by model.safetensors.index.json",
        "file: 1.safetensors: missing file, listed by model.safetensors.index.json",
    )


def test_a_file_without_header_is_the_only_problem(toy):
    (toy.directory / "model.safetensors").write_bytes(b"<html>")
    with pytest.raises(CheckpointError) as error:
        load_parameters(toy.directory, toy.abstract(), toy.rules)
    assert error.value.problems == ("file: model.safetensors: truncated, expected at least 8 bytes, got 6",)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_that_are_not_finite_are_named_on_request(toy, dtype):
    toy.tensors["model.layers.1.mlp.experts.3.up_proj.weight"][4, 7] = np.nan
    toy.tensors["model.embed_tokens.weight"][0, 0] = -np.inf
    toy.write()
    load_parameters(toy.directory, toy.abstract(dtype), toy.rules)
    with pytest.raises(CheckpointError) as error:
        load_parameters(toy.directory, toy.abstract(dtype), toy.rules, check_finite=True)
    assert error.value.problems == (
        "NaN or infinite: model.embed_tokens.weight",
        "NaN or infinite: model.layers.1.mlp.experts.3.up_proj.weight",
    )


def test_tied_copies_are_compared(toy):
    toy.tensors["lm_head.weight"] = toy.tensors["model.embed_tokens.weight"].copy()
    _assert_same(load_parameters(toy.write(), toy.abstract(), toy.rules), toy)
    toy.tensors["lm_head.weight"][3, 3] += 1e-3
    expected = re.escape("differs: lm_head.weight from model.embed_tokens.weight")
    with pytest.raises(CheckpointError, match=f"ties to others but that differ.*\n.*{expected}"):
        load_parameters(toy.write(), toy.abstract(), toy.rules)
    toy.tensors["lm_head.weight"] = toy.tensors["model.embed_tokens.weight"].astype(np.float16)
    with pytest.raises(CheckpointError, match=expected):
        load_parameters(toy.write(), toy.abstract(), toy.rules)


def test_a_tied_copy_alone_fills_the_parameter(toy):
    toy.tensors["lm_head.weight"] = toy.tensors.pop("model.embed_tokens.weight")
    _assert_same(load_parameters(toy.write(), toy.abstract(), toy.rules), toy)
    toy.tensors["lm_head.weight"] = np.zeros((3, 8), np.float32)
    with pytest.raises(CheckpointError, match=r"wrong shape: lm_head.weight, expected \[16, 8\], got \[3, 8\]"):
        load_parameters(toy.write(), toy.abstract(), toy.rules)


def test_tables_that_use_a_tensor_twice_are_refused(toy):
    rules = [Rule("w", "a"), Copy("w", "b"), Rule("v", "b")]
    abstract = {name: jax.ShapeDtypeStruct((2,), "float32") for name in "ab"}
    with pytest.raises(ValueError, match="the rules let w fill both a and b"):
        load_parameters(toy.write(), abstract, rules)
