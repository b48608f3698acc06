"""Trains the bundled model: a small Mixtral on Shakespeare, and a dense model of equal active size to compare it with.

    python scripts/train_shakespeare.py --corpus tinyshakespeare.txt --output build/shakespeare

The corpus is any text; its last tenth is the validation split. Trains a byte-level BPE tokenizer on the rest, then both
models by the same recipe, and keeps of each the parameters with the lowest validation loss. Writes the Mixture-of-Experts
model to --output in Hugging Face's format (bfloat16), appends both models' losses as JSON lines to --results and draws
the curves to --picture. A few minutes on a GPU; for a try on a CPU add `--shape.hidden-size 64 --recipe.steps 50`.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import moe_jax
from moe_jax import training
from moe_jax.testing import random_model

VALIDATION_SHARE = 0.1
END_OF_TEXT = "<|endoftext|>"
PROMPTS = ("ROMEO:", "KING RICHARD III:\n", "What is ", "First Citizen:\n")
# A megabyte of text is soon known by heart: much dropout and weight decay, and no more than 35 times through it.
RECIPE = training.Recipe(steps=900, learning_rate=3e-3, weight_decay=2.0, dropout=0.3)


@dataclasses.dataclass(frozen=True)
class Shape:
    """The Mixtral's sizes, by Hugging Face's names. The dense model's only expert is as wide as a token's active ones."""

    vocab_size: int = 1024
    hidden_size: int = 256
    intermediate_size: int = 160
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    num_local_experts: int = 8
    num_experts_per_tok: int = 2

    def dense(self) -> Shape:
        width = self.intermediate_size * self.num_experts_per_tok
        return dataclasses.replace(self, intermediate_size=width, num_local_experts=1, num_experts_per_tok=1)

    def hf_config(self, *, context: int, end_of_text: int) -> dict:
        """The `config.json` of a model for `context` positions."""
        return {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            **dataclasses.asdict(self),
            "max_position_embeddings": context,
            "rope_theta": 10000.0,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            "sliding_window": None,
            "bos_token_id": end_of_text,
            "eos_token_id": end_of_text,
            "pad_token_id": end_of_text,
        }


@dataclasses.dataclass(frozen=True)
class Options:
    """What and how to train."""

    corpus: Path
    output: Path
    """A new directory for the model."""
    results: Path = Path("docs/benchmarks/shakespeare.jsonl")
    picture: Path = Path("docs/images/shakespeare_loss.png")
    shape: Shape = dataclasses.field(default_factory=Shape)
    recipe: training.Recipe = dataclasses.field(default_factory=lambda: RECIPE)
    seed: int = 0
    evaluate_every: int = 50
    """Steps between measurements of the validation loss."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Both splits as tokens, each after one end-of-text token, which stands for the beginning; and the tokenizer."""

    train_X: np.ndarray
    validation_X: np.ndarray
    validation_characters: int
    tokenizer: Tokenizer

    @classmethod
    def read(cls, path: Path, *, vocab_size: int) -> Corpus:
        text = path.read_text(encoding="utf-8")
        split = int(len(text) * (1 - VALIDATION_SHARE))
        train, validation = text[:split], text[split:]
        tokenizer = trained_tokenizer(train, vocab_size=vocab_size)

        def tokens(text: str) -> np.ndarray:
            return np.array([tokenizer.token_to_id(END_OF_TEXT), *tokenizer.encode(text).ids], np.int32)

        return cls(tokens(train), tokens(validation), len(validation), tokenizer)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Mean losses in nats per token after so many steps; that of training is with dropout, over the steps before."""

    step: int
    train: float
    validation: float


@dataclasses.dataclass(frozen=True)
class Trained:
    """The model of the lowest validation loss, in bfloat16, and how it came about."""

    model: moe_jax.Model
    evaluations: list[Evaluation]
    seconds: float

    @property
    def best(self) -> Evaluation:
        return min(self.evaluations, key=lambda each: each.validation)


def trained_tokenizer(text: str, *, vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer: any text has tokens, and decoding gives it back exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path, *, context: int) -> None:
    """Beside a model, as transformers' AutoTokenizer reads it."""
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def trained(name: str, shape: Shape, corpus: Corpus, options: Options, console: Console) -> Trained:
    """Trains one model, printing its losses as it goes. Ctrl-C after the first evaluation ends it and keeps the best."""
    hf_config = shape.hf_config(context=options.recipe.length, end_of_text=corpus.tokenizer.token_to_id(END_OF_TEXT))
    model = random_model(hf_config, seed=options.seed)
    best, evaluations = model.module, []
    begin_s = time.monotonic()
    try:
        for module, evaluation in evaluated(name, model.module, corpus, options, console):
            if not evaluations or evaluation.validation < min(each.validation for each in evaluations):
                best = module
            evaluations.append(evaluation)
    except KeyboardInterrupt:
        if not evaluations:
            raise
        console.print(f"{name}: stopped after step {evaluations[-1].step}")
    return Trained(dataclasses.replace(model, module=best), evaluations, time.monotonic() - begin_s)


def evaluated(
    name: str, first: nnx.Module, corpus: Corpus, options: Options, console: Console
) -> Iterator[tuple[nnx.Module, Evaluation]]:
    """Trains, and gives the module, in bfloat16, and its losses every so many steps."""
    recipe = options.recipe
    step, state = training.trainer(first, recipe, seed=options.seed)
    text_X = jnp.asarray(corpus.train_X)
    validation = training.windows(corpus.validation_X, batch=recipe.batch, length=recipe.length)
    losses = []
    with progress_bar(console) as progress:
        task = progress.add_task(name, total=recipe.steps)
        for count in range(1, recipe.steps + 1):
            state, step_losses = step(state, text_X)
            losses.append(step_losses)
            progress.advance(task)
            if count % options.evaluate_every and count != recipe.steps:
                continue
            module = training.with_parameters(first, state.parameters, "bfloat16")
            loss = training.total_loss(module, validation) / (len(corpus.validation_X) - 1)
            means = training.Losses(*np.mean(jax.device_get(losses), axis=0))
            losses = []
            console.log(
                f"{name} step {count}: training {means.next_token:.4f}, validation {loss:.4f} nats per token, "
                f"balance {means.balance:.3f}"
            )
            yield module, Evaluation(count, float(means.next_token), loss)


def progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def record(name: str, shape: Shape, result: Trained, corpus: Corpus, options: Options) -> dict:
    """The JSON line of one model: what, how, where, and the losses of its bfloat16 parameters."""
    validation = training.windows(corpus.validation_X, batch=options.recipe.batch, length=options.recipe.length)
    tokens = len(corpus.validation_X) - 1
    leaves = training.flat_parameters(result.model.module)
    in_float32 = training.with_parameters(result.model.module, leaves, "float32")
    total = training.total_loss(in_float32, validation)
    return {
        "model": name,
        "validation_nats_per_token": round(total / tokens, 5),
        "validation_nats_per_character": round(total / corpus.validation_characters, 5),
        "validation_nats_per_token_computed_in_bfloat16": round(result.best.validation, 5),
        "train_nats_per_token_with_dropout": round(result.best.train, 5),
        "best_step": result.best.step,
        "train_s": round(result.seconds, 1),
        "validation_tokens": tokens,
        "validation_characters": corpus.validation_characters,
        "train_tokens": len(corpus.train_X) - 1,
        "parameters": result.model.num_parameters,
        "active_parameters": result.model.num_parameters - inactive_parameters(shape),
        "shape": dataclasses.asdict(shape),
        "recipe": dataclasses.asdict(options.recipe),
        "seed": options.seed,
        "device": jax.devices()[0].device_kind,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")},
        "date": datetime.date.today().isoformat(),
    }


def append(line: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as lines:
        lines.write(json.dumps(line) + "\n")


def inactive_parameters(shape: Shape) -> int:
    """Those of the experts that a token does not visit."""
    expert = 3 * shape.hidden_size * shape.intermediate_size
    return shape.num_hidden_layers * (shape.num_local_experts - shape.num_experts_per_tok) * expert


def draw(results: dict[str, Trained], path: Path) -> None:
    """The loss curves of the models, training dashed, a dot where the validation loss is lowest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for (name, result), colour in zip(results.items(), ("#1b6ca8", "#d1495b"), strict=True):
        steps = [each.step for each in result.evaluations]
        axes.plot(steps, [each.validation for each in result.evaluations], color=colour, label=f"{name}, validation")
        axes.plot(
            steps,
            [each.train for each in result.evaluations],
            "--",
            color=colour,
            alpha=0.6,
            label=f"{name}, training (with dropout)",
        )
        axes.plot(result.best.step, result.best.validation, "o", color=colour)
        axes.annotate(
            f"{result.best.validation:.3f}",
            (result.best.step, result.best.validation),
            xytext=(0, 7),
            textcoords="offset points",
            color=colour,
            ha="center",
        )
    axes.set(xlabel="step", ylabel="loss, nats per token", title="Shakespeare: mixture of experts and dense model")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(options: Options) -> None:
    if options.output.exists():
        raise SystemExit(f"expected --output to be a new directory, got {options.output}, which exists")
    console = Console(log_path=False)
    corpus = Corpus.read(options.corpus, vocab_size=options.shape.vocab_size)
    console.print(f"{len(corpus.train_X) - 1} tokens to train on, {len(corpus.validation_X) - 1} to validate")

    shapes = {"mixture of experts": options.shape, "dense": options.shape.dense()}
    results: dict[str, Trained] = {}
    for name, shape in shapes.items():
        results[name] = trained(name, shape, corpus, options, console)
        if shape is options.shape:
            moe_jax.save(results[name].model, options.output)
            save_tokenizer(corpus.tokenizer, options.output, context=options.recipe.length)
        line = record(name, shape, results[name], corpus, options)
        console.print(line)
        append(line, options.results)
    draw(results, options.picture)

    model = moe_jax.load(options.output)
    sampling = moe_jax.Sampling(temperature=0.8, min_p=0.05, seed=options.seed)
    out = moe_jax.generate(model, PROMPTS, max_new_tokens=options.recipe.length // 4, sampling=sampling)
    for prompt, text in zip(PROMPTS, out.texts or (), strict=True):
        console.print(f"\n--- {prompt}{text}", markup=False, highlight=False)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
