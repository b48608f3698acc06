"""Makes the table and the roofline picture of the kernels from what scripts/benchmark_kernels.py measured.

    python scripts/plot_kernels.py docs/benchmarks/h200/kernels.jsonl

By default those of the device at hand. Writes kernels.md and kernels.png beside the JSON lines; of a point measured more
than once, the last counts, and of each baseline.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from plot_generate import days, lines_of

from pallas_kernels import timing

Records = dict[str, dict[int, dict[str, Any]]]

COLOURS = {"ours": "#1b6ca8", "torch": "#d1495b", "tokamax": "#8d6a9f", "ragged_dot": "#9aa5b1", "xla": "#c9b79c"}
LABELS = {
    "ours": "moe-jax",
    "torch": "torch grouped_mm",
    "tokamax": "tokamax",
    "ragged_dot": "lax.ragged_dot",
    "xla": "XLA",
}


def read(path: pathlib.Path) -> Records:
    """Records by shape and token count.

    Raises:
      ValueError: there are none.
    """
    records: Records = {}
    for record in lines_of(path):
        if "error" not in record:
            by_tokens = records.setdefault(record["shape"], {})
            earlier = by_tokens.get(record["tokens"], {})
            baselines_us = earlier.get("baselines_us", {}) | record.get("baselines_us", {})
            by_tokens[record["tokens"]] = earlier | record | {"baselines_us": baselines_us}
    measured = {
        shape: {tokens: record for tokens, record in sorted(by_tokens.items()) if "time_us" in record}
        for shape, by_tokens in records.items()
    }
    if not any(measured.values()):
        raise ValueError(f"{path}: expected JSON lines with a shape, tokens and a time, found none")
    return {shape: by_tokens for shape, by_tokens in measured.items() if by_tokens}


def table(records: Records) -> str:
    """Markdown: first microseconds and fractions of the floor, then the same layers by other means."""
    tokens = sorted({count for by_tokens in records.values() for count in by_tokens})
    points = [record for by_tokens in records.values() for record in by_tokens.values()]
    one = points[0]
    lines = [
        f"# One MoE layer on an {one['device']}",
        "",
        f"jax {one['jax']}, {days(points)}, bfloat16, uniform random routing, weights rotated past the L2 cache.",
        "Made by `scripts/plot_kernels.py` from `kernels.jsonl`, which `scripts/benchmark_kernels.py` measured.",
        "",
        "Microseconds of device time with routing, and the fraction of the floor: the bytes of the active experts",
        f"and the gate or the FLOPs, whichever takes longer, at {timing.ceilings(one['device'])}. Times are sums",
        "over kernels, without the gaps between launches, about a microsecond each in a CUDA graph (torch is timed with",
        "its gaps, in a graph).",
        "",
        *_rows(
            "shape", tokens, {shape: [_own(by_tokens.get(n)) for n in tokens] for shape, by_tokens in records.items()}
        ),
        "",
        "![Fraction of the floor against tokens](kernels.png)",
        "",
        "The same layers by other means on the same GPU, in microseconds.",
        "",
    ]
    compared = [n for n in tokens if any(by.get(n, {}).get("baselines_us") for by in records.values())]
    others = {
        f"{shape}, {LABELS[name]}": [_other(by_tokens.get(n), name) for n in compared]
        for shape, by_tokens in records.items()
        for name in LABELS
        if name != "ours" and any(name in record.get("baselines_us", {}) for record in by_tokens.values())
    }
    lines += _rows("layer", compared, others)
    return "\n".join(lines) + "\n"


def _rows(title: str, tokens: list[int], cells: dict[str, list[str]]) -> list[str]:
    header = [f"| {title} | " + " | ".join(map(str, tokens)) + " |", "|---" + "|---:" * len(tokens) + "|"]
    return header + [f"| {name} | " + " | ".join(row) + " |" for name, row in cells.items()]


def _own(record: dict[str, Any] | None) -> str:
    return f"{_us(record['time_us'])} ({record['fraction_of_floor']:.0%})" if record else ""


def _other(record: dict[str, Any] | None, name: str) -> str:
    time_us = (record or {}).get("baselines_us", {}).get(name)
    return _us(time_us) if time_us else ""


def _us(time_us: float) -> str:
    return f"{time_us:.1f}" if time_us < 100 else f"{time_us:,.0f}"


def fractions(by_tokens: dict[int, dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Token counts, and the fraction of the floor that `name` reaches there, in percent."""
    times_us = {
        count: record["time_us"] if name == "ours" else record.get("baselines_us", {}).get(name)
        for count, record in by_tokens.items()
    }
    measured = [count for count, time_us in times_us.items() if time_us]
    return measured, [100 * by_tokens[count]["floor_us"] / times_us[count] for count in measured]


def picture(records: Records, path: pathlib.Path) -> None:
    """One panel for each shape: tokens against the fraction of the floor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(4, len(records))
    rows = -(-len(records) // columns)
    figure, panels = pyplot.subplots(
        rows, columns, figsize=(3.4 * columns, 2.6 * rows + 0.6), sharey=True, squeeze=False
    )
    for panel, (shape, by_tokens) in zip(panels.flat, records.items(), strict=False):
        for name, colour in reversed(COLOURS.items()):
            counts, percent = fractions(by_tokens, name)
            style = dict(linewidth=2.4, markersize=5) if name == "ours" else dict(linewidth=1.2, markersize=3)
            if counts:
                panel.plot(counts, percent, "o-", color=colour, label=LABELS[name], **style)
        panel.set_xscale("log", base=2)
        panel.set_xticks([1, 8, 64, 512, 4096], ["1", "8", "64", "512", "4096"])
        panel.set_title(shape, loc="left", fontsize=10)
        panel.set_ylim(0, 105)
        panel.grid(axis="y", color="#e5e8eb")
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels.flat[len(records) :]:
        panel.set_visible(False)
    for panel in panels[:, 0]:
        panel.set_ylabel("% of the floor", fontsize=9)
    for panel in panels[-1]:
        panel.set_xlabel("tokens", fontsize=9)
    names = {
        label: handle for panel in panels.flat for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    shown = [label for label in LABELS.values() if label in names]
    figure.legend(
        [names[label] for label in shown], shown, loc="upper center", ncols=len(shown), frameon=False, fontsize=9
    )
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.35 / figure.get_figheight()))
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="?", type=pathlib.Path, help="JSON lines of scripts/benchmark_kernels.py")
    path = parser.parse_args().records or timing.results_path("kernels.jsonl")
    records = read(path)
    path.with_suffix(".md").write_text(table(records))
    picture(records, path.with_suffix(".png"))
    print(f"wrote {path.with_suffix('.md')} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
