"""Draws one diagram for each strategy: what four devices hold, and how tokens meet experts.

    python scripts/draw_strategies.py

Everything is drawn from the tables of sharding/strategies.py: eight experts on a mesh of ep=2, tp=2. Writes SVGs to
docs/pictures/.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import matplotlib
import tyro

from sharding.formulas import Split
from sharding.strategies import STRATEGIES

matplotlib.use("Agg")
matplotlib.rcParams["svg.hashsalt"] = "strategies"  # the same picture gives the same file
from matplotlib import pyplot  # noqa: E402
from matplotlib.patches import FancyBboxPatch, Rectangle  # noqa: E402

EXPERTS, EP, TP = 8, 2, 2
TOKEN_COLOURS = ("#e07a5f", "#f2cc8f", "#81b29a", "#3d6b99")
HELD, ABSENT, LINE = "#1b6ca8", "#eef1f4", "#3c4650"

# What happens to tokens before and after the experts, in words; in brackets the collective.
STEPS = {
    "all_reduce": ("every device has all tokens", "sum over all devices (all-reduce)"),
    "gather_scatter": ("own tokens to everyone (all-gather)", "sums back to their owners (reduce-scatter)"),
    "all_to_all": (
        "tokens to their experts' devices (all-to-all)",
        "results back, summed by their owners (all-to-all)",
    ),
    "ragged_all_to_all": (
        "only rows that exist, to their experts (ragged all-to-all)",
        "results back, summed by their owners (ragged all-to-all)",
    ),
}
WITH_TP = ("all-to-all over ep, all-gather over tp", "reduce-scatter over tp, all-to-all over ep")


@dataclasses.dataclass(frozen=True)
class Options:
    """Where to."""

    output: Path = Path("docs/pictures")


def device(axes, x: float, split: Split, ep: int, tp: int) -> None:
    """One device: its tokens, and its share of every expert (a column for each, its hidden width from top to bottom)."""
    number = ep * TP + tp
    axes.add_patch(FancyBboxPatch((x, 0), 2.5, 3.0, boxstyle="round,pad=0.06", fill=False, edgecolor="#9aa5b1"))
    axes.text(x + 1.25, 3.2, f"device {number}  (ep {ep}, tp {tp})", ha="center", fontsize=8, color=LINE)
    tokens = (number,) if split.row.tokens else range(EP * TP)
    for place in range(EP * TP):
        colour = TOKEN_COLOURS[place] if place in tokens else ABSENT
        axes.add_patch(Rectangle((x + 0.15 + 0.56 * place, 2.35), 0.5, 0.4, color=colour))
    part, column = index(split.row.experts, ep, tp), index(split.row.expert_mlp, ep, tp)
    local, height = split.local_experts(EXPERTS), 1.5 / split.column_parts
    for expert in range(EXPERTS):
        left = x + 0.15 + 0.28 * expert
        axes.add_patch(Rectangle((left, 0.35), 0.23, 1.5, color=ABSENT))
        if expert // local == part:
            axes.add_patch(Rectangle((left, 1.85 - height * (column + 1)), 0.23, height, color=HELD))
        axes.text(left + 0.115, 0.2, str(expert), ha="center", va="center", fontsize=6, color=LINE)


def step(axes, y: float, text: str) -> None:
    """What happens between the devices: a band across all of them."""
    left, right = 1.0, 1.15 + 2.85 * EP * TP - 0.2
    axes.add_patch(Rectangle((left, y - 0.18), right - left, 0.36, color="#f5ecdb", zorder=2))
    axes.text((left + right) / 2, y, text, ha="center", va="center", fontsize=8.5, color=LINE, zorder=3)


def index(names: tuple[str, ...], ep: int, tp: int) -> int:
    """A device's number along these axes; the first is the slowest."""
    return {(): 0, ("ep",): ep, ("tp",): tp, ("ep", "tp"): ep * TP + tp}[names]


def diagram(name: str):
    split = Split(name, ep=EP, tp=TP)
    exchange = split.row.exchange.__name__
    before, after = WITH_TP if exchange == "all_to_all" and split.row.expert_mlp else STEPS[exchange]
    figure, axes = pyplot.subplots(figsize=(8.6, 2.9))
    for number in range(EP * TP):
        device(axes, 1.15 + 2.85 * number, split, *divmod(number, TP))
    axes.text(1.0, 2.55, "tokens", ha="right", va="center", fontsize=8, color=LINE)
    axes.text(1.0, 1.1, "experts", ha="right", va="center", fontsize=8, color=LINE)
    step(axes, 2.1, f"▼  {before}")
    step(axes, -0.4, f"▲  {after}")
    axes.set_title(name, loc="left", fontsize=12, fontweight="bold", color=LINE)
    axes.set_xlim(0, 12.6)
    axes.set_ylim(-0.75, 3.5)
    axes.axis("off")
    figure.tight_layout()
    return figure


def main(options: Options) -> None:
    options.output.mkdir(parents=True, exist_ok=True)
    for name in STRATEGIES:
        path = options.output / f"strategy_{name}.svg"
        figure = diagram(name)
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)
        print(f"wrote {path}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
