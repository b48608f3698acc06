"""Compares ways to split a Mixture-of-Experts model over devices: memory, bytes on the wire, predicted time.

    python scripts/compare_sharding.py --model configs/qwen3-30b-a3b.json --devices 8,64,512 --hardware h200

Every strategy on every dp x ep x tp of the devices. `--batch` is requests per device (each value is compared), `--context`
their tokens: a decode step advances each by one, a prefill step reads them all. `--level` says how the bytes of the MoE
layer are counted for the rows of the table: by formula, in the trace (jaxpr), or in the program compiled for that many CPU
devices (cpu) or GPUs (gpu, none needed). Times are predicted from the constants of sharding/machines/<hardware>.json.
Prints a table, the recommended split first; writes JSON lines (every split, with the reason where it cannot run) and three
pictures to --output.

    JAX_NUM_CPU_DEVICES=8 python scripts/compare_sharding.py --run --hardware cpu

executes one MoE layer under every strategy on the devices that are there, and puts measured beside predicted;
`--calibrate FILE` fits a machine's constants to such lines, or to those of scripts/benchmark_kernels.py, and saves them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import lax
from jax.sharding import PartitionSpec
from rich.console import Console
from rich.progress import track

from pallas_kernels import Routing, experts
from pallas_kernels.experts.cases import LAYERS
from sharding import account, cost_model, layer, machines
from sharding.cost_model import DECODE, ExpertPoint, Prediction, Work
from sharding.describe import ModelShape, model_shape
from sharding.formulas import Split, moe_collectives
from sharding.machines import Machine
from sharding.strategies import STRATEGIES

Level = Literal["analytic", "jaxpr", "cpu", "gpu"]
COLOURS = dict(
    zip(STRATEGIES, ("#d1495b", "#edae49", "#b5838d", "#1b6ca8", "#2a9d8f", "#8d6a9f", "#4a4e69"), strict=True)
)
RUN_TOKENS = (8, 32, 128)  # per device; three, as so many constants of the experts are fitted to them
RUN_SHAPE = ModelShape("layer", 1, 1, 256, 16, 2, 512, 8, 8, 32, 512, 0, 0, 0, 1024, True)
LINK_BYTES = (1 << 12, 1 << 16, 1 << 20, 1 << 22)


@dataclasses.dataclass(frozen=True)
class Options:
    """What to compare."""

    model: Path = Path("configs/qwen3-30b-a3b.json")
    devices: tuple[int, ...] = (8, 64, 512)
    hardware: str = "h200"
    phase: tuple[Literal["decode", "prefill"], ...] = ("decode", "prefill")
    batch: tuple[int, ...] = (1, 32)
    context: int = 4096
    strategy: tuple[str, ...] = ("all",)
    level: Level = "analytic"
    capacity_factor: float | None = 1.5  # of ep_a2a and eptp_dp; None drops nothing
    imbalance: float = 1.3  # busiest device against the mean; scripts/plan_placement.py measures it
    output: Path = Path("build/sharding")
    run: bool = False
    calibrate: Path | None = None


LISTS = ("--devices", "--phase", "--batch", "--strategy")


def spaced(arguments: list[str]) -> list[str]:
    """The arguments with lists as tyro reads them: `--devices 8,64` as `--devices 8 64`."""
    found, flag = [], ""
    for each in arguments:
        flag = each if each.startswith("--") else flag
        found += each.split(",") if flag in LISTS else [each]
    return found


def tracked(todo: list[Any], what: str) -> Iterable[Any]:
    """The items one by one; on a terminal a bar shows how far it is."""
    console = Console(stderr=True)
    return track(todo, what, console=console, disable=not console.is_terminal)


# ---------------------------------------------------------------- comparing


def rows_of(options: Options, shape: ModelShape, machine: Machine) -> list[dict[str, Any]]:
    """A row for every split, phase, batch and number of devices; the rows of the table counted at the level asked for."""
    names = tuple(STRATEGIES) if options.strategy == ("all",) else options.strategy
    unknown = sorted(set(names) - set(STRATEGIES))
    if unknown:
        raise ValueError(f"expected strategies among all, {', '.join(STRATEGIES)}, got {', '.join(unknown)}")
    if options.level == "cpu":
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", max(options.devices))
    rows, shown = [], []
    cases = list(itertools.product(options.devices, options.phase, options.batch))
    for devices, phase, batch in tracked(cases, "Predicting"):
        work = Work(phase, batch, options.context, options.capacity_factor, options.imbalance)
        found = [
            row_of(shape, machine, split, work) for split in cost_model.splits(devices, names, kv_heads=shape.kv_heads)
        ]
        rows += found
        shown += chosen(found)
    if options.level != "analytic":
        for row in tracked(shown, f"Counting in {options.level} programs"):
            recount(row, shape, machine, options)
    for group in grouped(shown).values():
        max(group, key=lambda row: row["tokens_per_s_per_device"])["is_recommended"] = True
    return rows


def row_of(shape: ModelShape, machine: Machine, split: Split, work: Work) -> dict[str, Any]:
    reasons = cost_model.problems(shape, machine, split, work)
    row = {
        "model": shape.name,
        "hardware": machine.name,
        "devices": split.devices,
        **dataclasses.asdict(work),
        **dataclasses.asdict(split),
        "mesh": split.mesh,
        "tensorrt_name": split.tensorrt_name,
        "is_feasible": not reasons,
        "reason": "; ".join(reasons),
        "is_recommended": False,
    }
    return row | (
        numbers(cost_model.predict(shape, machine, split, work)) | {"level": "analytic"} if not reasons else {}
    )


def numbers(predicted: Prediction) -> dict[str, Any]:
    return {
        "times_are": "predicted",
        **{f"{name}_ms": round(getattr(predicted, f"{name}_ms"), 4) for name in ("attention", "experts")},
        "communication_ms": round(predicted.communication_ms, 4),
        "rest_ms": round(predicted.rest_ms, 4),
        "total_ms": round(predicted.total_ms, 4),
        "tokens_per_s_per_device": round(predicted.tokens_per_s_per_device, 2),
        "within_node_bytes": round(predicted.within_bytes),
        "between_node_bytes": round(predicted.between_bytes),
        "weights_bytes": round(predicted.memory.weights),
        "cache_bytes": round(predicted.memory.cache),
        "temporary_bytes": round(predicted.memory.temporary),
    }


def grouped(rows: Iterable[dict[str, Any]]) -> dict[tuple, list[dict[str, Any]]]:
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["devices"], row["phase"], row["batch"]), []).append(row)
    return groups


def split_of(row: dict[str, Any]) -> Split:
    return Split(**{field.name: row[field.name] for field in dataclasses.fields(Split)})


def name_of(row: dict[str, Any]) -> str:
    """Its strategy, or that nothing is split."""
    return row["strategy"] if row["ep"] * row["tp"] > 1 else "copies"


def chosen(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows to show: copies without a split, and of each strategy its fastest split and its fastest over all devices."""
    able = sorted((row for row in rows if row["is_feasible"]), key=lambda row: -row["tokens_per_s_per_device"])
    found = [row for row in able if row["ep"] * row["tp"] == 1][:1]
    for name in STRATEGIES:
        split = [row for row in able if row["strategy"] == name and row["ep"] * row["tp"] > 1]
        found += split[:1]
        if split and split[0]["dp"] > 1:
            found += [row for row in split if row["dp"] == 1][:1]
    return found


def recount(row: dict[str, Any], shape: ModelShape, machine: Machine, options: Options) -> None:
    """Puts what a program has in place of the formulas: the MoE layer's collectives, and its temporary memory."""
    split = split_of(row)
    work = Work(row["phase"], row["batch"], row["context"], options.capacity_factor, options.imbalance)
    counted = count(options.level, split, shape, machine, work)
    predicted = cost_model.predict(
        shape, machine, split, work, moe=counted.collectives, temporary_bytes=counted.temporary_bytes
    )
    row |= numbers(predicted) | {"level": options.level}


def count(level: Level, split: Split, shape: ModelShape, machine: Machine, work: Work) -> account.Account:
    """One MoE layer's account at a level that needs a program."""
    meshes: dict[str, Callable[[], Any]] = {
        "jaxpr": lambda: layer.abstract_mesh(split),
        "cpu": lambda: present_mesh(split),
        "gpu": lambda: account.gpu_mesh(machine, split.sizes),
    }
    function, shapes = layer.moe_layer(
        split,
        meshes[level](),
        tokens=work.tokens * split.copy_devices,
        **layer_sizes(shape),
        capacity_factor=work.capacity_factor if split.row.has_capacity else None,
    )
    per_node = machine.devices_per_node
    if level == "jaxpr":
        return account.from_jaxpr(function, *shapes, devices_per_node=per_node)
    compiled = jax.jit(function).lower(*shapes).compile()
    width = shape.width if level == "cpu" else None
    return account.from_compiled(compiled, devices=split.devices, devices_per_node=per_node, width=width)


def layer_sizes(shape: ModelShape) -> dict[str, int]:
    return dict(width=shape.width, expert_width=shape.expert_width, experts=shape.experts, active=shape.active)


def present_mesh(split: Split):
    devices = jax.devices()[: split.devices]
    types = (jax.sharding.AxisType.Auto,) * len(split.sizes)
    return jax.make_mesh(tuple(split.sizes.values()), tuple(split.sizes), axis_types=types, devices=devices)


def table(rows: list[dict[str, Any]], context: int) -> str:
    """The shown rows, the recommended one of each group first, and why the others of a strategy cannot run."""
    lines = []
    for (devices, phase, batch), group in grouped(rows).items():
        lines += [f"\n{devices} devices, {phase}, {batch} x {context} tokens per device; times are predicted"]
        lines.append(
            f"  {'strategy':10} {'mesh':18} {'attention':9} {'TensorRT-LLM':12} {'memory GB':>9} {'in node':>9} {'between':>9} "
            f"{'attn ms':>8} {'experts':>8} {'comm':>8} {'rest':>6} {'total':>9} {'tokens/s/device':>15}"
        )
        shown = sorted(chosen(group), key=lambda row: -row["tokens_per_s_per_device"])
        for row in shown:
            memory_gb = (row["weights_bytes"] + row["cache_bytes"] + row["temporary_bytes"]) / 1e9
            name = name_of(row)
            lines.append(
                f"{'* ' if row['is_recommended'] else '  '}{name:10} {row['mesh']:18} {row['attention']:9} "
                f"{row['tensorrt_name']:12} {memory_gb:9.1f} {row['within_node_bytes'] / 1e6:6.1f} MB "
                f"{row['between_node_bytes'] / 1e6:6.1f} MB {row['attention_ms']:8.3f} {row['experts_ms']:8.3f} "
                f"{row['communication_ms']:8.3f} {row['rest_ms']:6.2f} {row['total_ms']:9.3f} "
                f"{row['tokens_per_s_per_device']:15,.0f}"
            )
        able = {row["strategy"] for row in group if row["is_feasible"] and row["dp"] == 1}
        for name in dict.fromkeys(row["strategy"] for row in group if row["strategy"] not in able):
            whole = [row for row in group if row["strategy"] == name and row["dp"] == 1]
            easiest = min(whole, key=lambda row: row["reason"].count(";"))
            lines.append(f"  {name:10} not over all {devices}: {easiest['reason']}")
    return "\n".join(lines)


# ---------------------------------------------------------------- pictures


def pictures(options: Options, shape: ModelShape, machine: Machine, rows: list[dict[str, Any]]) -> list[Path]:
    import matplotlib

    matplotlib.use("Agg")
    options.output.mkdir(parents=True, exist_ok=True)
    stem = f"{shape.name}_{machine.name}"
    drawn = [
        (options.output / f"{stem}_communication.png", lambda: communication(options, shape, machine)),
        (options.output / f"{stem}_pareto.png", lambda: pareto(options, shape, machine)),
        (options.output / f"{stem}_ep_tp.png", lambda: heat_map(options, shape, machine)),
    ]
    for path, draw in tracked(drawn, "Drawing"):
        figure = draw()
        figure.savefig(path, dpi=150, bbox_inches="tight")
    return [path for path, _ in drawn]


def _panels(columns: int, rows: int = 1, width: float = 4.6, height: float = 3.5):
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False)
    for panel in panels.flat:
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_axisbelow(True)
    return figure, list(panels.flat)


def communication(options: Options, shape: ModelShape, machine: Machine):
    """Bytes that a device sends in one MoE layer against the number of devices that share the experts."""
    figure, panels = _panels(len(options.phase))
    counts = [2**n for n in range(1, 10)]
    for panel, phase in zip(panels, options.phase, strict=True):
        work = Work(phase, options.batch[-1], options.context, options.capacity_factor)
        for name, colour in COLOURS.items():
            points = []
            for devices in counts:
                tp = min(4, devices) if name.startswith("eptp") else 1
                split = Split(name, ep=devices // tp, tp=tp)
                # Bytes need no memory, but an expert for each device, and columns for each part.
                if split.expert_parts > shape.experts or shape.expert_width % split.column_parts:
                    break
                found = moe_collectives(
                    split,
                    tokens=work.tokens * devices,
                    width=shape.width,
                    active=shape.active,
                    capacity_factor=work.capacity_factor if split.row.has_capacity else None,
                )
                points.append(sum(each.wire_bytes for each in found) / 1e6)
            label = f"{name} (tp=4)" if name.startswith("eptp") else name
            # The first ones send alike: the widest is drawn first, so that all are seen.
            width = {"tp": 7.5, "ep_psum": 5.5, "eptp_psum": 3.5}.get(name, 1.6)
            panel.plot(counts[: len(points)], points, color=colour, label=label, linewidth=width, solid_capstyle="butt")
        panel.axvline(machine.devices_per_node, color="#999999", linewidth=0.8, linestyle=":")
        panel.text(machine.devices_per_node * 1.06, 0.97, "one node", transform=panel.get_xaxis_transform(), fontsize=7,
                   color="#777777", va="top")  # fmt: skip
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(counts, [str(n) for n in counts], fontsize=8)
        panel.set_xlabel("devices that share the experts", fontsize=9)
        panel.set_title(f"{phase}, {work.tokens:,} tokens per device", loc="left", fontsize=10)
        panel.grid(axis="y", color="#e5e8eb")
    panels[0].set_ylabel("MB sent per device and MoE layer", fontsize=9)
    panels[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.suptitle(f"{shape.name}: bytes by formula", x=0.01, ha="left", fontsize=11)
    figure.tight_layout()
    return figure


def pareto(options: Options, shape: ModelShape, machine: Machine):
    """Latency against throughput of decoding, from one request per device to as many as fit.

    Of each strategy the fastest split (full), and the fastest over all devices without copies (hollow): a ring around a
    full point where they are the same. Grey is the best of all, with its requests per device.
    """
    from matplotlib.lines import Line2D

    figure, panels = _panels(len(options.devices))
    for panel, devices in zip(panels, options.devices, strict=True):
        points: dict[tuple[str, bool], list[Point]] = {}
        for batch in (2**n for n in range(10)):
            work = Work(DECODE, batch, options.context, options.capacity_factor, options.imbalance)
            rows = chosen(
                [row_of(shape, machine, split, work) for split in cost_model.splits(devices, kv_heads=shape.kv_heads)]
            )
            fastest = {name_of(row): row for row in reversed(rows)}
            for is_wide, each in [(False, row) for row in fastest.values()] + [(True, r) for r in rows if r["dp"] == 1]:
                point = Point(each["total_ms"], each["tokens_per_s_per_device"], batch)
                points.setdefault((name_of(each), is_wide), []).append(point)
        for (name, is_wide), found in points.items():
            colour = COLOURS.get(name, "#777777")
            style = dict(markersize=7, markerfacecolor="none") if is_wide else dict(markersize=3)
            places = [(each.latency_ms, each.rate) for each in found]
            panel.plot(*zip(*places, strict=True), "o-", color=colour, linewidth=0.6, **style)
        best = front(points.values())
        places = [(each.latency_ms, each.rate) for each in best]
        panel.plot(*zip(*places, strict=True), color="#222222", linewidth=5, alpha=0.15, zorder=0)
        for each, place in zip(best, places, strict=True):
            panel.annotate(str(each.batch), place, (-5, 5), textcoords="offset points", ha="right", fontsize=6.5)
        panel.set_xscale("log")
        panel.set_yscale("log")
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_locator(_log_ticks())
            axis.set_major_formatter(lambda value, _: _short(value))
            axis.set_minor_formatter(lambda value, _: "")
        panel.set_xlabel("ms per step", fontsize=9)
        panel.set_title(f"{devices} x {machine.name}", loc="left", fontsize=10)
        panel.grid(color="#eceff1", which="major")
    panels[0].set_ylabel("tokens/s per device", fontsize=9)
    names = {"copies": "#777777"} | COLOURS
    handles = [Line2D([], [], color=colour, marker="o", markersize=4, linewidth=0.6) for colour in names.values()]
    handles.append(Line2D([], [], color="#777777", marker="o", markersize=7, markerfacecolor="none", linewidth=0.6))
    handles.append(Line2D([], [], color="#222222", linewidth=5, alpha=0.15))
    labels = [*names, "ring: one split of all devices", "best, and requests per device"]
    panels[-1].legend(handles, labels, frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.suptitle(
        f"{shape.name}, decode, context {options.context}: predicted, the fastest split of each strategy",
        x=0.01,
        ha="left",
        fontsize=11,
    )
    figure.tight_layout()
    return figure


class Point(NamedTuple):
    """A way to decode: milliseconds for a step, tokens per second and device, requests per device."""

    latency_ms: float
    rate: float
    batch: int


def front(points: Iterable[list[Point]]) -> list[Point]:
    """The points that no other beats in both latency and throughput."""
    best: list[Point] = []
    for point in sorted(point for found in points for point in found):
        if not best or point.rate > best[-1].rate:
            best.append(point)
    return best


def _log_ticks():
    from matplotlib.ticker import LogLocator

    return LogLocator(subs=(1, 2, 5))


def heat_map(options: Options, shape: ModelShape, machine: Machine):
    """Predicted tokens/s per device for every ep x tp, the rest of the devices being copies."""
    cases = [(phase, devices) for phase in options.phase for devices in options.devices]
    figure, panels = _panels(len(options.devices), len(options.phase), 3.9, 3.4)
    for panel, (phase, devices) in zip(panels, cases, strict=True):
        work = Work(phase, options.batch[-1], options.context, options.capacity_factor, options.imbalance)
        sizes = [size for size in (2**n for n in range(10)) if devices % size == 0]
        rate = np.full((len(sizes), len(sizes)), np.nan)
        for split in cost_model.splits(devices, kv_heads=shape.kv_heads):
            place = split.expert_parts, split.column_parts
            if set(place) <= set(sizes) and not cost_model.problems(shape, machine, split, work):
                found = cost_model.predict(shape, machine, split, work).tokens_per_s_per_device
                rate[sizes.index(place[0]), sizes.index(place[1])] = np.nanmax(
                    [rate[sizes.index(place[0]), sizes.index(place[1])], found]
                )
        rate = rate[: _used(rate, axis=1), : _used(rate, axis=0)]
        panel.imshow(rate, cmap="YlGnBu", origin="lower", vmin=0, aspect="auto")
        for row, column in np.ndindex(rate.shape):
            if sizes[row] * sizes[column] > devices:
                continue
            value = rate[row, column]
            text, colour = ("no", "#b0b0b0") if np.isnan(value) else (_short(value), "black")
            colour = "white" if value > 0.6 * np.nanmax(rate) else colour
            panel.text(column, row, text, ha="center", va="center", fontsize=6.5, color=colour)
        panel.set_xticks(range(rate.shape[1]), sizes[: rate.shape[1]], fontsize=7)
        panel.set_yticks(range(rate.shape[0]), sizes[: rate.shape[0]], fontsize=7)
        panel.set_xlabel("parts of each expert (tp)", fontsize=9)
        panel.set_title(f"{phase}, {devices} devices", loc="left", fontsize=10)
    for panel in panels[:: len(options.devices)]:
        panel.set_ylabel("parts of the set of experts (ep)", fontsize=9)
    figure.suptitle(
        f"{shape.name} on {machine.name}: predicted tokens/s per device, best strategy of each cell, "
        f"{options.batch[-1]} x {options.context} tokens per device",
        x=0.01,
        ha="left",
        fontsize=11,
    )
    figure.tight_layout()
    return figure


def _used(rate: np.ndarray, *, axis: int) -> int:
    """How many rows or columns to show: up to the last one with a number, and one more, where none fits."""
    filled = np.flatnonzero(~np.isnan(rate).all(axis=axis))
    return int(filled[-1]) + 2 if filled.size else 1


def _short(value: float) -> str:
    return f"{value / 1000:.3g}k" if value >= 1000 else f"{value:.3g}"


# ---------------------------------------------------------------- running


def run(options: Options, machine: Machine) -> list[dict[str, Any]]:
    """Measures bare collectives, then one MoE layer under every strategy on the devices that are there."""
    devices = jax.device_count()
    of_links = [functools.partial(link_record, kind, size) for kind in links() for size in LINK_BYTES]
    of_layers = [
        functools.partial(layer_record, split, tokens, machine, options)
        for tokens in RUN_TOKENS
        for split in cost_model.splits(devices)
        if split.attention == "dp" and (split.dp == 1 or (split.dp == devices and split.strategy == "tp"))
    ]
    return [measure() for measure in tracked((of_links if devices > 1 else []) + of_layers, "Running")]


def links() -> dict[str, Callable[[jax.Array], jax.Array]]:
    return {
        account.ALL_REDUCE: lambda x: lax.psum(x, "ep"),
        account.ALL_GATHER: lambda x: lax.all_gather(x, "ep", tiled=True),
        account.REDUCE_SCATTER: lambda x: lax.psum_scatter(x, "ep", tiled=True),
        account.ALL_TO_ALL: lambda x: lax.all_to_all(x, "ep", 0, 0, tiled=True),
    }


def link_record(kind: str, size: int) -> dict[str, Any]:
    devices = jax.device_count()
    mesh = present_mesh(Split("tp", ep=devices))
    spec = PartitionSpec("ep")
    function = jax.jit(jax.shard_map(links()[kind], mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    x = jax.device_put(np.ones(devices * size // 4, np.float32), jax.sharding.NamedSharding(mesh, spec))
    out_bytes = {account.ALL_GATHER: devices * size, account.REDUCE_SCATTER: size // devices}.get(kind, size)
    return {
        "measured": "collective",
        "collective": kind,
        "devices": devices,
        "in_bytes": size,
        "out_bytes": out_bytes,
        "time_us": median_us(function, x),
        "device": jax.devices()[0].device_kind,
    }


def layer_record(split: Split, tokens: int, machine: Machine, options: Options) -> dict[str, Any]:
    """One layer with the experts that routing chose, uniformly at random."""
    shape, mesh = RUN_SHAPE, present_mesh(split)
    work = Work(DECODE, tokens, 1, options.capacity_factor if split.row.has_capacity else None, options.imbalance)

    def expert_fn(x_XD, experts_XA, weights_XA, up_EGFD, down_EDF):
        logits_XE = jnp.zeros((x_XD.shape[0], up_EGFD.shape[0]), jnp.float32)
        return experts(x_XD, Routing(weights_XA, experts_XA, logits_XE), up_EGFD, down_EDF)

    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    function, shapes = layer.moe_layer(
        split,
        mesh,
        tokens=tokens * split.copy_devices,
        **layer_sizes(shape),
        capacity_factor=work.capacity_factor,
        dtype=dtype,
        expert_fn=expert_fn,
    )
    draw = np.random.default_rng(0)
    choices_TA = np.argsort(draw.random((shapes[1].shape[0], shape.experts)), axis=1)[:, : shape.active]
    values = [draw.normal(size=each.shape).astype(each.dtype) * 0.1 for each in shapes]
    values[1] = choices_TA.astype(np.int32)
    arguments = [jax.device_put(value, each.sharding) for value, each in zip(values, shapes, strict=True)]
    moe = moe_collectives(
        split,
        tokens=tokens * split.copy_devices,
        width=shape.width,
        active=shape.active,
        capacity_factor=work.capacity_factor,
        item_bytes=jnp.dtype(dtype).itemsize,
        devices_per_node=machine.devices_per_node,
    )
    return {
        "measured": "layer",
        **dataclasses.asdict(split),
        "devices": split.devices,
        "tokens_per_device": tokens,
        "predicted_experts_us": round(cost_model.experts_layer_us(shape, machine, split, work), 1),
        "predicted_communication_us": round(sum(cost_model.collective_us(each, machine) for each in moe), 1),
        "time_us": median_us(jax.jit(function), *arguments),
        "hardware": machine.name,
        "device": jax.devices()[0].device_kind,
        "dtype": str(jnp.dtype(dtype)),
        "jax": jax.__version__,
    }


def median_us(function: Callable[..., Any], *arguments: Any, repeats: int = 7) -> float:
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(repeats):
        begin_s = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(1e6 * (time.perf_counter() - begin_s))
    return round(float(np.median(times)), 1)


def run_table(records: list[dict[str, Any]]) -> str:
    layers = [row for row in records if row["measured"] == "layer"]
    lines = [
        f"one MoE layer, measured on {layers[0]['device']}, predicted for {layers[0]['hardware']}",
        f"{'strategy':10} {'mesh':12} {'tokens/device':>13} {'measured us':>11} {'predicted':>10} (experts + links)",
    ]
    for row in layers:
        predicted = row["predicted_experts_us"] + row["predicted_communication_us"]
        lines.append(
            f"{row['strategy']:10} {split_of(row).mesh:12} {row['tokens_per_device']:13} {row['time_us']:11.0f} "
            f"{predicted:10.0f} ({row['predicted_experts_us']:.0f} + {row['predicted_communication_us']:.0f})"
        )
    return "\n".join(lines)


# ---------------------------------------------------------------- calibrating


def calibrated(machine: Machine, path: Path) -> Machine:
    """The machine with what the lines measured in place of what was assumed."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    points = [kernel_point(line) for line in lines if line.get("shape") in LAYERS and "time_us" in line]
    points += [run_point(line) for line in lines if line.get("measured") == "layer" and line["ep"] * line["tp"] == 1]
    source = f"measured: fitted by scripts/compare_sharding.py to {path}"
    if points:
        machine, error = cost_model.fit_experts(machine, points, source)
        print(f"experts: {len(points)} layers, mean error {error:.0%} after fitting")
    found = [
        (account.Collective(row["collective"], row["devices"], row["devices"], row["in_bytes"], row["out_bytes"]), us)
        for row in lines
        if row.get("measured") == "collective" and (us := row["time_us"])
    ]
    if found:
        machine = cost_model.fit_links(machine, found, source)
        print(f"links: {len(found)} collectives, {machine.within_us} us and {machine.within_fraction:.3g} of the rate")
    if not points and not found:
        raise ValueError(f"{path}: expected lines of --run or of scripts/benchmark_kernels.py, got neither")
    return machine


def kernel_point(line: dict[str, Any]) -> ExpertPoint:
    shape, tokens = LAYERS[line["shape"]], line["tokens"]
    rows = tokens * shape.active
    read = line["active_experts"] * shape.expert_bytes + 2 * rows * (2 * shape.model_width + 3 * shape.width)
    return ExpertPoint(read, rows * shape.expert_bytes, line["time_us"])


def run_point(line: dict[str, Any]) -> ExpertPoint:
    shape, tokens = RUN_SHAPE, line["tokens_per_device"]
    rows = tokens * shape.active
    weights = shape.active_experts(tokens) * shape.expert_parameters
    read = 2 * (weights + rows * (2 * shape.width + 3 * shape.expert_width))
    return ExpertPoint(read, 2 * rows * shape.expert_parameters, line["time_us"])


def described(path: Path) -> ModelShape:
    """The shape of the model whose config.json this is.

    Raises:
      ValueError: there is no such file, or it is not the config of a model that can be split.
    """
    try:
        return model_shape(json.loads(path.read_text()), path.stem)
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"expected --model to be a config.json, such as one of configs/, got {path} ({error})"
        ) from None


def main(options: Options) -> None:
    machine = machines.load(options.hardware)
    if options.calibrate:
        path = machines.path_of(options.hardware)
        machines.save(calibrated(machine, options.calibrate), path)
        print(f"wrote {path}")
        return
    options.output.mkdir(parents=True, exist_ok=True)
    if options.run:
        records = run(options, machine)
        path = options.output / f"run_{machine.name}.jsonl"
        print(run_table(records))
    else:
        shape = described(options.model)
        records = rows_of(options, shape, machine)
        print(table(records, options.context))
        path = options.output / f"{shape.name}_{machine.name}.jsonl"
        print("\nwrote", *pictures(options, shape, machine, records))
    path.write_text("".join(json.dumps(row) + "\n" for row in records))
    print(f"wrote {path}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__, args=spaced(sys.argv[1:])))
    except (ValueError, ModuleNotFoundError) as error:
        sys.exit(f"compare_sharding.py: {error}")
    except KeyboardInterrupt:
        sys.exit("compare_sharding.py: interrupted, nothing was written")
