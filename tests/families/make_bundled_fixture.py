"""Writes what Hugging Face transformers computes from the files of the bundled model, for tests/families/test_bundled.py.

    pip install "torch==2.13.*" "transformers==5.23.*" safetensors
    python tests/families/make_bundled_fixture.py

float32, greedy, each prompt alone: token ids of the prompts as AutoTokenizer gives them, and 200 more of each from
AutoModelForCausalLM. Needs torch; the test does not.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent
MODEL = HERE.parents[1] / "moe_jax" / "bundled" / "shakespeare"
OUTPUT = HERE / "fixtures_bundled" / "expected.json"
NEW_TOKENS = 200
# The last four: other spaces, bytes beyond ASCII, one character, more than a sentence.
PROMPTS = (
    "ROMEO:",
    "JULIET:\n",
    "KING RICHARD III:\nNow is the winter of our discontent",
    "First Citizen:\n",
    "To be, or not to be",
    "What is ",
    "My lord, ",
    "MENENIUS:\nThe gods",
    "DUKE VINCENTIO:\n",
    "O, that I were",
    "QUEEN ELIZABETH:\nWhere is my son?\n\n",
    "GREMIO:\nGood morrow, neighbour Baptista.\n\nBAPTISTA:\n",
    "the",
    "Enter",
    "Come, come, ",
    "AUTOLYCUS:\n",
    "  two spaces\tand a tab\r\n",
    "Caf\u00e9 \u2014 \u65e5\u672c \U0001f600",
    "a",
    "LEONTES:\nToo hot, too hot!\nTo mingle friendship far is mingling bloods.\nI have tremor cordis on me: my heart dances;\n",
)


def continued(model, tokens: list[int]) -> tuple[list[int], float]:
    """The greedy tokens, and how far the best logit was ahead of the second in the closest decision."""
    out = model.generate(
        torch.tensor([tokens]),
        attention_mask=torch.ones(1, len(tokens), dtype=torch.long),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
    )
    best_two = torch.stack([step[0].topk(2).values for step in out.logits])
    return out.sequences[0, len(tokens) :].tolist(), float((best_two[:, 0] - best_two[:, 1]).min())


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="eager").eval()
    prompt_tokens = [tokenizer.encode(prompt) for prompt in PROMPTS]
    tokens, margins = zip(*(continued(model, each) for each in prompt_tokens), strict=True)
    expected = {
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
        "smallest_margin": min(margins),
        "prompts": PROMPTS,
        "prompt_tokens": prompt_tokens,
        "greedy_tokens": tokens,
        "texts": [tokenizer.decode(each) for each in tokens],
    }
    OUTPUT.write_text(json.dumps(expected, indent=1) + "\n")
    print(f"{len(PROMPTS)} prompts, smallest margin {min(margins):.2e}; the first: {expected['texts'][0]}")


if __name__ == "__main__":
    main()
