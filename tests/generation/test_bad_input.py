"""What users get wrong, and the message that tells them: expected, got, what to try."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("", {}, "expected a prompt of at least one character, got an empty one"),
        (["fine", ""], {}, "expected a prompt of at least one character"),
        ([], {}, "expected at least one prompt, got an empty list"),
        ([[]], {}, "expected a prompt of at least one token, got an empty one"),
        ([[5, 300, -2]], {}, r"expected token ids from 0 to 95 \(the vocabulary\), got \[-2, 300\]"),
        (
            "x" * 250,
            {},
            r"within the context of 256 positions, got 250 \+ 64: shorten the prompt or lower max_new_tokens",
        ),
        ("x", dict(max_new_tokens=0), "expected max_new_tokens to be a whole number of at least 1, got 0"),
        ("x", dict(max_new_tokens=1.5), "expected max_new_tokens to be a whole number of at least 1, got 1.5"),
        ("x", dict(stop=""), "expected stop strings of at least one character"),
        ("x", dict(stop_token_ids=[999]), r"expected stop_token_ids from 0 to 95 \(the vocabulary\), got \[999\]"),
        (["a", "b"], dict(sampling=[moe_jax.Sampling()] * 3), "one for each of 2 prompts, got 3"),
        (None, {}, "expected prompts to be a text, a list of token ids, or a list of these, got NoneType None"),
        (b"abc", {}, "expected prompts to be a text, .* got bytes b'abc'"),
        ({1, 2}, {}, "got set {1, 2}, which has no order"),
        (["a", 1], {}, "expected a prompt to be a list of token ids, got int 1"),
        ([[1.5]], {}, r"expected a prompt to be a list of token ids \(whole numbers\), got float 1.5 among them"),
        ([True, False], {}, "got bool True among them"),
        ("\ud800", {}, "expected text of valid Unicode, got"),
        ("x", dict(sampling="greedy"), "expected one Sampling, or one for each of 1 prompts, got str 'greedy'"),
        ("x", dict(sampling=[None]), r"one for each of 1 prompts, got list \[None\]"),
        (
            "x",
            dict(stop=None),
            r"expected stop to be a string or a list of strings \(\(\) for none\), got NoneType None",
        ),
        ("x", dict(stop=[5]), r"expected stop to be a string or a list of strings .* got list \[5\]"),
        ("x", dict(stop_token_ids=5), "expected stop_token_ids to be a list of token ids, got int 5"),
        ("x", dict(stop_token_ids=[1.5]), "got float 1.5 among them"),
        ("x", dict(logprobs=[1]), r"expected logprobs to be True or False, got \[1\]"),
    ],
)
def test_generate(model, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        moe_jax.generate(model, prompts, **options)
    with pytest.raises(ValueError, match=message):
        next(moe_jax.stream(model, prompts, **options))


def test_prompts_come_in_many_forms(model):
    want = moe_jax.generate(model, [1, 2, 3], max_new_tokens=2).tokens
    ids_T = np.array([1, 2, 3])
    for prompt in (ids_T, ids_T.astype(np.uint8), jnp.asarray(ids_T), ids_T[None], (1, 2, 3), iter([1, 2, 3])):
        np.testing.assert_array_equal(moe_jax.generate(model, prompt, max_new_tokens=2).tokens, want)


def test_what_is_no_model(directory):
    for use in (moe_jax.generate, moe_jax.stream, moe_jax.logits):
        with pytest.raises(ValueError, match=r"expected a model that moe_jax\.load returned, got str"):
            use(str(directory), "a")
    with pytest.raises(ValueError, match=r"expected a model that moe_jax\.load returned, got NoneType"):
        moe_jax.compile(None, prompt_length=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(batch="1"), "expected batch to be a whole number of at least 1, got '1'"),
        (dict(prompt_length=10**12), r"within the context of 256 positions, got 1000000000000 \+ 64"),
        (dict(batch=10**9), r"the cache of 1000000000 requests x 80 positions takes"),
    ],
)
def test_compile(model, options, message):
    """Said before there is a list of a billion prompts, which would take the machine's memory."""
    with pytest.raises(ValueError, match=message):
        moe_jax.compile(model, **dict(prompt_length=4) | options)


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "repetition_penalty"])
@pytest.mark.parametrize("value", ["0.5", None, [1], True])
def test_sampling_of_another_type(name, value):
    with pytest.raises(ValueError, match=f"Sampling: expected {name} to be a number, got"):
        moe_jax.Sampling(**{name: value})


def test_missing_tokenizer(model):
    bare = dataclasses.replace(model, tokenizer=None)
    with pytest.raises(ValueError, match=r"expected token ids, got text: .* has no tokenizer \(tokenizer\.json\)"):
        moe_jax.generate(bare, "hello")
    with pytest.raises(ValueError, match="stop strings need a tokenizer"):
        moe_jax.generate(bare, [[1]], stop="x")


def test_chat_without_a_template(model):
    with pytest.raises(ValueError, match="expected a checkpoint with a chat template, got one without"):
        model.tokenizer.chat([{"role": "user", "content": "hi"}])


def test_chat_that_its_template_refuses(directory, tmp_path):
    copy = tmp_path / "chat"
    shutil.copytree(directory, copy)
    (copy / "chat_template.jinja").write_text("{{ raise_exception('System role not supported') }}")
    with pytest.raises(ValueError, match="template refuses this conversation: System role not supported"):
        moe_jax.load(copy).tokenizer.chat([{"role": "system", "content": "hi"}])


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (np.zeros((1, 0), int), {}, r"expected tokens_BT to be whole numbers \[batch, length\], got int64 \(1, 0\)"),
        (np.zeros((3,), int), {}, r"expected tokens_BT to be whole numbers \[batch, length\]"),
        (np.zeros((1, 3)), {}, "got float64"),
        (np.full((1, 3), 96), {}, "expected tokens_BT from 0 to 95"),
        (np.ones((2, 3), int), dict(lengths_B=np.array([1, 4])), r"lengths_B of shape \(2,\) within 1\.\.3"),
        (
            np.ones((1, 3), int),
            dict(lengths_B=[1.5]),
            r"lengths_B of shape \(1,\) within 1\.\.3, whole numbers, got \[1\.5\]",
        ),
        (np.ones((1, 3), int), dict(lengths_B=[2**40]), r"lengths_B of shape \(1,\) within 1\.\.3"),
        ([[1], [1, 2]], {}, r"expected tokens_BT to be whole numbers \[batch, length\], got values that make no array"),
        (np.ones((1, 300), int), {}, r"expected at most 256 tokens \(the context\), got 300"),
        (np.ones((1, 3), int), dict(decoder_tokens_BU=np.ones((1, 2), int)), "'mixtral' takes no decoder_tokens_BU"),
    ],
)
def test_logits(model, tokens, options, message):
    with pytest.raises(ValueError, match=message):
        moe_jax.logits(model, tokens, **options)


def test_load(directory, tmp_path):
    with pytest.raises(ValueError, match="expected dtype to be one of float32, bfloat16, float16, got 'int8'"):
        moe_jax.load(directory, dtype="int8")
    with pytest.raises(ValueError, match="expected dtype to be one of"):  # before anything is downloaded
        moe_jax.load("someone/a-model", dtype="bf16")
    with pytest.raises(ValueError, match="expected a directory or a hub id, got None"):
        moe_jax.load(None)
    with pytest.raises(ValueError, match=r'expected mesh to be sizes like "ep=4,tp=2" or a jax\.sharding\.Mesh, got 5'):
        moe_jax.load(directory, mesh=5)
    with pytest.raises(ValueError, match="expected strategy to be a name, or None for the default, got ''"):
        moe_jax.load(directory, mesh="ep=2", strategy="")
    with pytest.raises(ValueError, match="expected a mesh beside strategy='tp'"):
        moe_jax.load(directory, strategy="tp")
    with pytest.raises(ValueError, match=r"expected strategy to be one of tp, ep_psum, .* got 'magic'"):
        moe_jax.load(directory, mesh="ep=2", strategy="magic")
    with pytest.raises(ValueError, match=r"3 devices .*do not divide"):
        moe_jax.load(directory, mesh="ep=3")
    with pytest.raises(ValueError, match=r"mesh: expected at most 8 devices, got .*needs 16"):
        moe_jax.load(directory, mesh="ep=16")
    with pytest.raises(ValueError, match="mesh: expected sizes like \"ep=4,tp=2\", got 'ep4'"):
        moe_jax.load(directory, mesh="ep4")
    with pytest.raises(ValueError, match="mesh: expected axes among dp, ep, tp, got pp"):
        moe_jax.load(directory, mesh="pp=2")
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    (copy / "config.json").write_text("{not json")
    with pytest.raises(ValueError, match="to be JSON"):
        moe_jax.load(copy)
    (copy / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="to be a JSON object, got a list"):
        moe_jax.load(copy)
    (copy / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json"):
        moe_jax.load(copy)


def test_what_lies_beside_the_weights_is_read_before_them(directory, tmp_path):
    for name, text, message in (
        ("tokenizer.json", "[]", "expected a tokenizer that transformers can read in .*broken"),
        ("generation_config.json", '{"eos_token_id": 1.5}', "expected eos_token_id in .* to be a token id or a list"),
    ):
        broken = tmp_path / f"broken {name}"
        shutil.copytree(directory, broken)
        (broken / name).write_text(text)
        (broken / "model.safetensors").write_bytes(b"")
        with pytest.raises(ValueError, match=message):
            moe_jax.load(broken)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(num_experts_per_tok=5), "'num_experts_per_tok' to be a whole number from 1 to 4, got 5"),
        (dict(rms_norm_eps="x"), "'rms_norm_eps' to be a number above 0, got 'x'"),
        (dict(rope_theta=0), "'rope_theta' to be a number above 0, got 0"),
        (dict(rope_parameters=1.5), "'rope_parameters' to be an object, or null, got 1.5"),
        (dict(tie_word_embeddings="no"), "'tie_word_embeddings' to be true or false, got 'no'"),
        (dict(sliding_window=0), "'sliding_window' to be a whole number of at least 1, got 0"),
        (dict(hidden_act=[]), r"'hidden_act' to be one of silu, .* got \[\]"),
        (dict(eos_token_id=1.5), "'eos_token_id' to be a token id or a list of them, got 1.5"),
    ],
)
def test_config_keys(directory, tmp_path, change, message):
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        moe_jax.load(copy)


def test_what_does_not_fit_is_refused_with_the_arithmetic(directory, model, monkeypatch):
    monkeypatch.setattr(moe_jax.memory, "free_on", lambda device: 50_000)
    told = r"takes 0\.00 GiB on each device \([\d,]+ x 4 bytes\), and cpu has 0\.00 GiB free: use dtype"
    with pytest.raises(ValueError, match=told):
        moe_jax.load(directory, dtype="float32")
    with pytest.raises(
        ValueError, match=r"the cache of 9 requests x 32 positions takes .* generate for fewer requests"
    ):
        moe_jax.generate(model, ["a"] * 9, max_new_tokens=16)


def test_save_refuses_to_overwrite(model, directory, tmp_path):
    file = tmp_path / "file"
    file.write_text("kept")
    for save in (moe_jax.save, moe_jax.save_orbax):
        with pytest.raises(ValueError, match="to be a new or empty directory"):
            save(model, directory)
        with pytest.raises(ValueError, match="to be a directory or nothing yet, got a file"):
            save(model, file, overwrite=True)
        with pytest.raises(
            ValueError, match=r"expected a directory that can be written, got .*below: .*Not a directory"
        ):
            save(model, file / "below")
        with pytest.raises(ValueError, match="expected a directory, got None"):
            save(model, None)
    assert file.read_text() == "kept"


def test_orbax_and_back_on_another_mesh(model, directory, tmp_path):
    split = moe_jax.load(directory, dtype="float32", mesh="ep=2,tp=2")
    moe_jax.save_orbax(split, tmp_path / "orbax")
    want = moe_jax.generate(model, "abc", max_new_tokens=8).texts
    for options in ({}, dict(mesh="tp=2", strategy="tp")):
        again = moe_jax.load_orbax(tmp_path / "orbax", dtype="float32", **options)
        assert moe_jax.generate(again, "abc", max_new_tokens=8).texts == want
    with pytest.raises(ValueError, match=r"expected .* to be a new or empty directory"):
        moe_jax.save_orbax(model, tmp_path / "orbax")
    with pytest.raises(ValueError, match="expected a directory that save_orbax wrote"):
        moe_jax.load_orbax(directory)


def test_saved_and_loaded_again(model, tmp_path):
    moe_jax.save(model, tmp_path / "again")
    again = moe_jax.load(tmp_path / "again", dtype="float32")
    options = dict(max_new_tokens=8)
    assert moe_jax.generate(again, "abc", **options).texts == moe_jax.generate(model, "abc", **options).texts
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == "float32"
