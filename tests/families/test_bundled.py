"""The bundled Shakespeare model: Hugging Face's own tokens from the same files, and what is promised of it."""

import json
from pathlib import Path

import numpy as np
import pytest

import moe_jax
from moe_jax.model import BUNDLED

EXPECTED = json.loads((Path(__file__).parent / "fixtures_bundled" / "expected.json").read_text())
MOST_BYTES = 25_000_000
# Logits of up to 16 in size have a bfloat16 step of 2^-4; six layers of roundings add a few of them.
MOST_BFLOAT16_GAP = 0.25


@pytest.fixture(scope="module")
def model() -> moe_jax.Model:
    return moe_jax.load("shakespeare", dtype="float32")


def test_tokenizer_gives_the_same_tokens_and_texts(model):
    for prompt, tokens in zip(EXPECTED["prompts"], EXPECTED["prompt_tokens"], strict=True):
        assert model.tokenizer.encode(prompt) == tokens
        assert model.tokenizer.decode(tokens) == prompt


def test_greedy_tokens_are_hugging_face_s(model):
    want = np.array(EXPECTED["greedy_tokens"])
    out = moe_jax.generate(model, EXPECTED["prompts"], max_new_tokens=want.shape[1], stop_token_ids=())
    np.testing.assert_array_equal(out.tokens, want)
    assert out.texts == EXPECTED["texts"]


def test_is_a_small_mixture_of_eight_experts(model):
    files = list(BUNDLED["shakespeare"].iterdir())
    assert sum(file.stat().st_size for file in files) < MOST_BYTES
    assert model.model_type == "mixtral"
    assert (model.config.num_local_experts, model.config.num_experts_per_tok) == (8, 2)


def test_every_expert_of_every_layer_answers(model):
    """A router that starves an expert has collapsed: of 20 texts each should get at least a tenth of an equal share."""
    out = moe_jax.generate(
        model, EXPECTED["prompts"], max_new_tokens=64, sampling=moe_jax.Sampling(temperature=0.8), routed_experts=True
    )
    for layer, experts_BUA in enumerate(out.routing.experts_BLUA.swapaxes(0, 1)):
        chosen = experts_BUA[experts_BUA >= 0]
        shares_E = np.bincount(chosen, minlength=8) / chosen.size
        assert shares_E.min() >= 0.1 / 8, f"layer {layer}: {shares_E.round(3)}"


@pytest.mark.gpu
def test_greedy_tokens_on_a_gpu(model):
    """float32 on a GPU gives the very tokens; bfloat16, by the kernels, parts from them only between near-equals."""
    want = np.array(EXPECTED["greedy_tokens"])
    arguments = dict(max_new_tokens=want.shape[1], stop_token_ids=())
    np.testing.assert_array_equal(moe_jax.generate(model, EXPECTED["prompts"], **arguments).tokens, want)

    by_kernels = moe_jax.load("shakespeare", dtype="bfloat16")
    got = moe_jax.generate(by_kernels, EXPECTED["prompts"], **arguments).tokens
    for prompt, want_U, got_U in zip(EXPECTED["prompt_tokens"], want, got, strict=True):
        parted = np.flatnonzero(want_U != got_U)
        if parted.size:
            first = parted[0]
            logits_TV = np.asarray(moe_jax.logits(model, np.array([prompt + want_U[:first].tolist()])))[0]
            gap = logits_TV[-1, want_U[first]] - logits_TV[-1, got_U[first]]
            assert gap <= MOST_BFLOAT16_GAP, f"{prompt[:4]}..., token {first}: {gap}"
