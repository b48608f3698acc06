"""Times whole-model generation with random weights: prefill, time per token, memory, and what it could be at best.

    python scripts/benchmark_generate.py --models tinymistral-6x248m olmoe-1b-7b --seconds 300 --baseline hf
    python scripts/benchmark_generate.py --config tiny.json --dtype float32 --batches 1 2 --prompt 8 --new-tokens 8

Greedy, prompts of random ids. The time per token is (t(new tokens) - t(32)) / (new tokens - 32) of whole generations, so
that prefill and the call's own cost cancel. The floor is the time to read, at `timing.CEILINGS`, the weights of attention, of
routers, of the head and of the experts that were active, which a second program counts at every step and layer, and
the cache. `--baseline hf` runs transformers on the same weights in the same process, and says where its greedy tokens
part from ours and how near its two logits are there. Appends a JSON line for each point to --output as it comes, the
most telling points first; a point that fails gives a line with its error. What this device has a line for is left out,
so that a run can be stopped and taken up again; --again measures it anew. scripts/plot_generate.py makes tables and
pictures of them.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib
import json
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from flags import count, require_writable, seconds, shape, two_or_more

if TYPE_CHECKING:
    from moe_jax import profiling

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
MODELS = ("tinymistral-6x248m", "olmoe-1b-7b", "qwen3-30b-a3b", "mixtral-8x7b")
BATCHES = (1, 8, 64, 32, 128)
MOST_TELLING = (1, 8, 64)
PREFILLS = ((1, 4096), (8, 2048))
STUDENT_MODEL, STUDENT_PROMPT = "tinymistral-6x248m", 10
LONGEST_ROUNDS_S = 1.5  # no further round of a measurement after that
LONGEST_POINT_S = 180  # a kernel that never ends is ended with its process
LARGEST_MODEL, LARGE_CACHE_BYTES, LARGE_CACHE_POSITIONS = "mixtral-8x7b", 16e9, 4096
INTERRUPTED = 130  # exit status after Ctrl-C
HF_VARIANTS = ("grouped_mm", "batched_mm", "eager", "compiled")


@dataclasses.dataclass(frozen=True)
class Point:
    """One line of the benchmark.

    kind: "decode"; "prefill"; "end_to_end", as the student project measured; "large_cache", whether a large model and a
      large cache go together.
    """

    kind: str
    model: str
    batch: int
    prompt: int
    new_tokens: int
    baselines: tuple[str, ...] = ()  # transformers' variants to run afterwards

    def record(self) -> dict[str, Any]:
        """What every record of the point begins with."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key != "baselines"}


def points_of(name: str, config: dict[str, Any], flags: argparse.Namespace) -> list[Point]:
    """A model's points, the most telling first."""
    baselines = tuple(flags.hf_variants) if flags.baseline == "hf" else ()
    decode = [Point("decode", name, batch, flags.prompt, flags.new_tokens, baselines) for batch in flags.batches]
    prefill = [Point("prefill", name, batch, length, 1) for batch, length in flags.prefills]
    told = [point for point in decode if point.batch in MOST_TELLING]
    student = [Point("end_to_end", name, 1, STUDENT_PROMPT, flags.new_tokens)] if name == STUDENT_MODEL else []
    large = [large_cache_point(name, config, flags)] if name == LARGEST_MODEL else []
    return [*told, *student, *prefill, *large, *(point for point in decode if point not in told)]


def in_order(points: list[Point], configs: dict[str, dict[str, Any]]) -> list[Point]:
    """The most telling points of all models first; among equals the deepest models, which compile longest."""

    def rank(point: Point) -> tuple[int, int]:
        is_telling = point.kind == "end_to_end" or (point.kind == "decode" and point.batch in MOST_TELLING)
        return (0 if is_telling else 2 if point.kind == "decode" else 1), -configs[point.model]["num_hidden_layers"]

    return sorted(points, key=rank)


def not_measured(points: list[Point], dtype: str, records: list[dict[str, Any]]) -> list[Point]:
    """The points whose lines `records` lacks, that of one of their baselines perhaps."""
    done = [record for record in records if "error" not in record]

    def has_line(point: Point, **others: Any) -> bool:
        wanted = point.record() | {"dtype": dtype} | others
        return any(wanted.items() <= record.items() for record in done)

    def is_measured(point: Point) -> bool:
        return has_line(point) and all(has_line(point, kind="baseline", variant=each) for each in point.baselines)

    return [point for point in points if not is_measured(point)]


def large_cache_point(name: str, config: dict[str, Any], flags: argparse.Namespace) -> Point:
    """As many requests of 4096 positions and a prompt as fill a cache of 16 GB."""
    from moe_jax import profiling

    per_request = (flags.prompt + LARGE_CACHE_POSITIONS) * profiling.sizes_of(config).cache_per_position
    return Point("large_cache", name, -(-int(LARGE_CACHE_BYTES) // per_request), flags.prompt, LARGE_CACHE_POSITIONS)


Quiet = Callable[[], contextlib.AbstractContextManager[None]]
BEGIN_QUIET, END_QUIET = "begin quiet", "end quiet"


class Bench:
    """One point in one process: compiled while others measure, measured when it is told to."""

    def __init__(self, point: Point, config: dict[str, Any], flags: argparse.Namespace, quiet: Quiet):
        from moe_jax import profiling

        if point.kind == "prefill":
            # One more token than the prompt is refused beyond the context, though prefill makes no position for it.
            longest = max(config["max_position_embeddings"], point.prompt + 1)
            config = config | {"max_position_embeddings": longest}
        self.point, self.config, self.flags, self.quiet = point, config, flags, quiet
        self.sizes = profiling.sizes_of(config, dtype=flags.dtype)
        self.program: profiling.GenerateProgram | None = None

    def compile(self) -> None:
        """Compiles the point's program, and what makes the weights."""
        from moe_jax import profiling
        from moe_jax.testing import abstract_model, compile_values

        point = self.point
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            values = pool.submit(compile_values, self.config, dtype=self.flags.dtype)
            if point.kind != "end_to_end":
                self.program = profiling.compile_generate(
                    abstract_model(self.config, dtype=self.flags.dtype),
                    batch=point.batch,
                    prompt=point.prompt,
                    new_tokens=point.new_tokens,
                    traces=point.kind == "decode" and point.batch > 1,
                    prefill_options=compile_options(),
                    advance_options=compile_options(),
                )
            if point.baselines:
                with contextlib.suppress(ImportError):  # told with the baseline's record
                    importlib.import_module("hf_baseline")
            values.result()

    def records(self) -> Iterator[dict[str, Any]]:
        """Makes the weights and measures: the point's record, and one for each run of the baseline."""
        import jax

        from moe_jax import profiling, testing

        self.model = testing.large_random_model(self.config, dtype=self.flags.dtype)
        self.leaves = jax.block_until_ready(profiling.parameters_of(self.model))
        shared = self.point.record() | {"dtype": self.flags.dtype}
        yield shared | getattr(self, f"_{self.point.kind}")() | self._cost()
        for variant in self.point.baselines:
            labelled = shared | {"kind": "baseline", "variant": variant}
            try:
                yield labelled | self._baseline(variant)
            except Exception as error:  # the others may run all the same
                yield labelled | {"error": message_of(error)}

    def _decode(self) -> dict[str, Any]:
        from moe_jax import profiling

        point, program = self.point, self.program
        with self.quiet():
            times = profiling.measure(program, self.leaves, seconds=LONGEST_ROUNDS_S)
        first = profiling.first_counted(point.new_tokens)
        active = float(self.sizes.active_experts)
        if point.batch > 1:
            experts_BLUA = program.traced_experts(self.leaves, program.new_cache(self.leaves), point.new_tokens)
            active = float(profiling.active_experts(experts_BLUA[:, :, first:]).mean())
        self.ours_ms = times.per_token_ms
        positions = point.prompt + (first + point.new_tokens) / 2
        floor = profiling.decode_floor_ms(self.sizes, batch=point.batch, active_experts=active, positions=positions)
        return {
            "ms_per_token": round(times.per_token_ms, 4),
            "floor_ms": round(floor, 4),
            "fraction_of_floor": round(floor / times.per_token_ms, 4),
            "experts": self.sizes.num_experts,
            "active": self.sizes.active_experts,
            "active_experts": round(active, 2),
            "first_token_ms": round(times.first_token_ms, 3),
            "repeats": times.repeats,
        }

    def _prefill(self) -> dict[str, Any]:
        from moe_jax import profiling

        with self.quiet():
            elapsed_ms = profiling.measure_first_token(self.program, self.leaves)
        floor = profiling.prefill_floor_ms(self.config, self.sizes, batch=self.point.batch, length=self.point.prompt)
        return {
            "ms": round(elapsed_ms, 4),
            "floor_ms": round(floor, 4),
            "fraction_of_floor": round(floor / elapsed_ms, 4),
        }

    def _large_cache(self) -> dict[str, Any]:
        from moe_jax import profiling

        with self.quiet():
            times = profiling.measure(self.program, self.leaves, last=2 * profiling.FIRST_STEP, repeats=1)
        return {"ms_per_token": round(times.per_token_ms, 4)}

    def _end_to_end(self) -> dict[str, Any]:
        return {"ms_per_token": end_to_end_ms(self.model, self.point, self.quiet)}

    @functools.cached_property
    def _tokens(self) -> list[list[int]]:
        """The new tokens of every request, ours."""
        import numpy as np

        _, state = self.program.run(self.leaves, self.program.new_cache(self.leaves), self.point.new_tokens)
        return np.asarray(state.tokens_BU)[:, : self.point.new_tokens].tolist()

    @functools.cached_property
    def _theirs(self) -> Any:
        """The same weights as a transformers model."""
        import hf_baseline

        from moe_jax import models
        from moe_jax.model import parameters

        theirs = hf_baseline.build(self.config)
        values = parameters(self.model.module)
        rules = models.family_of(self.config).rules(self.model.config)
        hf_baseline.fill(theirs, values, places(values, rules, set(theirs.state_dict())))
        return theirs

    def _baseline(self, variant: str) -> dict[str, Any]:
        """transformers' time on the same weights, and where its greedy tokens part from ours."""
        import hf_baseline

        from moe_jax import profiling

        prompts, first = self.program.batch.prompts, profiling.first_counted(self.point.new_tokens)
        ours, theirs_model = self._tokens, self._theirs
        with hf_baseline.released():
            with self.quiet():
                measured, theirs = hf_baseline.measured(
                    theirs_model,
                    variant,
                    prompts,
                    new_tokens=self.point.new_tokens,
                    first=first,
                    seconds=self.flags.hf_seconds,
                )
            compared = list(zip(prompts, theirs, ours, strict=True))[:8]
            parted = [hf_baseline.disagreement(theirs_model, *each) for each in compared]
        return {
            **measured,
            "times_ours": round(measured["ms_per_token"] / self.ours_ms, 2),
            "requests_compared": len(parted),
            "requests_equal": parted.count(None),
            "partings": [each for each in parted if each],
            "source": f"transformers {hf_baseline.transformers.__version__}, torch {hf_baseline.torch.__version__}",
        }

    def _cost(self) -> dict[str, Any]:
        """Gigabytes of device memory, and seconds of compiling."""
        import jax

        if self.program is None:
            return {}
        program = self.program
        cache = self.point.batch * program.batch.capacity * self.sizes.cache_per_position
        peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
        sizes = {
            "parameters": self.sizes.parameters,
            "cache": cache,
            "temporary": program.temporary_bytes,
            "peak": peak,
        }
        return {
            "memory_gb": {name: round(size / 1e9, 4) for name, size in sizes.items()},
            "compile_s": round(program.compile_s, 2),
        }


def compile_options() -> dict[str, Any]:
    """What to compile with, since XLA may not try alternatives here (see `prepare`): its products by cuBLAS."""
    import jax

    return {"xla_gpu_enable_triton_gemm": False} if jax.default_backend() == "gpu" else {}


def message_of(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:500]


def places(
    values: dict[str, Any], rules: Any, wanted: set[str]
) -> dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Which parameter, slice and shape each of transformers' tensors is.

    Raises:
      ValueError: the parameters do not make all the tensors, or not without moving values.
    """
    from moe_jax.checkpoints.rules import spellings

    found = {}
    for path, value in values.items():
        shape = tuple(value.shape)
        options = [option for option in spellings(path, shape, rules) if {part.name for part in option} <= wanted]
        for part in options[0] if options else ():
            found[part.name] = (path, part.at, part.rule.tensor_shape(shape))
    if missing := wanted - found.keys():
        raise ValueError(f"no parameter makes transformers' {sorted(missing)[:5]}")
    return found


def end_to_end_ms(model: Any, point: Point, quiet: Quiet) -> float:
    """Milliseconds of `moe_jax.generate` for each new token, prompt and Python included: the median of five calls."""
    import moe_jax

    prompt = list(range(3, 3 + point.prompt))

    def seconds() -> float:
        begin_s = time.perf_counter()
        moe_jax.generate(model, prompt, max_new_tokens=point.new_tokens, stop_token_ids=())
        return time.perf_counter() - begin_s

    seconds()  # compiles
    with quiet():
        return round(1e3 * sorted(seconds() for _ in range(5))[2] / point.new_tokens, 4)


def line(record: dict[str, Any]) -> str:
    """A record in one line for the terminal."""
    kind = record.get("variant", record["kind"])
    start = f"{record['model']:20} {kind:11} {record['batch']:4} x {record['prompt']:<5}"
    if "error" in record:
        return f"{start} {record['error'][:300]}"
    told = [f"{record[key]:9.3f} {key}" for key in ("ms_per_token", "ms") if key in record]
    if "floor_ms" in record:
        told.append(f"floor {record['floor_ms']:.3f} ({record['fraction_of_floor']:.0%})")
    for key in ("active_experts", "first_token_ms", "times_ours", "requests_equal", "compile_s"):
        if key in record:
            told.append(f"{key} {record[key]}")
    if record.get("partings"):
        told.append(f"first parting {record['partings'][0]}")
    return f"{start} {', '.join(told)}"


def work(point: Point, config: dict[str, Any], flags: argparse.Namespace, parent: Connection) -> None:
    """A process: compiles, says so with None, waits for the word to measure, and sends records."""
    from pallas_kernels import timing

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of Ctrl-C the parent tells; it ends this process

    @contextlib.contextmanager
    def quiet() -> Iterator[None]:
        parent.send(BEGIN_QUIET)
        parent.recv()
        try:
            yield
        finally:
            parent.send(END_QUIET)

    try:
        bench = Bench(point, config, flags, quiet)
        bench.compile()
        parent.send(None)
        parent.recv()
        with timing.gpu_to_oneself():
            signal.alarm(LONGEST_POINT_S)
            for record in bench.records():
                parent.send(record)
    except Exception as error:  # a point that is lost leaves the others
        parent.send(point.record() | {"error": message_of(error)})


@dataclasses.dataclass
class Worker:
    point: Point
    process: Any
    pipe: Connection


def run(
    points: list[Point], configs: dict[str, dict[str, Any]], flags: argparse.Namespace, deadline_s: float
) -> list[dict[str, Any]]:
    """Measures point after point, each in a process that compiled beside the others; appends records as they come.

    While one is timed the others stand still: a step of a small model is shorter than their turns on the host's cores.
    Of the points that are compiled the first goes next, alone on the device. Ends at the deadline, whatever is left.
    No process outlives the call, however it ends: those that stand still would not hear of the parent's end.
    """
    from pallas_kernels import timing

    spawn = multiprocessing.get_context("spawn")
    waiting, started, compiling, ready, records = list(points), [], [], [], []

    def start_more() -> None:
        while waiting and len(compiling) + len(ready) < flags.processes:
            point = waiting.pop(0)
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=work, args=(point, configs[point.model], flags, theirs), daemon=True)
            process.start()
            theirs.close()
            started.append(Worker(point, process, ours))
            compiling.append(started[-1])

    def keep(record: dict[str, Any]) -> None:
        print(line(record), flush=True)
        timing.append_record(flags.output, record)
        records.append(record)

    def left_s() -> float:
        return max(0.0, deadline_s - time.monotonic())

    def received(worker: Worker) -> Any:
        """What a worker sends next; EOFError when it has ended, and TimeoutError at the deadline."""
        if not worker.pipe.poll(left_s()):
            raise TimeoutError
        return worker.pipe.recv()

    def settle() -> None:
        """Moves workers that are compiled, and records of those that failed."""
        pipes = {worker.pipe: worker for worker in compiling}
        for pipe in multiprocessing.connection.wait(list(pipes), timeout=0 if ready else left_s()):
            worker = pipes[pipe]
            compiling.remove(worker)
            try:
                failed = received(worker)
            except (EOFError, ConnectionError):
                failed = worker.point.record() | {"error": "its process died while it compiled"}
            if failed is None:
                ready.append(worker)
            else:
                keep(failed)

    def signal_others(what: signal.Signals) -> None:
        """Stops or continues those that compile: they would take the host's cores from the one that is timed."""
        for worker in compiling:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.process.pid, what)

    def measure(worker: Worker) -> None:
        before = len(records)
        with contextlib.suppress(EOFError, ConnectionError):
            worker.pipe.send("measure")
            while True:
                message = received(worker)
                if message == BEGIN_QUIET:
                    signal_others(signal.SIGSTOP)
                    worker.pipe.send("quiet")
                elif message == END_QUIET:
                    signal_others(signal.SIGCONT)
                else:
                    keep(message)
        signal_others(signal.SIGCONT)
        worker.process.join()  # its memory is free then
        made, died = len(records) - before, f"its process died, exit code {worker.process.exitcode}"
        if not made:
            keep(worker.point.record() | {"error": died})
        elif worker.process.exitcode and made <= len(worker.point.baselines):
            lost = worker.point.baselines[made - 1]  # and those after it
            keep(worker.point.record() | {"kind": "baseline", "variant": lost, "error": died})

    try:
        while left_s() and (waiting or compiling or ready):
            start_more()
            settle()
            if ready:
                ready.sort(key=lambda worker: points.index(worker.point))
                measure(ready.pop(0))
    except TimeoutError:
        print("--seconds are over while one measured: its record is lost", flush=True)
    finally:
        for worker in started:
            worker.process.kill()
    left = [worker.point for worker in (*ready, *compiling)] + waiting
    if left:
        print(f"{len(left)} points left out, --seconds are over: {', '.join(map(str, left))}", flush=True)
    return records


def measured(points: list[Point], configs: dict[str, dict[str, Any]], flags: argparse.Namespace) -> int:
    """`run` within --seconds, as a script's exit status: 0 if there is a record of every point and none failed."""
    deadline_s = time.monotonic() + flags.seconds
    if not points:
        raise SystemExit("expected at least one point to measure, got none: name --batches or --prefills")
    require_writable(flags.output)
    try:
        records = run(points, configs, flags, deadline_s)
    except KeyboardInterrupt:
        print(f"\nstopped; what was measured is in {flags.output}", file=sys.stderr)
        return INTERRUPTED
    return int(any("error" in record for record in records) or len(records) < len(points))


def config_at(path: pathlib.Path) -> dict[str, Any]:
    """The decoder's config.json at a path; ends the script if there is none that can be measured."""
    from moe_jax import models

    try:
        config = json.loads(path.read_text())
        known = models.family_of(config).Config.from_hf(config)
    except (OSError, ValueError, AttributeError) as error:
        raise SystemExit(f"expected {path} to be the config.json of a supported model, got: {error}") from None
    if not hasattr(known, "num_experts_per_tok"):
        raise SystemExit(f"expected {path} to be of a decoder, got an encoder-decoder ({config['model_type']})")
    return config


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=[path.stem for path in CONFIGS.iterdir()])
    parser.add_argument("--config", type=pathlib.Path, help="a config.json to measure instead of --models")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--batches", nargs="*", type=count, default=list(BATCHES))
    parser.add_argument("--prompt", type=count, default=128)
    parser.add_argument("--new-tokens", type=two_or_more, default=128)
    parser.add_argument("--prefills", nargs="*", type=shape, default=list(PREFILLS), metavar="BATCHxLENGTH")
    parser.add_argument("--baseline", choices=("hf",), help="also run transformers (needs torch)")
    parser.add_argument("--hf-variants", nargs="+", choices=HF_VARIANTS, default=list(HF_VARIANTS))
    parser.add_argument("--hf-seconds", type=seconds, default=6.0, help="longest that one of its generations runs")
    parser.add_argument("--again", action="store_true", help="measure what has its line too")
    parser.add_argument("--seconds", type=seconds, default=900.0, help="end after this long, whatever is left")
    parser.add_argument(
        "--processes", type=count, default=max(2, (os.cpu_count() or 2) - 3), help="that compile at once"
    )
    parser.add_argument("--output", type=pathlib.Path, help="docs/benchmarks/<device>/generate.jsonl by default")
    return parser.parse_args(arguments)


def prepare() -> None:
    """Settings that JAX reads when it starts.

    Processes compile while one measures, so XLA shall not time kernels on the device meanwhile. Memory is taken as it is
    needed, by one process after the other, and by torch.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "autotune" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_autotune_level=0"
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")


def main() -> int:
    from pallas_kernels import timing

    flags = parsed()
    prepare()
    flags.output = flags.output or timing.results_path("generate.jsonl")
    paths = [flags.config] if flags.config else [CONFIGS / f"{name}.json" for name in flags.models]
    configs = {path.stem: config_at(path) for path in paths}
    points = in_order([point for name, config in configs.items() for point in points_of(name, config, flags)], configs)
    left = points if flags.again else not_measured(points, flags.dtype, timing.records_of_here(flags.output))
    if points and not left:
        print(f"every point has its line in {flags.output}: --again measures them anew")
        return 0
    return measured(left, configs, flags)


if __name__ == "__main__":
    sys.exit(main())
