"""Measures the candidate settings of every kernel at real shapes and writes the best into the device's tuned table.

    python scripts/tune_kernels.py --ops experts --shapes qwen3-30b olmoe --tokens 1 8 64 --seconds 600

Each measurement goes to --records at once; a second run leaves out what is there, so that it can be stopped and taken
up again. Several may run at once on one GPU, on different shapes: they compile together and measure in turn. The
table, pallas_kernels/tuned/<device>.json, takes a candidate where it beats the default by 2 %.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import pathlib
import sys
import time
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from rich.progress import Progress

from pallas_kernels import aot, dispatch, timing, tuning
from pallas_kernels.dispatch import Implementation
from pallas_kernels.experts import api as experts_api
from pallas_kernels.experts import cases as experts_cases
from pallas_kernels.route import api as route_api
from pallas_kernels.route import cases as route_cases

LEAST_GAIN = 0.02
# A candidate computes the same sums in another order: it differs from the default by roundings of bfloat16.
LARGEST_DIFFERENCE = 8e-3
OPS: dict[str, tuple[ModuleType, ModuleType]] = {
    "experts": (experts_api, experts_cases),
    "route": (route_api, route_cases),
}
Settings = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Point:
    """One implementation at one real case, with the settings to try, the default first."""

    op: str
    implementation: Implementation
    case: Any
    candidates: list[Settings]

    @property
    def table_op(self) -> str:
        return f"{self.op}.{self.implementation.name}"


def points(ops: list[str], shapes: list[str], tokens: list[int]) -> list[Point]:
    """What there is to tune on this device."""
    found = []
    for op in ops:
        api, cases = OPS[op]
        for case in cases.REAL:
            if case.name.rsplit("-", 1)[0] not in shapes or case.tokens not in tokens:
                continue
            operands, named = aot.shapes_of(functools.partial(cases.arguments, case))
            for implementation in api._implementations():
                can_run = implementation.supports(dispatch.current_device(), *operands, **named) is None
                if can_run and implementation.candidates is not None:
                    candidates = implementation.candidates(*operands, **named)
                    found.append(Point(op, implementation, case, candidates))
    return found


def measure(point: Point) -> list[float | None]:
    """Median microseconds of each candidate; None where it does not compile or its result is not the default's."""
    cases = OPS[point.op][1]
    shapes, named = aot.shapes_of(functools.partial(cases.arguments, point.case))
    arrays, static = aot.split_arrays(named)

    def run(settings: Settings, operands: tuple, arrays: dict[str, jax.Array]) -> Any:
        return point.implementation.run(*operands, **static, **arrays, settings=settings)

    def build(settings: Settings) -> Any:
        try:
            return jax.jit(functools.partial(run, settings)).lower(shapes, arrays).compile()
        except (
            Exception
        ) as error:  # a candidate may need more shared memory than there is: shown, and out of the running
            print(f"{point.case.name} {point.table_op} {settings}: {str(error).splitlines()[0][:120]}")
            return None

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        programs = list(pool.map(build, point.candidates))
    with timing.gpu_to_oneself():
        made = [cases.arguments(point.case, seed) for seed in range(timing.rotations(point.case.read_bytes))]
        inputs = [(operands, aot.split_arrays(named)[0]) for operands, named in made]
        if programs[0] is None:
            return [None] * len(programs)
        default = programs[0](*inputs[0])
        is_right = [
            program is not None and _difference(default, program(*inputs[0])) <= LARGEST_DIFFERENCE
            for program in programs
        ]
        return [
            timing.measure(program, inputs).time_us if right else None
            for program, right in zip(programs, is_right, strict=True)
        ]


def _difference(one: Any, other: Any) -> float:
    """The largest relative difference among the floating-point arrays of two results."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    floats = [(a.astype(jnp.float32), b.astype(jnp.float32)) for a, b in pairs if jnp.issubdtype(a.dtype, jnp.floating)]
    return max(float(jnp.linalg.norm(a - b) / jnp.maximum(jnp.linalg.norm(a), 1e-30)) for a, b in floats)


def read_records(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def best_settings(records: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Settings]]]:
    """Of each record the default, or the fastest candidate where that gains `LEAST_GAIN`, as a table's settings."""
    settings: dict[str, dict[str, dict[str, Settings]]] = {}
    for record in records:
        timed = [(time_us, index) for index, time_us in enumerate(record["times_us"]) if time_us is not None]
        if not timed:
            continue
        fastest_us, index = min(timed)
        default_us = record["times_us"][0]
        chosen = index if fastest_us < (1 - LEAST_GAIN) * default_us else 0
        buckets = settings.setdefault(record["op"], {}).setdefault(record["shape_key"], {})
        buckets[str(record["tokens"])] = record["candidates"][chosen]
    return settings


def main() -> int:
    shapes = list(experts_cases.LAYERS)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", default=list(OPS), choices=list(OPS))
    parser.add_argument("--shapes", nargs="+", default=shapes, choices=shapes)
    parser.add_argument("--tokens", nargs="+", type=int, default=list(experts_cases.TOKENS))
    parser.add_argument("--seconds", type=float, default=3600.0, help="start no further measurement after this long")
    parser.add_argument("--records", type=pathlib.Path, default=pathlib.Path("docs/benchmarks/h200/tuning.jsonl"))
    flags = parser.parse_args()

    device = dispatch.current_device()
    if device.platform != "gpu":
        print(f"needs a GPU; jax sees {device.kind}", file=sys.stderr)
        return 2
    deadline_s = time.monotonic() + flags.seconds
    done = {(record["op"], record["shape_key"], record["tokens"]) for record in read_records(flags.records)}
    with Progress() as progress:
        for point in progress.track(points(flags.ops, flags.shapes, flags.tokens), description="kernels x shapes"):
            key = (point.table_op, point.case.key, point.case.tokens)
            if key in done or time.monotonic() > deadline_s:
                continue
            record = dict(zip(("op", "shape_key", "tokens"), key, strict=True))
            record |= {"candidates": point.candidates, "times_us": measure(point)}
            timing.append_record(flags.records, record)
            progress.print(f"{key}: {record['times_us']}")
    table = timing.context() | {"settings": best_settings(read_records(flags.records))}
    path = tuning.table_path(device.kind)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
