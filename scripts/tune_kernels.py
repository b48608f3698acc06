"""Measures the candidate settings of every kernel at real shapes and writes the best into the device's tuned table.

    python scripts/tune_kernels.py --ops experts --shapes qwen3-30b olmoe --tokens 1 8 64 --seconds 600

At each shape the kernel that dispatch takes there. Each measurement goes to --records at once; a second run leaves out
what is there, so that it can be stopped and taken up again. Each point has a process of its own, which compiles while
another measures. The table, pallas_kernels/tuned/<device>.json, takes a candidate where it beats the default by 2 %.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from rich.progress import Progress

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from flags import count, require_writable, seconds

from pallas_kernels import aot, dispatch, processes, timing, tuning
from pallas_kernels.decode_attention import api as attention_api
from pallas_kernels.decode_attention import cases as attention_cases
from pallas_kernels.decode_attention import mosaic_sm90 as attention_kernel
from pallas_kernels.dispatch import Implementation
from pallas_kernels.experts import api as experts_api
from pallas_kernels.experts import cases as experts_cases
from pallas_kernels.experts import decode_sm90 as experts_decode
from pallas_kernels.matvec import api as matvec_api
from pallas_kernels.matvec import cases as matvec_cases
from pallas_kernels.matvec import mosaic_sm90 as matvec_kernel

LEAST_GAIN = 0.02
# A candidate computes the same sums in another order: it differs from the default by roundings of bfloat16.
LARGEST_DIFFERENCE = 8e-3
Settings = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Op:
    """`shape_key(*operands, **named)`: the name that tables have for a shape; `read_bytes(case)`: what is read, at most."""

    api: ModuleType
    cases: ModuleType
    shape_key: Callable[..., str]
    read_bytes: Callable[[Any], int]


OPS = {
    "decode_attention": Op(
        attention_api,
        attention_cases,
        lambda q_BQ, k_BX, v_BX, cos_BR, sin_BR, k_BKSH, v_BKSH, positions_B, **named: attention_kernel.shape_key(
            q_BQ, k_BKSH, q_norm_weight=named.get("q_norm_weight"), window=named.get("window")
        ),
        lambda case: case.cache_bytes,
    ),
    "experts": Op(
        experts_api,
        experts_cases,
        lambda x_TD, routing, up_EGFD, down_EDF, **named: experts_decode.shape_key(routing, up_EGFD),
        lambda case: case.read_bytes,
    ),
    "matvec": Op(
        matvec_api,
        matvec_cases,
        lambda x_TI, weights, **named: matvec_kernel.shape_key(weights, named.get("out_dtype")),
        lambda case: case.projection.weight_bytes,
    ),
}


@dataclasses.dataclass(frozen=True)
class Point:
    """One kernel at one real case."""

    op: str
    kernel: str
    case: Any
    shape_key: str

    @property
    def key(self) -> tuple[str, str, int]:
        """How records name it."""
        return f"{self.op}.{self.kernel}", self.shape_key, self.case.tokens


def shape_of(case: Any) -> str:
    return case.name.rsplit("-", 1)[0]


def points(ops: list[str], shapes: list[str], tokens: list[int]) -> list[Point]:
    """What there is to tune on this device: of each case the kernel that dispatch takes, if there is a choice of settings."""
    found = []
    for name in ops:
        op = OPS[name]
        for case in op.cases.REAL:
            if shape_of(case) not in shapes or case.tokens not in tokens:
                continue
            operands, named = aot.shapes_of(functools.partial(op.cases.arguments, case))
            chosen = dispatch.choose(name, op.api._implementations(), *operands, **named)
            if chosen.candidates is not None and len(chosen.candidates(*operands, **named)) > 1:
                found.append(Point(name, chosen.name, case, op.shape_key(*operands, **named)))
    return found


def implementation_of(point: Point) -> Implementation:
    return next(each for each in OPS[point.op].api._implementations() if each.name == point.kernel)


def candidates_of(point: Point) -> list[Settings]:
    operands, named = aot.shapes_of(functools.partial(OPS[point.op].cases.arguments, point.case))
    offered = implementation_of(point).candidates(*operands, **named)
    return list({json.dumps(settings, sort_keys=True): settings for settings in offered}.values())


def measure(point: Point) -> dict[str, Any]:
    """The record of a point: its candidates, and the median microseconds of each; None where the result is another."""
    op, implementation, candidates = OPS[point.op], implementation_of(point), candidates_of(point)
    shapes, named = aot.shapes_of(functools.partial(op.cases.arguments, point.case))
    arrays, static = aot.split_arrays(named)

    def run(settings: Settings, operands: tuple, arrays: dict[str, jax.Array]) -> Any:
        return implementation.run(*operands, **static, **arrays, settings=settings)

    with concurrent.futures.ThreadPoolExecutor() as pool:  # compiling leaves Python free to lower the next
        lowered = [jax.jit(functools.partial(run, settings)).lower(shapes, arrays) for settings in candidates]
        programs = list(pool.map(lambda each: each.compile(), lowered))
    with processes.turn_on_gpu():
        made = [op.cases.arguments(point.case, seed) for seed in range(timing.rotations(op.read_bytes(point.case)))]
        inputs = [(operands, aot.split_arrays(named)[0]) for operands, named in made]
        default = programs[0](*inputs[0])
        is_right = [_difference(default, program(*inputs[0])) <= LARGEST_DIFFERENCE for program in programs]
        times_us = [
            timing.measure(program, inputs).time_us if right else None
            for program, right in zip(programs, is_right, strict=True)
        ]
    names = dict(zip(("op", "shape_key", "tokens"), point.key, strict=True))
    return names | {"candidates": candidates, "times_us": times_us}


def _difference(one: Any, other: Any) -> float:
    """The largest relative difference among the floating-point arrays of two results."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    floats = [(a.astype(jnp.float32), b.astype(jnp.float32)) for a, b in pairs if jnp.issubdtype(a.dtype, jnp.floating)]
    return max(float(jnp.linalg.norm(a - b) / jnp.maximum(jnp.linalg.norm(a), 1e-30)) for a, b in floats)


def best_settings(
    records: list[dict[str, Any]], offered: dict[tuple[str, str, int], list[Settings]]
) -> dict[str, dict[str, dict[str, Settings]]]:
    """Of each record the default, or the fastest candidate where that gains `LEAST_GAIN`, as a table's settings.

    offered: the candidates of today, the default first, by `Point.key`. What a record has besides is older than the kernels.
    """
    settings: dict[str, dict[str, dict[str, Settings]]] = {}
    for record in records:
        key = record["op"], record["shape_key"], record["tokens"]
        timed = [
            (time_us, candidate)
            for candidate, time_us in zip(record["candidates"], record["times_us"], strict=True)
            if time_us is not None and candidate in offered.get(key, [])
        ]
        if not timed:
            continue
        fastest_us, chosen = min(timed, key=lambda each: each[0])
        default_us = [time_us for time_us, candidate in timed if candidate == offered[key][0]]
        if default_us and fastest_us >= (1 - LEAST_GAIN) * default_us[0]:
            chosen = offered[key][0]
        settings.setdefault(record["op"], {}).setdefault(record["shape_key"], {})[str(record["tokens"])] = chosen
    return settings


def main() -> int:
    shapes = list(dict.fromkeys(shape_of(case) for op in OPS.values() for case in op.cases.REAL))
    tokens = sorted({case.tokens for op in OPS.values() for case in op.cases.REAL})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", default=list(OPS), choices=list(OPS))
    parser.add_argument("--shapes", nargs="+", default=shapes, choices=shapes)
    parser.add_argument("--tokens", nargs="+", type=count, default=tokens)
    parser.add_argument("--processes", type=count, default=os.cpu_count())
    parser.add_argument("--seconds", type=seconds, default=3600.0, help="end after this long, whatever is left")
    parser.add_argument("--records", type=pathlib.Path, help="docs/benchmarks/<device>/tuning.jsonl by default")
    flags = parser.parse_args()
    deadline_s = time.monotonic() + flags.seconds

    processes.share_gpu()
    device = dispatch.current_device()
    if device.platform != "gpu":
        print(f"needs a GPU; jax sees {device.kind}", file=sys.stderr)
        return 2
    path = flags.records or timing.results_path("tuning.jsonl")
    require_writable(path)
    measured = timing.records_of_here(path)
    done = {(record["op"], record["shape_key"], record["tokens"]) for record in measured}
    left = [point for point in points(flags.ops, flags.shapes, flags.tokens) if point.key not in done]
    outcomes = processes.outcomes(measure, left, processes=flags.processes, deadline_s=deadline_s)
    with Progress() as progress:
        for outcome in progress.track(outcomes, total=len(left), description="kernels x shapes"):
            progress.print(f"{outcome.task.key}: {outcome.error or outcome.result['times_us']}")
            if outcome.error is None:
                timing.append_record(path, outcome.result)
    measured = timing.records_of_here(path)
    path = tuning.table_path(device.kind)
    path.parent.mkdir(exist_ok=True)
    offered = {point.key: candidates_of(point) for point in points(list(OPS), shapes, tokens)}
    table = timing.context() | {"settings": best_settings(measured, offered)}
    path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    print(f"wrote {path}; of {len(done) + len(left)} points {len(measured)} are measured")
    return int(len(measured) < len(done) + len(left))


if __name__ == "__main__":
    sys.exit(main())
