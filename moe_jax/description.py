"""What the package can do, told from the code itself: the tables of `moe-jax info` and of the README."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.models import FAMILIES
from pallas_kernels import Routing, RoutingRule, dispatch
from pallas_kernels.decode_attention import explain as explain_decode_attention
from pallas_kernels.experts import explain as explain_experts
from pallas_kernels.matvec import explain as explain_matvec
from pallas_kernels.route import explain as explain_route

Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]

# One layer of OLMoE-1B-7B, at the token counts of decoding one request and of reading a prompt.
TOKENS = (1, 4096)
WIDTH, HIDDEN_WIDTH, EXPERTS, ACTIVE = 2048, 1024, 64, 8
HEADS, HEAD_WIDTH, POSITIONS = 16, 128, 4096


def families() -> Table:
    """Every family, as its file's docstring introduces it: model_type, what it is, checkpoints."""
    rows: list[tuple[str, ...]] = []
    for name, module in FAMILIES.items():
        introduction, _, rest = (module.__doc__ or "").partition("Checkpoints: ")
        rows.append((name, _first_sentence(introduction), _first_sentence(rest)))
    return "Families", ("model_type", "what it is", "checkpoints"), rows


def as_markdown(table: Table) -> str:
    """A table's columns and rows in Markdown, without its title."""
    _, columns, rows = table
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def kernels() -> Table:
    """For one bfloat16 layer of OLMoE's shape: which implementation of each op runs here, and why others do not."""
    rows: list[tuple[str, ...]] = []
    for tokens in TOKENS:
        for op, choices in _explained(tokens).items():
            chosen = next(name for name, reason in choices if reason is None)
            reasons = "; ".join(f"{name}: {reason}" for name, reason in choices if reason is not None)
            rows.append((f"{op}, {tokens} token{'s' if tokens > 1 else ''}", chosen, reasons))
    device = dispatch.current_device()
    return f"Kernels on {device.kind}", ("op", "runs", "why not the others"), rows


def _explained(tokens: int) -> dict[str, list[tuple[str, str | None]]]:
    def array(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    x_TD = array(tokens, WIDTH)
    routing = Routing(
        weights_TA=array(tokens, ACTIVE, dtype=jnp.float32),
        experts_TA=array(tokens, ACTIVE, dtype=jnp.int32),
        logits_TE=array(tokens, EXPERTS, dtype=jnp.float32),
    )
    up_EGFD, down_EDF = array(EXPERTS, 2, HIDDEN_WIDTH, WIDTH), array(EXPERTS, WIDTH, HIDDEN_WIDTH)
    found = {
        "matvec": explain_matvec(x_TD, (array(HEADS * HEAD_WIDTH, WIDTH),) * 3, norm_weight_I=array(WIDTH)),
        "route": explain_route(x_TD, array(EXPERTS, WIDTH), rule=RoutingRule(top_k=ACTIVE)),
        "experts": explain_experts(x_TD, routing, up_EGFD, down_EDF),
    }
    return (found | {"decode_attention": _explained_attention(array)}) if tokens == 1 else found


def _explained_attention(array: Callable[..., Any]) -> list[tuple[str, str | None]]:
    """Of one request; what reads prompts is no kernel of ours."""
    projected, cache = array(1, HEADS * HEAD_WIDTH), array(1, HEADS, POSITIONS, HEAD_WIDTH)
    angles = array(1, HEAD_WIDTH // 2, dtype=jnp.float32)
    norm = array(HEADS * HEAD_WIDTH)
    return explain_decode_attention(
        *(projected,) * 3,
        *(angles,) * 2,
        *(cache,) * 2,
        array(1, dtype=jnp.int32),
        q_norm_weight=norm,
        k_norm_weight=norm,
    )


def _first_sentence(docstring: str) -> str:
    return " ".join(docstring.split()).split(". ")[0].rstrip(".")
