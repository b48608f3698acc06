"""The command line: `moe-jax generate`, `moe-jax chat`, `moe-jax info`."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import jax
import tyro
from rich.console import Console
from rich.table import Table

import moe_jax
from moe_jax import description
from moe_jax.program import NO_TOKEN

INTERRUPTED, PIPE_CLOSED = 130, 141  # as shells count signals: 128 and their number


@dataclasses.dataclass
class Options:
    """What every command that generates takes."""

    model: Annotated[str, tyro.conf.arg(aliases=["-m"])] = "shakespeare"
    """A checkpoint directory, a hub id, or "shakespeare", which comes with the package."""
    max_new_tokens: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 256
    temperature: float = 0.8
    """0 is greedy."""
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.05
    repetition_penalty: float = 1.0
    seed: int = 0
    dtype: str | None = None
    """float32, bfloat16 or float16; by default bfloat16, on a CPU float32."""
    mesh: str | None = None
    """Devices to split the model over, such as "ep=4,tp=2"."""
    strategy: str | None = None
    """How tokens meet experts, such as ep_agrs, or ep_agrs/ep_psum for prefill and decode."""
    attention: str | None = None
    """How to split everything else over the mesh: tp or dp."""
    compilation_cache: str | None = None
    """Where compiled programs are kept for the next start, or "off"; by default ~/.cache/moe-jax/compiled."""
    experts: bool = True
    """After the text, say on standard error which experts computed it and how fast."""

    def load(self) -> moe_jax.Model:
        keep_compiled_programs(self.compilation_cache)
        dtype = self.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
        return moe_jax.load(self.model, dtype=dtype, mesh=self.mesh, strategy=self.strategy, attention=self.attention)

    def sampling(self) -> moe_jax.Sampling:
        return moe_jax.Sampling(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
        )


@dataclasses.dataclass
class Generate(Options):
    """Continue a prompt, token by token as they come."""

    prompt: Annotated[str, tyro.conf.arg(aliases=["-p"])] = "ROMEO:"
    stop: tuple[str, ...] = ()
    """Strings that end the text."""

    def run(self) -> None:
        sampling = self.sampling()  # refused before the model is loaded
        model = self.load()
        pieces = moe_jax.stream(
            model,
            self.prompt,
            max_new_tokens=self.max_new_tokens,
            sampling=sampling,
            stop=self.stop,
            routed_experts=self.experts,
        )
        if not model.is_encoder_decoder:
            print(self.prompt, end="", flush=True)
        show(pieces, self.experts)


@dataclasses.dataclass
class Chat(Options):
    """Talk with a chat-tuned checkpoint, by its own chat template. An empty line or Ctrl-D ends it."""

    system: str | None = None
    """The system message."""

    def run(self) -> None:
        sampling = self.sampling()  # refused before the model is loaded
        model = self.load()
        if model.tokenizer is None:
            raise ValueError(f"expected a checkpoint with a tokenizer, got {self.model} without one")
        model.tokenizer.require_chat_template()
        messages = [{"role": "system", "content": self.system}] if self.system else []
        while line := _asked("> "):
            messages.append({"role": "user", "content": line})
            pieces = moe_jax.stream(
                model,
                model.tokenizer.chat(messages),
                max_new_tokens=self.max_new_tokens,
                sampling=sampling,
                routed_experts=self.experts,
            )
            messages.append({"role": "assistant", "content": show(pieces, self.experts)})


@dataclasses.dataclass
class Info:
    """Families, devices, and which kernels run here and why others do not."""

    def run(self) -> None:
        console = Console()
        console.print(f"moe-jax on jax {jax.__version__}: {', '.join(str(device) for device in jax.devices())}")
        for title, columns, rows in (description.families(), description.kernels()):
            table = Table(*columns, title=title, title_justify="left")
            for row in rows:
                table.add_row(*row)
            console.print(table)


def keep_compiled_programs(directory: str | None) -> None:
    """Turns JAX's compilation cache on, in `directory`; "off" leaves it as it is, and so does None where JAX has one."""
    if directory == "off" or (directory is None and jax.config.jax_compilation_cache_dir):
        return
    path = Path(directory).expanduser() if directory else Path.home() / ".cache" / "moe-jax" / "compiled"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if directory is None:  # a home that cannot be written is no reason not to run
            return
        raise ValueError(
            f"expected --compilation-cache to be a directory that can be written, got {path}: {error}"
        ) from None
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def show(pieces: Iterable[moe_jax.Piece], with_experts: bool) -> str:
    """Prints pieces as they come, then who answered and how fast; returns the text."""
    texts: list[str] = []
    counts: Counter[tuple[int, int]] = Counter()
    started_s = None
    for piece in pieces:
        print(piece, end="", flush=True)
        texts.append(piece.text)
        if len(texts) == 2:  # the first two wait for the compiler
            started_s = time.perf_counter()
        if piece.experts_LA is not None:
            counts.update(
                (layer, int(e)) for layer, row_A in enumerate(piece.experts_LA) for e in row_A if e != NO_TOKEN
            )
    print(flush=True)
    if with_experts:
        speed = (
            f"{(len(texts) - 2) / (time.perf_counter() - started_s):.0f} tokens/s; "
            if started_s and len(texts) > 2
            else ""
        )
        print(f"\n[{speed}{_answered(counts)}]", file=sys.stderr)
    return "".join(texts)


def _answered(counts: Counter[tuple[int, int]]) -> str:
    """Of each sparse layer, the three experts that computed most of the choices."""
    layers = sorted({layer for layer, _ in counts})
    if not layers:
        return "no experts: a dense model"
    lines = []
    for layer in layers:
        chosen = Counter({expert: n for (each, expert), n in counts.items() if each == layer})
        busiest = ", ".join(f"{expert} ({n / chosen.total():.0%})" for expert, n in chosen.most_common(3))
        lines.append(f"layer {layer}: {busiest}")
    return "experts that answered: " + "; ".join(lines)


def _asked(prompt: str) -> str:
    try:
        return input(prompt)
    except EOFError:
        return ""


def main() -> None:
    command = tyro.cli(Generate | Chat | Info, prog="moe-jax", description=__doc__)
    try:
        command.run()
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # whoever read the text, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at its end
        sys.exit(PIPE_CLOSED)
    except ValueError as error:
        print(f"moe-jax: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
