"""Every family against Hugging Face's own numbers, on tiny random checkpoints that its `save_pretrained` wrote.

The fixtures (README.md beside them) were made by transformers and torch on a CPU; neither is needed here.
"""

import functools
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import moe_jax

FIXTURES = Path(__file__).parent / "fixtures"
CASES = sorted(path.parent.relative_to(FIXTURES).as_posix() for path in FIXTURES.glob("*/*/expected.safetensors"))

# float32 sums in another order: about 1e-7 per operation, a few hundred operations deep.
FLOAT32_TOLERANCE = 1e-5
# The bar for bfloat16 is Hugging Face's own rounding error.
BFLOAT16_FACTOR = 1.5
# Router logits reach 8, where bfloat16's values are 0.03 apart: nearer than that, roundings choose the expert.
NEAR_TIE = 0.03
MOST_TIES = 4  # of 33 tokens, in a fixture


@functools.cache
def expected(case: str) -> dict[str, np.ndarray]:
    return load_file(FIXTURES / case / "expected.safetensors")


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def teacher_forced(model: moe_jax.Model, case: str) -> np.ndarray:
    """Logits of all prompts of a case in one padded batch, zero in the padding as in the fixture."""
    want = expected(case)
    decoder_tokens = want.get("decoder_tokens")
    logits = np.array(moe_jax.logits(model, want["prompts"], want["lengths"], decoder_tokens_BU=decoder_tokens))
    if decoder_tokens is None:
        logits[np.arange(logits.shape[1]) >= want["lengths"][:, None]] = 0
    return logits


def is_clear_of_ties(case: str) -> np.ndarray:
    """`[B, T]`: false where a router stands between two experts, so that bfloat16 may make another token of it altogether.

    As far as the fixture tells: it has the router logits of the third prompt.
    """
    want = expected(case)
    is_clear_BT = np.ones(want["logits"].shape[:2], bool)
    if "router_logits" in want:
        active = want["router_experts"].shape[-1]
        chosen_LTA, rejected_LTX = np.split(np.sort(want["router_logits"], axis=-1), [-active], axis=-1)[::-1]
        margin_LT = chosen_LTA.min(axis=-1) - rejected_LTX.max(axis=-1, initial=-np.inf)
        is_clear_BT[2] = (margin_LT >= NEAR_TIE).all(axis=0)
    return is_clear_BT


def prompts(case: str) -> list[list[int]]:
    want = expected(case)
    return [row[:length].tolist() for row, length in zip(want["prompts"], want["lengths"], strict=True)]


def test_there_are_enough_cases():
    families = {case.split("/")[0] for case in CASES}
    assert families == set(moe_jax.models.FAMILIES)
    assert len(CASES) >= 25


@pytest.mark.parametrize("case", CASES)
def test_float32_logits_and_greedy_tokens(case):
    model = moe_jax.load(FIXTURES / case, dtype="float32")
    assert relative_error(teacher_forced(model, case), expected(case)["logits"]) <= FLOAT32_TOLERANCE

    want = expected(case)["greedy_tokens"]
    out = moe_jax.generate(model, prompts(case), max_new_tokens=want.shape[1], stop_token_ids=(), routed_experts=True)
    np.testing.assert_array_equal(out.tokens, want)
    assert out.stop_reasons == ["length"] * 3
    if "router_experts" in expected(case):
        longest = out.routing.prompt_experts_BLTA[2, :, :33]
        np.testing.assert_array_equal(longest, expected(case)["router_experts"])


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_is_as_close_as_hugging_face(case):
    model = moe_jax.load(FIXTURES / case, dtype="bfloat16")
    allowed = BFLOAT16_FACTOR * float(expected(case)["bfloat16_relative_error"][0])
    got, want, is_clear_BT = teacher_forced(model, case), expected(case)["logits"], is_clear_of_ties(case)
    assert (~is_clear_BT).sum() <= MOST_TIES
    assert relative_error(got[is_clear_BT], want[is_clear_BT]) <= allowed


def test_runs_on_cpu_without_a_gpu():
    """The numbers above are the plain-JAX ones; `make test-gpu` compares kernels with them."""
    assert jax.default_backend() == "cpu"
