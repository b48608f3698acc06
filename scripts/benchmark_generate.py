"""Times whole-model generation with random weights: prefill, time per token, memory, and what it could be at best.

    python scripts/benchmark_generate.py --models tinymistral-6x248m olmoe-1b-7b --seconds 300 --baseline hf
    python scripts/benchmark_generate.py --config tiny.json --dtype float32 --batches 1 2 --prompt 8 --new-tokens 8

Greedy, prompts of random ids. The time per token is (t(new tokens) - t(32)) / (new tokens - 32) of whole generations, so
that prefill and the call's own cost cancel. The floor is the time to read, at 4.6 TB/s, the weights of attention, of
routers, of the head and of the experts that were active, which a second program counts for every step and layer, and
the cache. Appends a JSON line for each point to --output as it comes, the most telling points first; a point that fails
gives a line with its error. scripts/plot_generate.py makes tables and pictures of them.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import sys
import threading
import time
from typing import Any

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
MODELS = ("tinymistral-6x248m", "olmoe-1b-7b", "qwen3-30b-a3b", "mixtral-8x7b")
BATCHES = (1, 8, 64, 32, 128)
PREFILLS = ((1, 4096), (8, 2048))
STUDENT_MODEL, STUDENT_PROMPT = "tinymistral-6x248m", 10
BASELINES = ("hf",)
CACHE_GB = 16  # the cache that the largest model shall have beside it
MOST_TELLING = (1, 8, 64)


@dataclasses.dataclass(frozen=True)
class Point:
    """One line of the benchmark: `kind` is "decode", "prefill" or "end_to_end"."""

    kind: str
    model: str
    batch: int
    prompt: int
    new_tokens: int


def points_of(name: str, flags: argparse.Namespace) -> list[Point]:
    """A model's points, the most telling first."""
    decode = [Point("decode", name, batch, flags.prompt, flags.new_tokens) for batch in flags.batches]
    prefill = [Point("prefill", name, batch, length, 1) for batch, length in flags.prefills]
    told = [point for point in decode if point.batch in MOST_TELLING]
    student = [Point("end_to_end", name, 1, STUDENT_PROMPT, flags.new_tokens)] if name == STUDENT_MODEL else []
    return [*told, *student, *prefill, *(point for point in decode if point not in told)]


class Bench:
    """What the points share: configs, the weights of one model at a time, and who may use Python's only lock.

    Tracing holds Python's lock and would be seen in the times measured meanwhile: `python` is taken for either.
    """

    def __init__(self, flags: argparse.Namespace, configs: dict[str, dict[str, Any]]):
        self.flags, self.configs = flags, configs
        self.python = threading.Lock()
        self._held: tuple[str, Any, tuple[Any, ...]] | None = None

    def compile(self, point: Point) -> dict[str, profiling.GenerateProgram]:
        """The programs of a point: `run`, and `traced`, which also tells the experts of every step."""
        from moe_jax import profiling
        from moe_jax.generate import Record
        from moe_jax.testing import abstract_model

        records = {"run": Record()}
        if point.kind == "decode":
            records["traced"] = Record(routed_experts=True)
        lowered = {}
        with self.python:
            model = abstract_model(self.configs[point.model], dtype=self.flags.dtype)
            for name, record in records.items():
                shape = dict(batch=point.batch, prompt=point.prompt, new_tokens=point.new_tokens)
                lowered[name] = profiling.lower_generate(model, **shape, record=record)
        return {name: each.compile() for name, each in lowered.items()}

    def model(self, name: str) -> tuple[Any, tuple[Any, ...]]:
        """The model and its flat parameters; the one held before is let go first."""
        from moe_jax import profiling, testing

        if self._held is None or self._held[0] != name:
            self._held = None
            begin_s = time.perf_counter()
            model = testing.large_random_model(self.configs[name], dtype=self.flags.dtype)
            leaves = profiling.parameters_of(model)
            for leaf in leaves:
                leaf.block_until_ready()
            print(
                f"{name}: {model.num_parameters / 1e9:.2f} G parameters made in {time.perf_counter() - begin_s:.1f} s"
            )
            self._held = (name, model, leaves)
        return self._held[1:]

    def measure(self, point: Point, programs: dict[str, profiling.GenerateProgram]) -> dict[str, Any]:
        """The record of a point."""
        import jax

        from moe_jax import profiling

        model, leaves = self.model(point.model)
        config, sizes = self.configs[point.model], profiling.sizes_of(self.configs[point.model], dtype=self.flags.dtype)
        record: dict[str, Any] = dataclasses.asdict(point) | {"dtype": self.flags.dtype}
        if point.kind == "end_to_end":
            record |= {"ms_per_token": end_to_end_ms(model, point), "parameters": model.num_parameters}
        elif point.kind == "prefill":
            elapsed_ms = profiling.measure_first_token(programs["run"], leaves)
            floor = profiling.prefill_floor_ms(config, sizes, batch=point.batch, length=point.prompt)
            record |= {"ms": round(elapsed_ms, 4), "floor_ms": round(floor, 4)}
        else:
            times = profiling.measure(programs["run"], leaves)
            active = self._active(programs["traced"], leaves)
            first = min(profiling.FIRST_STEP, point.new_tokens // 2)
            positions = point.prompt + (first + point.new_tokens) / 2
            floor = profiling.decode_floor_ms(sizes, batch=point.batch, active_experts=active, positions=positions)
            record |= {
                "ms_per_token": round(times.per_token_ms, 4),
                "floor_ms": round(floor, 4),
                "fraction_of_floor": round(floor / times.per_token_ms, 4),
                "active_experts": round(active, 2),
                "first_token_ms": round(times.first_token_ms, 3),
            }
        if "run" in programs:
            program = programs["run"]
            positions = point.batch * program.batch.capacity
            record["memory_gb"] = {
                "parameters": round(sizes.parameters / 1e9, 3),
                "cache": round(positions * sizes.cache_per_position / 1e9, 4),
                "temporary": round(program.temporary_bytes / 1e9, 4),
                "peak_of_process": round((jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 1e9, 3),
            }
            record["compile_s"] = round(program.compile_s, 2)
        return record

    def _active(self, program: profiling.GenerateProgram, leaves: tuple[Any, ...]) -> float:
        """Mean number of active experts of a layer and step, over the steps that are timed."""
        import numpy as np

        from moe_jax import profiling

        tokens = program.batch.max_new_tokens
        _, state = program.run(leaves, program.new_cache(leaves), tokens)
        first = min(profiling.FIRST_STEP, tokens // 2)
        return float(profiling.active_experts(np.asarray(state.experts_BLUA)[:, :, first:tokens]).mean())


def end_to_end_ms(model: Any, point: Point) -> float:
    """Milliseconds of `moe_jax.generate` for each new token, prompt and Python included: the median of five calls."""
    import moe_jax

    prompt = list(range(3, 3 + point.prompt))

    def seconds() -> float:
        begin_s = time.perf_counter()
        moe_jax.generate(model, prompt, max_new_tokens=point.new_tokens, stop_token_ids=())
        return time.perf_counter() - begin_s

    seconds()
    return round(1e3 * sorted(seconds() for _ in range(5))[2] / point.new_tokens, 4)


def line(record: dict[str, Any]) -> str:
    """A record in one line for the terminal."""
    start = f"{record['model']:20} {record['kind']:10} {record['batch']:4} x {record['prompt']:<5}"
    if "error" in record:
        return f"{start} {record['error'][:200]}"
    if record["kind"] == "end_to_end":
        return f"{start} {record['ms_per_token']:9.3f} ms per token, all included"
    if record["kind"] == "prefill":
        return (
            f"{start} {record['ms']:9.3f} ms, floor {record['floor_ms']:.3f}, compiled in {record['compile_s']:.0f} s"
        )
    return (
        f"{start} {record['ms_per_token']:9.3f} ms per token, floor {record['floor_ms']:.3f} "
        f"({record['fraction_of_floor']:.0%}), {record['active_experts']:.1f} active, "
        f"first token {record['first_token_ms']:.1f} ms, compiled in {record['compile_s']:.0f} s"
    )


def run(points: list[Point], bench: Bench, deadline_s: float, output: pathlib.Path) -> list[dict[str, Any]]:
    """Measures the points in turn while a thread compiles ahead; appends each record as it comes."""
    from pallas_kernels import timing

    records = []
    with concurrent.futures.ThreadPoolExecutor(bench.flags.compilers) as pool:
        futures = [pool.submit(bench.compile, point) if point.kind != "end_to_end" else None for point in points]
        for point, future in zip(points, futures, strict=True):
            try:
                programs = future.result(timeout=max(0.0, deadline_s - time.monotonic())) if future else {}
                with bench.python:
                    if time.monotonic() > deadline_s:
                        raise TimeoutError
                    record = bench.measure(point, programs)
            except TimeoutError:
                print(f"{point}: left out, --seconds are over", flush=True)
                continue
            except Exception as error:  # a benchmark that loses one point keeps the others
                record = dataclasses.asdict(point) | {"error": f"{type(error).__name__}: {error}"[:500]}
            programs = future = None  # the cache and the program go before the next point's come
            print(line(record), flush=True)
            timing.append_record(output, record)
            records.append(record)
        pool.shutdown(wait=False, cancel_futures=True)
    return records


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=[path.stem for path in CONFIGS.iterdir()])
    parser.add_argument("--config", type=pathlib.Path, help="a config.json to measure instead of --models")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--batches", nargs="*", type=int, default=list(BATCHES))
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--prefills", nargs="*", type=shape, default=list(PREFILLS), metavar="BATCHxLENGTH")
    parser.add_argument("--seconds", type=float, default=900.0, help="start no further measurement after this long")
    parser.add_argument("--compilers", type=int, default=2, help="threads that compile ahead")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("docs/benchmarks/h200/generate.jsonl"))
    return parser.parse_args(arguments)


def shape(text: str) -> tuple[int, int]:
    batch, _, length = text.partition("x")
    return int(batch), int(length)


def prepare() -> None:
    """Settings that JAX reads when it starts. Compiling ahead and measuring share the GPU: XLA shall not time kernels."""
    flags = os.environ.get("XLA_FLAGS", "")
    if "autotune" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_autotune_level=0"
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")


def main() -> int:
    flags = parsed()
    deadline_s = time.monotonic() + flags.seconds
    prepare()
    paths = [flags.config] if flags.config else [CONFIGS / f"{name}.json" for name in flags.models]
    configs = {path.stem: json.loads(path.read_text()) for path in paths}
    points = [point for name in configs for point in points_of(name, flags)]
    records = run(points, Bench(flags, configs), deadline_s, flags.output)
    return int(any("error" in record for record in records) or len(records) < len(points))


if __name__ == "__main__":
    sys.exit(main())
