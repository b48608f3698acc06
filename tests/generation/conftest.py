"""A tiny random model whose tokens are the 95 printable ASCII characters, so that tests can read what it says."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import moe_jax
from moe_jax.testing import random_model

CONFIG = dict(
    model_type="mixtral",
    vocab_size=96,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=4,
    num_experts_per_tok=2,
    max_position_embeddings=256,
    eos_token_id=95,
    initializer_range=0.5,
)


@pytest.fixture(scope="session")
def tokenizer_directory(tmp_path_factory):
    """tokenizer.json of the printable ASCII characters and an end-of-text token."""
    directory = tmp_path_factory.mktemp("tokenizer")
    # ByteLevel writes a space as \u0120.
    alphabet = ["\u0120", *(chr(code) for code in range(33, 127))]
    tokenizer = Tokenizer(models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"})
    )
    return directory


@pytest.fixture(scope="session")
def directory(tokenizer_directory, tmp_path_factory):
    """A saved checkpoint of the tiny model with its tokenizer."""
    directory = tmp_path_factory.mktemp("checkpoint") / "tiny"
    moe_jax.save(random_model(CONFIG, seed=1, scale=0.3), directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((tokenizer_directory / name).read_bytes())
    return directory


@pytest.fixture(scope="session")
def model(directory):
    return moe_jax.load(directory, dtype="float32")
