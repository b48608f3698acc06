"""Runs transformers on a moe-jax model's own weights, without a copy: the baseline of scripts/benchmark_generate.py.

Nothing here imports JAX: parameters come as anything that torch.from_dlpack takes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers

EAGER, COMPILED = ("eager", "grouped_mm", "batched_mm"), "compiled"
VARIANTS = (*EAGER, COMPILED)
SMALL_BATCH = 8  # up to it batched_mm is the faster of the two that compile


def build(hf_config: Mapping[str, Any]) -> Any:
    """The transformers model of a config.json, without memory."""
    config = transformers.CONFIG_MAPPING[hf_config["model_type"]].from_dict(dict(hf_config))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    return model.eval()


def fill(model: Any, values: Mapping[str, Any], places: Mapping[str, tuple[str, tuple[int, ...], tuple[int, ...]]]):
    """Gives the model its tensors: `places[name]` is (parameter, slice of it, the tensor's shape); views, no copies."""
    shared = {path: torch.from_dlpack(array) for path, array in values.items()}
    tensors = {name: shared[path][at].reshape(shape) for name, (path, at, shape) in places.items()}
    copied = [name for name, (path, at, _) in places.items() if tensors[name].data_ptr() != shared[path][at].data_ptr()]
    if copied:
        raise ValueError(f"expected views of the parameters, got copies of {copied[:3]}")
    model.load_state_dict(tensors, strict=True, assign=True)
    model.requires_grad_(False)
    device = next(iter(tensors.values())).device
    # The rotary table is computed from the config, and so far without memory too.
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)


class Clock(transformers.StoppingCriteria):
    """Notes when each token was there; stops after `seconds`."""

    def __init__(self, seconds: float):
        self.deadline_s = time.perf_counter() + seconds
        self.times_s: list[float] = []

    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.device.type == "cuda":
            torch.cuda.synchronize()
        self.times_s.append(time.perf_counter())
        is_over = self.times_s[-1] > self.deadline_s
        return torch.full((len(input_ids),), is_over, dtype=torch.bool, device=input_ids.device)


@torch.no_grad()
def generate(
    model: Any, variant: str, prompts: Sequence[Sequence[int]], *, new_tokens: int, seconds: float
) -> tuple[torch.Tensor, list[float], float]:
    """Greedy tokens `[B, U]`, when each of the U was there, and when the call began; U is less if the time is over."""
    model.set_experts_implementation(_experts(variant, len(prompts)))
    ids = torch.tensor(prompts, device=model.device)
    clock = Clock(seconds)
    begin_s = time.perf_counter()
    options: dict[str, Any] = {"cache_implementation": "static"} if variant == COMPILED else {"disable_compile": True}
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        pad_token_id=0,
        eos_token_id=None,
        stopping_criteria=[clock],
        **options,
    )
    return output[:, ids.shape[1] :].cpu(), clock.times_s, begin_s


def _experts(variant: str, batch: int) -> str:
    if variant in EAGER:
        return variant
    return "batched_mm" if batch <= SMALL_BATCH else "grouped_mm"


def measured(
    model: Any, variant: str, prompts: Sequence[Sequence[int]], *, new_tokens: int, first: int, seconds: float
) -> tuple[dict[str, Any], list[list[int]]]:
    """Milliseconds per token, from token `first` on, and the tokens. A first short run warms up, or compiles."""
    generate(model, variant, prompts, new_tokens=min(4, new_tokens), seconds=seconds)
    if variant == COMPILED:  # the static cache's size is part of what is compiled
        generate(model, variant, prompts, new_tokens=new_tokens, seconds=seconds)
    tokens, times_s, begin_s = generate(model, variant, prompts, new_tokens=new_tokens, seconds=seconds)
    first = min(first, len(times_s) // 2)
    if first < 1:
        raise ValueError(f"{variant}: expected at least two tokens within {seconds} s, got {len(times_s)}")
    per_token_s = (times_s[-1] - times_s[first - 1]) / (len(times_s) - first)
    record = {
        "ms_per_token": round(1e3 * per_token_s, 3),
        "first_token_ms": round(1e3 * (times_s[0] - begin_s), 3),
        "tokens": len(times_s),
    }
    return record, tokens.tolist()


@torch.no_grad()
def disagreement(
    model: Any, prompt: Sequence[int], theirs: Sequence[int], ours: Sequence[int]
) -> dict[str, Any] | None:
    """Where two greedy continuations part, and how far apart transformers' logits of the two tokens are there.

    `spacing` is that of bfloat16 numbers as large as those logits: a gap of a few spacings is rounding. None: equal.
    """
    at = next((n for n, (one, other) in enumerate(zip(theirs, ours, strict=False)) if one != other), None)
    if at is None:
        return None
    ids = torch.tensor([[*prompt, *theirs[:at]]], device=model.device)
    logits_V = model(ids, use_cache=False).logits[0, -1].float()
    likeliest = logits_V[theirs[at]].item()
    spacing = 2.0 ** (torch.tensor(abs(likeliest)).frexp().exponent.item() - 8)
    return {"token": at, "gap": round(likeliest - logits_V[ours[at]].item(), 5), "spacing": spacing}


@contextlib.contextmanager
def released():
    """Gives torch's cached device memory back afterwards: the next variant needs it in other pieces, and so may JAX."""
    try:
        yield
    finally:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
