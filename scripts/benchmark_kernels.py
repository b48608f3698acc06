"""Times one MoE layer, routing included, at the shapes of real checkpoints, beside what else runs on the same GPU.

    python scripts/benchmark_kernels.py --shapes qwen3-30b mixtral --tokens 1 8 64 --baselines xla ragged_dot

Random weights and tokens, hence nearly uniform routing; inputs rotate beyond the L2 cache; results are checked against
the plain-JAX definition in the same run. Times are sums of the kernels' device times: gaps between launches, about a
microsecond each in a CUDA graph, are not in them. The floor is the time to read the experts that were active and the
gate at 4.6 TB/s, or that of the FLOPs at 808 TFLOP/s, whichever is longer. Appends one JSON line for each point to
--output; scripts/plot_kernels.py makes a table and a picture of them. Two processes for each shape compile while
another measures.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import importlib.util
import json
import multiprocessing
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from queue import Empty
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch, timing
from pallas_kernels.experts import experts
from pallas_kernels.experts import ragged as experts_ragged
from pallas_kernels.experts.cases import LAYERS, Case, Layer
from pallas_kernels.route import route
from pallas_kernels.route.cases import ROUTERS, Router

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
BASELINE_TOKENS = (1, 8, 64, 512, 4096, 8192)
BASELINES = ("xla", "ragged_dot", "tokamax", "torch")
ROTATED_BYTES = 1e9
# Two bfloat16 computations, each within 4e-3 of the true value.
LARGEST_ERROR = 8e-3


@dataclasses.dataclass(frozen=True)
class Weights:
    """One layer's arrays, biases None where the layer has none."""

    gate_ED: jax.Array
    up_EGFD: jax.Array
    down_EDF: jax.Array
    gate_bias_E: jax.Array | None
    selection_bias_E: jax.Array | None
    up_bias_EGF: jax.Array | None
    down_bias_ED: jax.Array | None


jax.tree_util.register_dataclass(Weights)
# x_TD, weights -> y_TD and the experts that were chosen
LayerFunction = Callable[[jax.Array, Weights], tuple[jax.Array, jax.Array]]


def layer_function(name: str, route_by: str | None = None, run_experts: Callable = experts) -> LayerFunction:
    """The MoE layer of a named shape; dispatch chooses unless an implementation is named."""
    rule, activation = ROUTERS[name].rule, LAYERS[name].activation

    def layer(x_TD: jax.Array, weights: Weights) -> tuple[jax.Array, jax.Array]:
        biases = dict(gate_bias_E=weights.gate_bias_E, selection_bias_E=weights.selection_bias_E)
        routing = route(x_TD, weights.gate_ED, rule=rule, implementation=route_by, **biases)
        operands = (x_TD, routing, weights.up_EGFD, weights.down_EDF)
        biases = dict(up_bias_EGF=weights.up_bias_EGF, down_bias_ED=weights.down_bias_ED)
        return run_experts(*operands, activation=activation, **biases), routing.experts_TA

    return layer


def baseline_experts() -> dict[str, Callable]:
    """The expert layers in JAX to compare with: the definition, and sorted rows with a grouped product."""
    found = {
        "xla": functools.partial(experts, implementation="reference"),
        "ragged_dot": functools.partial(experts, implementation="ragged"),
    }
    if importlib.util.find_spec("tokamax"):
        import tokamax

        found["tokamax"] = functools.partial(experts_ragged.experts, ragged_dot=tokamax.ragged_dot)
    return found


def make_weights(layer: Layer, router: Router, seed: jax.Array) -> Weights:
    """Random bfloat16 weights that keep values of unit size."""
    keys = iter(jax.random.split(jax.random.key(seed, impl="rbg"), 7))

    def uniform(*shape: int, variance: float = 1.0) -> jax.Array:
        bound = (3 * variance) ** 0.5
        return jax.random.uniform(next(keys), shape, jnp.bfloat16, -bound, bound)

    experts_count, gates, width, model_width = layer.num_experts, layer.gates, layer.width, layer.model_width
    return Weights(
        gate_ED=uniform(experts_count, model_width, variance=1 / model_width),
        up_EGFD=uniform(experts_count, gates, width, model_width, variance=1 / model_width),
        down_EDF=uniform(experts_count, model_width, width, variance=1 / width),
        gate_bias_E=uniform(experts_count, variance=0.01).astype(jnp.float32) if router.has_gate_bias else None,
        selection_bias_E=jnp.zeros(experts_count) if router.has_selection_bias else None,
        up_bias_EGF=uniform(experts_count, gates, width) if layer.has_biases else None,
        down_bias_ED=uniform(experts_count, model_width) if layer.has_biases else None,
    )


def floor_us(layer: Layer, tokens: int, active_experts: float) -> float:
    """What no kernel can beat: the bytes of the active experts and the gate, or the FLOPs of the chosen rows."""
    gate_bytes = 2 * layer.num_experts * layer.model_width
    read_s = (active_experts * layer.expert_bytes + gate_bytes) / timing.READ_BYTES_PER_S
    flops = tokens * (layer.active * layer.expert_bytes + gate_bytes)  # two bytes and two FLOPs for each weight
    return 1e6 * max(read_s, flops / timing.BF16_FLOPS_PER_S)


def copies(layer: Layer) -> int:
    """How many layers of weights there are, so that together they exceed the L2 cache many times over."""
    return max(1, round(ROTATED_BYTES / (layer.num_experts * layer.expert_bytes)))


def active_experts(experts_TA: jax.Array) -> int:
    return len(np.unique(np.asarray(experts_TA)))


# Compiled, by name: `ours`, `xla` (the definition), and what makes inputs and checks results.
Programs = dict[str, Any]
SEED = jax.ShapeDtypeStruct((), jnp.int32)


@functools.cache
def compile_new_weights(name: str) -> Callable[[np.int32], Weights]:
    return jax.jit(functools.partial(make_weights, LAYERS[name], ROUTERS[name])).lower(SEED).compile()


def compile_layer(name: str, tokens: int, layer: LayerFunction) -> Any:
    x_TD = jax.ShapeDtypeStruct((tokens, LAYERS[name].model_width), jnp.bfloat16)
    weights = jax.eval_shape(functools.partial(make_weights, LAYERS[name], ROUTERS[name]), SEED)
    return jax.jit(layer).lower(x_TD, weights).compile()


def compile_baseline(name: str, tokens: int, baseline: str) -> Any:
    return compile_layer(name, tokens, layer_function(name, "reference", baseline_experts()[baseline]))


def compile_point(name: str, tokens: int) -> Programs:
    """What one shape and token count needs."""
    x_TD = jax.ShapeDtypeStruct((tokens, LAYERS[name].model_width), jnp.bfloat16)

    def new_x(seed: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.key(seed, impl="rbg"), x_TD.shape, x_TD.dtype)

    return {
        "ours": compile_layer(name, tokens, layer_function(name)),
        "xla": compile_baseline(name, tokens, "xla"),
        "new_weights": compile_new_weights(name),
        "new_x": jax.jit(new_x).lower(SEED).compile(),
        "relative_error": jax.jit(relative_error).lower(x_TD, x_TD).compile(),
    }


def takes_minutes(baseline: str, layer: Layer, tokens: int) -> bool:
    """Whether XLA's ragged_dot, which multiplies every row with every expert, needs more than 2e14 FLOPs."""
    return baseline == "ragged_dot" and tokens * layer.active * layer.num_experts * layer.expert_bytes > 2e14


def measure(name: str, tokens: int, programs: Programs, weights: list[Weights]) -> dict[str, Any]:
    """The record of one shape and token count.

    Raises:
      ValueError: the result is not the definition's.
    """
    count = max(timing.rotations(Case(name, tokens, LAYERS[name]).read_bytes), len(weights))
    inputs = [(programs["new_x"](np.int32(index)), weights[index % len(weights)]) for index in range(count)]
    error = float(programs["relative_error"](programs["ours"](*inputs[0])[0], programs["xla"](*inputs[0])[0]))
    if not error <= LARGEST_ERROR:
        raise ValueError(f"expected a relative error of at most {LARGEST_ERROR}, got {error}")
    active = [active_experts(programs["ours"](*arguments)[1]) for arguments in inputs]
    mean_active = sum(active) / len(active)
    measured = timing.measure(programs["ours"], inputs)
    floor = floor_us(LAYERS[name], tokens, mean_active)
    return {
        "shape": name,
        "tokens": tokens,
        "time_us": round(measured.time_us, 2),
        "floor_us": round(floor, 2),
        "fraction_of_floor": round(floor / measured.time_us, 4),
        "active_experts": round(mean_active, 2),
        "relative_error": error,
        "kernels": [[kernel, round(time_us, 2)] for kernel, time_us in measured.kernels],
        "baselines_us": {"xla": baseline_us(programs["xla"], inputs[0])} if tokens in BASELINE_TOKENS else {},
    }


def baseline_us(program: Any, arguments: tuple[jax.Array, Weights]) -> float:
    return round(timing.measure(program, [arguments], repeats=2).time_us, 1)


def relative_error(y_TD: jax.Array, exact_TD: jax.Array) -> jax.Array:
    exact_TD = exact_TD.astype(jnp.float32)
    return jnp.linalg.norm(y_TD.astype(jnp.float32) - exact_TD) / jnp.linalg.norm(exact_TD)


def run_shape(name: str, tokens: list[int], baselines: list[str], seconds: float, records: Any) -> None:
    """Puts a record of each token count into the queue `records`, the same again with each slow baseline, None last.

    A point that fails gives a record with its `error`, and the others go on.
    """
    deadline_s = time.monotonic() + seconds
    weights: list[Weights] = []
    measured: dict[int, dict[str, Any]] = {}

    def measure_point(count: int, programs: Programs) -> None:
        weights.extend(programs["new_weights"](np.int32(i)) for i in range(len(weights), copies(LAYERS[name])))
        measured[count] = measure(name, count, programs, weights)

    def measure_baseline(count: int, baseline: str, program: Any) -> None:
        x_TD = jax.random.normal(jax.random.key(0), (count, LAYERS[name].model_width), jnp.bfloat16)
        measured[count]["baselines_us"][baseline] = baseline_us(program, (x_TD, weights[0]))

    slow = [(count, key) for count in tokens for key in baselines if is_timed_later(key, name, count)]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        work = [(count, measure_point, (), pool.submit(compile_point, name, count)) for count in tokens]
        work += [(n, measure_baseline, (key,), pool.submit(compile_baseline, name, n, key)) for n, key in slow]
        while work:
            count, run, arguments, future = work.pop(0)
            try:
                compiled = future.result(timeout=max(0.0, deadline_s - time.monotonic()))
                with timing.gpu_to_oneself():
                    if time.monotonic() > deadline_s:
                        raise TimeoutError
                    run(count, *arguments, compiled)
                records.put(measured[count])
            except TimeoutError:
                print(f"{name}, {count} tokens: left out, --seconds are over", *arguments, flush=True)
            except Exception as error:
                message = f"{type(error).__name__}: {error}"[:500]
                if run is measure_point:
                    records.put({"shape": name, "tokens": count, "error": message})
                else:
                    print(f"{name}, {count} tokens: left out,", *arguments, message, flush=True)
        pool.shutdown(wait=False, cancel_futures=True)
    records.put(None)


def is_timed_later(baseline: str, name: str, tokens: int) -> bool:
    """Baselines other than XLA, which checks results too, come after all that is ours."""
    is_slow = baseline != "xla" and baseline in baseline_experts()
    return is_slow and tokens in BASELINE_TOKENS and not takes_minutes(baseline, LAYERS[name], tokens)


def torch_records(shapes: list[str], tokens: list[int], timeout_s: float) -> dict[tuple[str, int], float]:
    """Microseconds of torch's grouped_mm layer by (shape, tokens), from a process of its own; what it had in time."""
    script = pathlib.Path(__file__).with_name("benchmark_torch_experts.py")
    points = [json.dumps([dataclasses.asdict(LAYERS[name]), name, count]) for name in shapes for count in tokens]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen([sys.executable, script], stdin=subprocess.PIPE, stdout=output, text=True)
        try:
            process.communicate("\n".join(points), timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.returncode:
            print(f"torch: {script.name} ended early ({process.returncode}); what it measured is kept", flush=True)
        output.seek(0)
        rows = [json.loads(line) for line in output if line.endswith("}\n")]
    return {(row["shape"], row["tokens"]): row["time_us"] for row in rows}


def summary(records: list[dict[str, Any]]) -> str:
    lines = [f"{'shape':16} {'tokens':>6} {'us':>9} {'floor':>8} {'of it':>6} {'active':>6}  others"]
    for record in records:
        if "error" in record:
            lines.append(f"{record['shape']:16} {record['tokens']:6} {record['error'][:140]}")
            continue
        others = " ".join(f"{name}={time_us:.0f}" for name, time_us in record.get("baselines_us", {}).items())
        lines.append(
            f"{record['shape']:16} {record['tokens']:6} {record['time_us']:9.1f} "
            f"{record['floor_us']:8.1f} {record['fraction_of_floor']:6.1%} {record['active_experts']:6.1f}  {others}"
        )
    return "\n".join(lines)


def received(queue: Any, processes: list[Any]) -> Iterator[dict[str, Any]]:
    """Records as they come, until every process has put its None, or has died."""
    running = len(processes)
    while running:
        try:
            record = queue.get(timeout=5)
        except Empty:
            if not any(process.is_alive() for process in processes):
                raise RuntimeError("the measuring processes ended early; their errors are above") from None
            continue
        if record is None:
            running -= 1
        else:
            yield record


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(LAYERS), choices=list(LAYERS))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--baselines", nargs="*", default=list(BASELINES), choices=BASELINES)
    parser.add_argument("--seconds", type=float, default=600.0, help="start no further measurement after this long")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("docs/benchmarks/h200/kernels.jsonl"))
    flags = parser.parse_args()

    # XLA would measure alternatives while it compiles: that takes longer than all the rest, and disturbs measurements.
    # Without it XLA's own Triton products are slow, cuBLAS's as fast as ever.
    flags_of_xla = " --xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + flags_of_xla
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # a process for each shape, all on one GPU
    device = dispatch.current_device()
    if device.platform != "gpu":
        print(f"needs a GPU; jax sees {device.kind}. `make aot` checks the kernels without one.", file=sys.stderr)
        return 2
    spawn = multiprocessing.get_context("spawn")
    queue = spawn.Queue()
    ordered = sorted(flags.tokens, key=lambda count: (count not in BASELINE_TOKENS, count))
    with timing.gpu_to_oneself():
        processes = [
            spawn.Process(target=run_shape, args=(name, part, flags.baselines, flags.seconds, queue), daemon=True)
            for name in flags.shapes
            for part in (ordered[::2], ordered[1::2])
        ]
        for process in processes:
            process.start()
        torch_us = {}
        if "torch" in flags.baselines and importlib.util.find_spec("torch"):
            torch_us = torch_records(flags.shapes, [n for n in ordered if n in BASELINE_TOKENS], flags.seconds / 6)
    records = {}
    for record in received(queue, processes):
        point = (record["shape"], record["tokens"])
        if point in torch_us:
            record.setdefault("baselines_us", {})["torch"] = torch_us[point]
        print(summary([record]).splitlines()[1], flush=True)
        timing.append_record(flags.output, record)
        records[point] = record
    ordered_records = [records[name, n] for name in flags.shapes for n in sorted(flags.tokens) if (name, n) in records]
    print(summary(ordered_records))
    return int(any("error" in record for record in ordered_records))


if __name__ == "__main__":
    sys.exit(main())
