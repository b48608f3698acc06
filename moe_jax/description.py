"""What the package can do, told from the code itself: the tables of `moe-jax info` and of the README."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from moe_jax.models import FAMILIES
from pallas_kernels import Routing, RoutingRule, dispatch
from pallas_kernels.experts import explain as explain_experts
from pallas_kernels.route import explain as explain_route

Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]

# One layer of OLMoE-1B-7B, at the token counts of decoding one request and of reading a prompt.
TOKENS = (1, 4096)
WIDTH, HIDDEN_WIDTH, EXPERTS, ACTIVE = 2048, 1024, 64, 8


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
            rows.append((f"{op}, {tokens} tokens", chosen, reasons))
    device = dispatch.current_device()
    return f"Kernels on {device.kind}", ("op", "runs", "why not the others"), rows


def _explained(tokens: int) -> dict[str, list[tuple[str, str | None]]]:
    def array(*shape: int, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    x_TD = array(tokens, WIDTH)
    routing = Routing(
        weights_TA=array(tokens, ACTIVE, dtype=jnp.float32),
        experts_TA=array(tokens, ACTIVE, dtype=jnp.int32),
        logits_TE=array(tokens, EXPERTS, dtype=jnp.float32),
    )
    up_EGFD, down_EDF = array(EXPERTS, 2, HIDDEN_WIDTH, WIDTH), array(EXPERTS, WIDTH, HIDDEN_WIDTH)
    return {
        "route": explain_route(x_TD, array(EXPERTS, WIDTH), rule=RoutingRule(top_k=ACTIVE)),
        "experts": explain_experts(x_TD, routing, up_EGFD, down_EDF),
    }


def _first_sentence(docstring: str) -> str:
    return " ".join(docstring.split()).split(". ")[0].rstrip(".")
