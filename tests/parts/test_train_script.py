"""The training script from end to end, at toy size: what it writes is a checkpoint that loads, and lines that add up."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

import moe_jax
from moe_jax import training

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_shakespeare.py"
TEXT = "".join(f"Speaker {n % 7}:\nThe number {n} comes before {n + 1}.\n\n" for n in range(400))


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_shakespeare", SCRIPT)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def options(script, tmp_path):
    (tmp_path / "corpus.txt").write_text(TEXT)
    return script.Options(
        corpus=tmp_path / "corpus.txt",
        output=tmp_path / "model",
        results=tmp_path / "docs" / "results.jsonl",
        picture=tmp_path / "docs" / "loss.png",
        shape=script.Shape(
            vocab_size=300,
            hidden_size=16,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
        ),
        recipe=training.Recipe(steps=4, batch=2, length=128, warmup_steps=1),
        evaluate_every=2,
    )


@pytest.mark.slow
def test_writes_a_checkpoint_losses_and_a_picture(script, options, capsys):
    script.main(options)
    assert "step 4" in capsys.readouterr().out

    model = moe_jax.load(options.output)
    assert model.tokenizer.decode(model.tokenizer.encode(TEXT)) == TEXT
    assert model.stop_token_ids == (model.tokenizer.encode(script.END_OF_TEXT)[0],)
    assert options.picture.stat().st_size > 0

    sparse, dense = (json.loads(line) for line in options.results.read_text().splitlines())
    assert (sparse["model"], dense["model"]) == ("mixture of experts", "dense")
    assert sparse["parameters"] == model.num_parameters
    # Equal active size: they differ in the router alone, 8 experts of width 16 against one.
    assert sparse["active_parameters"] - dense["active_parameters"] == (8 - 1) * 16
    for line in (sparse, dense):
        per_character = line["validation_nats_per_token"] * line["validation_tokens"] / line["validation_characters"]
        assert line["validation_nats_per_character"] == pytest.approx(per_character, abs=1e-4)
    assert sparse["validation_characters"] == len(TEXT) - int(len(TEXT) * 0.9)


def test_refuses_to_overwrite_before_any_work(script, options):
    options.output.mkdir()
    with pytest.raises(SystemExit, match="expected --output to be a new directory"):
        script.main(options)
