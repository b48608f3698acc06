"""Makes the tables and pictures of whole-model generation from what was measured.

    python scripts/plot_generate.py docs/benchmarks/h200

By default the folder of the device at hand. Reads, as far as they are there, generate.jsonl (benchmark_generate.py),
profile.jsonl (profile_step.py), experts_sweep.jsonl and anchors.jsonl (other systems, with their dates). Writes
generate.md, and generate.png, operators.png and experts_sweep.png where there is something to show. Of a point measured
more than once, the last counts.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pallas_kernels import timing

Record = dict[str, Any]

COLOURS = {"ours": "#1b6ca8", "vllm": "#d1495b", "hf": "#c9a227", "floor": "#9aa5b1", "student": "#8d6a9f"}
# One colour for an operator in every bar.
OPERATOR_COLOURS = (
    "#1b6ca8", "#5fa8d3", "#cae9ff", "#d1495b", "#edae49", "#66a182", "#8d6a9f", "#c9b79c", "#2e4057", "#b5c99a",
)  # fmt: skip
GAPS = "gaps"


def read(path: pathlib.Path) -> list[Record]:
    """The records of a file without errors; none where there is no file."""
    return [record for record in lines_of(path) if "error" not in record]


def lines_of(path: pathlib.Path) -> list[Record]:
    """All records of a file, those of errors too; none where there is no file.

    Raises:
      ValueError: a line is not a whole record, as where a run was killed while it wrote.
    """
    records = []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: expected a JSON object, got {line[:40]!r}: {error}") from None
    return records


def last(records: Iterable[Record], *keys: str) -> dict[tuple, Record]:
    """The last record of each combination of the keys' values, in order of appearance."""
    return {tuple(record.get(key) for key in keys): record for record in records}


def days(records: Iterable[Record]) -> str:
    """When records were measured: the first day and the last, if they differ."""
    dates = sorted({record["date"][:10] for record in records})
    return dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"


class Others:
    """What other systems reached at a point."""

    def __init__(self, anchors: list[Record]):
        self.anchors = anchors

    def ms(self, source: str, kind: str, point: Record, *, variant: str | None = None) -> float | None:
        """The least milliseconds of a source at a point's model, batch and prompt, on the same GPU model."""
        found = [
            anchor["ms"]
            for anchor in self.anchors
            if anchor["source"].startswith(source)
            and anchor["kind"] == kind
            and anchor["device"] in point["device"]
            and all(anchor[key] == point[key] for key in ("model", "batch", "prompt"))
            and (variant is None or anchor.get("variant") == variant)
        ]
        return min(found, default=None)

    def described(self) -> list[str]:
        """One line for each source: what it is and when it was measured."""
        told = {
            f"- {anchor['source']} on an {anchor['device']}, {anchor.get('date', 'no date known')}: {anchor['about']}."
            for anchor in self.anchors
        }
        return sorted(told)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return ["| " + " | ".join(map(str, cells)) + " |" for cells in lines]


def ms(value: float | None) -> str:
    """Three figures: 0.412, 3.86, 17.9, 238; empty where there is none."""
    if value is None:
        return ""
    return (
        f"{value:.3f}"
        if value < 1
        else f"{value:.2f}"
        if value < 10
        else f"{value:.1f}"
        if value < 100
        else f"{value:.0f}"
    )


def times(theirs: float | None, ours: float) -> str:
    return "" if theirs is None else f"{theirs / ours:.2f} x"


def decode_table(points: list[Record], others: Others) -> list[str]:
    rows = []
    for point in points:
        vllm, hf = (others.ms(source, "decode", point) for source in ("vLLM", "transformers"))
        ours = point["ms_per_token"]
        rows.append(
            (
                point["model"], point["batch"], f"{point['active_experts']:.1f}", ms(point["floor_ms"]), ms(ours),
                f"{point['fraction_of_floor']:.0%}", ms(vllm), times(vllm, ours), ms(hf), times(hf, ours),
                ms(point["first_token_ms"]),
            )
        )  # fmt: skip
    columns = ("model", "batch", "active experts", "floor", "moe-jax", "of the floor", "vLLM", "vLLM / moe-jax",
               "HF, best", "HF / moe-jax", "first token")  # fmt: skip
    return markdown(columns, rows)


def prefill_table(points: list[Record], others: Others) -> list[str]:
    rows = []
    for point in points:
        vllm, hf = (others.ms(source, "prefill", point) for source in ("vLLM", "transformers"))
        shape = f"{point['batch']} x {point['prompt']}"
        own = (ms(point["ms"]), f"{point['fraction_of_floor']:.0%}" if "fraction_of_floor" in point else "")
        rows.append((point["model"], shape, *own, ms(vllm), times(vllm, point["ms"]), ms(hf)))
    return markdown(("model", "prompts", "moe-jax", "of the limit", "vLLM", "vLLM / moe-jax", "HF grouped_mm"), rows)


def prefills(records: list[Record]) -> list[Record]:
    """Prefill points; the first token of a decode point with one request is a prefill too."""
    first = [
        {key: record[key] for key in ("model", "batch", "prompt", "device")} | {"ms": record["first_token_ms"]}
        for record in records
        if record["kind"] == "decode" and record["batch"] == 1
    ]
    measured = [record for record in records if record["kind"] == "prefill"]
    return sorted(
        last([*first, *measured], "model", "batch", "prompt").values(),
        key=lambda point: (names(records).index(point["model"]), point["batch"] * point["prompt"]),
    )


def end_to_end_table(point: Record, others: Others) -> list[str]:
    rows = [("moe-jax", point["device"], ms(point["ms_per_token"]))]
    for anchor in others.anchors:
        if anchor["kind"] == "end_to_end":
            variant = f", {anchor['variant']}" if "variant" in anchor else ""
            rows.append((anchor["source"] + variant, anchor["device"], ms(anchor["ms"])))
    return markdown(("system", "device", "ms per token"), rows)


def baseline_table(records: list[Record]) -> list[str]:
    rows = [
        (
            point["model"],
            point["batch"],
            point["variant"],
            ms(point["ms_per_token"]),
            f"{point['times_ours']:.1f} x",
            f"{point['requests_equal']} of {point['requests_compared']}",
            parting(point["partings"]),
        )
        for point in records
    ]
    columns = ("model", "batch", "experts", "ms per token", "/ moe-jax", "continuations equal", "first parting")
    return markdown(columns, rows)


def parting(partings: list[Record]) -> str:
    if not partings:
        return ""
    first = min(partings, key=lambda each: each["token"])
    return f"token {first['token']}, logits {first['gap'] / first['spacing']:.1f} bfloat16 spacings apart"


def memory_table(points: list[Record]) -> list[str]:
    parts = ("parameters", "cache", "temporary", "peak")
    rows = [
        (
            point["model"],
            point["batch"],
            point["prompt"] + point["new_tokens"],
            *(f"{point['memory_gb'][part]:.2f}" for part in parts),
        )
        for point in points
    ]
    return markdown(("model", "batch", "positions", *parts), rows)


def subject(profile: Record) -> str:
    """What was profiled."""
    if profile["phase"] == "prefill":
        return f"{profile['model']}, reading {profile['batch']} x {profile['prompt']}"
    return f"{profile['model']}, batch {profile['batch']}"


def operator_tables(profiles: list[Record], others: Others) -> list[str]:
    lines = []
    for profile in profiles:
        total = profile["step_us"]
        title = f"{subject(profile)}: {total:,.0f} us, {profile['launches']:.0f} launches"
        rows = [(name, f"{us:.1f}", f"{us / total:.1%}") for name, us in profile["operators_us"].items()]
        lines += ["", title, "", *markdown(("operator", "us", "share"), rows)]
        lines += ["", f"jax {profile['jax']}, {profile['date'][:10]}; {profile['note']}."] if "note" in profile else []
    student = [
        anchor for anchor in others.anchors if anchor["source"].startswith("FlexFlow") and "experts" not in anchor
    ]
    for anchor in student:
        lines += ["", f"{anchor['source']} on an {anchor['device']} took {1e3 * anchor['ms']:,.0f} us for a token of the "
                  f"same model ({anchor['model']})."]  # fmt: skip
    return lines


def sweep_table(sweep: list[Record]) -> list[str]:
    return markdown(
        ("experts", "active", "ms per token"), [(p["experts"], p["active"], ms(p["ms_per_token"])) for p in sweep]
    )


def names(records: list[Record]) -> list[str]:
    """Models, the smallest first."""
    size_gb = {record["model"]: record["memory_gb"]["parameters"] for record in records if "memory_gb" in record}
    return sorted(dict.fromkeys(record["model"] for record in records), key=lambda model: size_gb.get(model, 0.0))


def failed_lines(path: pathlib.Path) -> list[str]:
    """Points whose last record is an error, so that nothing is missing in silence."""
    latest = last(lines_of(path), *KEYS).values()
    return [
        f"- {record['model']}, {record.get('variant', record['kind'])}, {record['batch']} x {record['prompt']}: "
        f"{record['error']}"
        for record in latest
        if "error" in record
    ]


def page(records: list[Record], profiles: list[Record], sweep: list[Record], others: Others, failed: list[str]) -> str:
    """All tables, each where there is something to show."""
    one = (records + profiles + sweep)[0]
    best = timing.ceilings(one["device"])
    decode = decode_points(records)
    compared = [record for record in records if record["kind"] == "baseline"]
    student = [record for record in records if record["kind"] == "end_to_end"]
    large = [record for record in records if record["kind"] == "large_cache"]
    sections: list[tuple[bool, str, str, Callable[[], list[str]]]] = [
        (bool(decode), "Decoding, milliseconds for a step of all requests",
         "Prompts of 128 tokens, greedy, from token 32 to the last. Floor: the bytes of attention, routers, head, cache and of "
         f"the experts that were active (counted at every step) at {best.read_bytes_per_s / 1e12:.3g} TB/s."
         "\n\n![Milliseconds against batch](generate.png)",
         lambda: decode_table(decode, others)),
        (bool(prefills(records)), "Reading prompts, milliseconds",
         f"Limit: the bytes or the FLOPs at {best}, whichever takes longer.",
         lambda: prefill_table(prefills(records), others)),
        (bool(student), "End to end, as the student project measured",
         "TinyMistral, a prompt of 10 tokens, 128 new ones, everything included.",
         lambda: end_to_end_table(student[-1], others)),
        (bool(compared), "transformers on the same weights, in the same process",
         "Where greedy continuations part, the two tokens' logits are compared: bfloat16 rounds within a few spacings.",
         lambda: baseline_table(compared)),
        (bool(profiles), "Where a step goes", "![Operators of a step](operators.png)",
         lambda: operator_tables(profiles, others)),
        (bool(sweep), "More experts",
         "TinyMistral, a prompt of 10 tokens, one request.\n\n![Latency against experts](experts_sweep.png)",
         lambda: sweep_table(sweep)),
        (bool(failed), "What failed", "The last attempt at each of these points ended so.", lambda: failed),
        (bool(decode), "Memory, gigabytes", "Peak is the device's, weights and cache included.",
         lambda: memory_table([*decode, *large])),
    ]  # fmt: skip
    lines = [
        f"# Generation on an {one['device']}", "",
        f"jax {one['jax']}, {days(records + profiles + sweep)}, {one['dtype']}, random weights N(0, 0.02).",
        "Made by `scripts/plot_generate.py` from the JSON lines beside it.", "",
    ]  # fmt: skip
    for is_there, title, text, table in sections:
        if is_there:
            lines += [f"## {title}", "", text, "", *table(), ""]
    if others.anchors:
        lines += ["## The others", "", *others.described(), ""]
    return "\n".join(lines)


def decode_points(records: list[Record]) -> list[Record]:
    order = names(records)
    points = [record for record in records if record["kind"] == "decode"]
    return sorted(points, key=lambda point: (order.index(point["model"]), point["batch"]))


def plots() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def logarithmic(panel: Any) -> None:
    """Milliseconds on a logarithmic axis, with 1, 2 and 5 of each decade written out."""
    from matplotlib import ticker

    panel.set_yscale("log")
    panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.minorticks_off()


def bare(panel: Any) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_axisbelow(True)


def decode_picture(points: list[Record], others: Others, path: pathlib.Path) -> None:
    """A panel for each model: batch against milliseconds for a step, ours, the floor, vLLM and transformers."""
    pyplot = plots()
    models = names(points)
    figure, panels = pyplot.subplots(1, len(models), figsize=(3.4 * len(models), 3.5), squeeze=False)
    for panel, model in zip(panels[0], models, strict=True):
        own = [point for point in points if point["model"] == model]
        series = {
            "hf": ("HF transformers, best", [others.ms("transformers", "decode", point) for point in own]),
            "vllm": ("vLLM", [others.ms("vLLM", "decode", point) for point in own]),
            "floor": ("floor (memory)", [point["floor_ms"] for point in own]),
            "ours": ("moe-jax", [point["ms_per_token"] for point in own]),
        }
        for name, (label, values) in series.items():
            known = [(point["batch"], value) for point, value in zip(own, values, strict=True) if value is not None]
            if known:
                style = "--" if name == "floor" else "o-"
                width = 2.4 if name == "ours" else 1.3
                panel.plot(
                    *zip(*known, strict=True), style, color=COLOURS[name], label=label, linewidth=width, markersize=4
                )
        batches = [point["batch"] for point in own]
        panel.set_xscale("log", base=2)
        panel.set_xticks(batches, [str(batch) for batch in batches])
        logarithmic(panel)
        panel.set_title(model, loc="left", fontsize=10)
        panel.set_xlabel("batch", fontsize=9)
        panel.grid(axis="y", color="#e5e8eb")
        bare(panel)
    panels[0][0].set_ylabel("ms for a step of all requests", fontsize=9)
    finish(figure, panels, path)


def finish(figure: Any, panels: Any, path: pathlib.Path, *, columns: int = 5) -> None:
    """One legend above all panels, and the file."""
    labels = {
        label: handle for panel in panels.flat for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        labels.values(), labels.keys(), loc="upper center", ncols=min(columns, len(labels)), frameon=False, fontsize=9
    )
    rows = -(-len(labels) // columns)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.27 * rows / figure.get_figheight()))
    figure.savefig(path, dpi=150)


def operators_picture(profiles: list[Record], path: pathlib.Path) -> None:
    """A bar for each profile, cut into operators; gaps last and pale."""
    pyplot = plots()
    figure, panels = pyplot.subplots(1, 1, figsize=(9, 1.3 + 0.55 * len(profiles)), squeeze=False)
    panel = panels[0][0]
    operators = list(dict.fromkeys(name for profile in profiles for name in profile["operators_us"] if name != GAPS))
    colours = dict(zip(operators, OPERATOR_COLOURS, strict=False)) | {GAPS: "#e5e8eb"}
    for row, profile in enumerate(profiles):
        left = 0.0
        # The step; where kernels overlap, and gaps come out below zero, the kernels.
        whole_us = sum(max(0.0, us) for us in profile["operators_us"].values())
        for name in (*operators, GAPS):
            us = max(0.0, profile["operators_us"].get(name, 0.0))
            share = 100 * us / whole_us
            label = name if row == 0 or all(name not in each["operators_us"] for each in profiles[:row]) else None
            panel.barh(row, share, left=left, height=0.62, color=colours.get(name, "#444"), label=label)
            if share > 4:
                dark = name in operators and colours.get(name) in ("#1b6ca8", "#d1495b", "#2e4057", "#8d6a9f")
                panel.text(left + share / 2, row, f"{us:.0f}", ha="center", va="center", fontsize=8,
                           color="white" if dark else "black")  # fmt: skip
            left += share
    titles = [f"{subject(each)}\n{each['step_us']:,.0f} us" for each in profiles]
    panel.set_yticks(range(len(profiles)), titles, fontsize=9)
    panel.invert_yaxis()
    panel.set_xlabel("% of a decode step, or of reading the prompts (microseconds inside)", fontsize=9)
    panel.set_xlim(0, 100)
    bare(panel)
    finish(figure, panels, path)


def sweep_picture(sweep: list[Record], others: Others, path: pathlib.Path) -> None:
    """Latency against experts: ours, and the student project's line, on one logarithmic axis."""
    pyplot = plots()
    figure, panels = pyplot.subplots(1, 1, figsize=(6.4, 4.0), squeeze=False)
    panel = panels[0][0]
    student = sorted((a["experts"], a["ms"]) for a in others.anchors if a["kind"] == "experts_sweep")
    series = [("student", "student project (FlexFlow Serve, one L4): experts one after another", student)]
    series.append(("ours", f"moe-jax, {sweep[0]['device']}", [(p["experts"], p["ms_per_token"]) for p in sweep]))
    for name, label, points in series:
        if points:
            panel.plot(*zip(*points, strict=True), "o-", color=COLOURS[name], label=label, linewidth=2.2)
            for at in (points[0], points[-1]):
                panel.annotate(
                    f"{ms(at[1])} ms", at, textcoords="offset points", xytext=(0, 8), ha="center", fontsize=9
                )
    logarithmic(panel)
    panel.set_ylim(min(p["ms_per_token"] for p in sweep) / 2, 2 * max(y for _, _, points in series for _, y in points))
    panel.set_xticks([p["experts"] for p in sweep])
    panel.set_xlim(0.5, sweep[-1]["experts"] + 0.5)
    panel.set_xlabel("experts of each layer (two active where there are two)", fontsize=9)
    panel.set_ylabel("ms per token, TinyMistral", fontsize=9)
    panel.grid(axis="y", color="#e5e8eb")
    bare(panel)
    finish(figure, panels, path, columns=1)


KEYS = ("kind", "model", "batch", "prompt", "variant")  # of a point; the last record of each counts


def summary_table(folder: pathlib.Path) -> list[str]:
    """Milliseconds for a decode step, ours and vLLM's, a row for each model and a column for each batch."""
    points = decode_points(list(last(read(folder / "generate.jsonl"), *KEYS).values()))
    others = Others(read(folder / "anchors.jsonl"))
    batches = sorted({point["batch"] for point in points})
    rows = []
    for model in names(points):
        of_batch = {point["batch"]: point for point in points if point["model"] == model}
        cells = []
        for batch in batches:
            point = of_batch.get(batch)
            vllm = others.ms("vLLM", "decode", point) if point else None
            beside = f" ({ms(vllm)})" if vllm else ""
            cells.append(f"{ms(point['ms_per_token'])}{beside}, {point['fraction_of_floor']:.0%}" if point else "")
        rows.append((model, *cells))
    return markdown(("model", *(f"batch {batch}" for batch in batches)), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=pathlib.Path, help="where the JSON lines are")
    folder = parser.parse_args().folder or timing.results_path("generate.jsonl").parent
    records = list(last(read(folder / "generate.jsonl"), *KEYS).values())
    profiled = ({"phase": "decode"} | record for record in read(folder / "profile.jsonl"))
    profiles = list(last(profiled, "model", "phase", "batch", "prompt").values())
    sweep = sorted(last(read(folder / "experts_sweep.jsonl"), "experts").values(), key=lambda each: each["experts"])
    if not (records or profiles or sweep):
        raise SystemExit(
            f"expected generate.jsonl, profile.jsonl or experts_sweep.jsonl with records in {folder}, got none"
        )
    others = Others(read(folder / "anchors.jsonl"))
    (folder / "generate.md").write_text(page(records, profiles, sweep, others, failed_lines(folder / "generate.jsonl")))
    written = ["generate.md"]
    if decode := decode_points(records):
        decode_picture(decode, others, folder / "generate.png")
        written.append("generate.png")
    if profiles:
        operators_picture(profiles, folder / "operators.png")
        written.append("operators.png")
    if sweep:
        sweep_picture(sweep, others, folder / "experts_sweep.png")
        written.append("experts_sweep.png")
    print(f"wrote {', '.join(written)} in {folder}")


if __name__ == "__main__":
    main()
