"""Times one MoE layer, routing included, at the shapes of real checkpoints, beside what else runs on the same GPU.

    python scripts/benchmark_kernels.py --shapes qwen3-30b mixtral --tokens 1 8 64 --baselines xla ragged_dot

Random weights and tokens, hence nearly uniform routing; inputs rotate beyond the L2 cache; results are checked against
the plain-JAX definition in the same run. `time_us` is the sum of the kernels' device times, `chained_us` the wall-clock
time per layer of a program of eight layers (gaps between launches included). The floor is the time to read the experts
that were active and the gate at 4.6 TB/s, or that of the FLOPs at 808 TFLOP/s, whichever is longer. Appends one JSON
line for each point to --output; scripts/plot_kernels.py makes a table and a picture of them.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib.util
import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

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
CHAINED_LAYERS, MOST_CHAINED_TOKENS = 8, 64
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


@functools.partial(jax.jit, static_argnums=(0, 1))
def make_weights(layer: Layer, router: Router, key: jax.Array) -> Weights:
    """Random bfloat16 weights that keep values of unit size."""
    keys = iter(jax.random.split(key, 7))

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


def chained(layer: LayerFunction) -> Callable[[jax.Array, list[Weights]], jax.Array]:
    def layers(x_TD: jax.Array, weights: list[Weights]) -> jax.Array:
        for index in range(CHAINED_LAYERS):
            x_TD, _ = layer(x_TD, weights[index % len(weights)])
        return x_TD

    return layers


def chained_us(compiled: Callable[..., jax.Array], x_TD: jax.Array, weights: list[Weights], *, runs: int = 20) -> float:
    """Wall-clock time for each layer of a chain, launched `runs` times back to back."""
    jax.block_until_ready(compiled(x_TD, weights))
    start_s = time.perf_counter()
    for _ in range(runs):
        result = compiled(x_TD, weights)
    jax.block_until_ready(result)
    return 1e6 * (time.perf_counter() - start_s) / (runs * CHAINED_LAYERS)


def active_experts(experts_TA: jax.Array) -> int:
    return len(set(experts_TA.reshape(-1).tolist()))


Programs = dict[str, Any]  # compiled, by name: `ours`, its `definition`, `chained` layers of ours, and baselines
Compiling = dict[str, concurrent.futures.Future]


def functions(name: str, tokens: int, baselines: list[str]) -> dict[str, Callable]:
    """What has to be compiled for a shape and token count."""
    found = baseline_experts()
    wanted = {"ours": layer_function(name), "definition": layer_function(name, "reference", found["xla"])}
    if tokens in BASELINE_TOKENS:
        wanted |= {key: layer_function(name, "reference", found[key]) for key in baselines if key in found}
    if tokens <= MOST_CHAINED_TOKENS:
        wanted["chained"] = chained(wanted["ours"])
    return wanted


def compile_function(function: Callable, key: str, name: str, tokens: int) -> Any:
    layer = LAYERS[name]
    x_TD = jax.ShapeDtypeStruct((tokens, layer.model_width), jnp.bfloat16)
    weights = jax.eval_shape(functools.partial(make_weights, layer, ROUTERS[name]), jax.random.key(0, impl="rbg"))
    arguments = (x_TD, [weights] * copies(layer) if key == "chained" else weights)
    # The definition checks results and is not timed: finding its fastest algorithms would take longer than all the rest.
    options = {"xla_gpu_autotune_level": 0} if key == "definition" else None
    return jax.jit(function).lower(*arguments).compile(options)


def compile_all(points: list[tuple[str, int]], baselines: list[str], deadline_s: float) -> list[Compiling]:
    """Compiles on many threads, and returns when all is done: XLA's autotuning would disturb measurements."""
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        compiling: list[Compiling] = [
            {
                key: pool.submit(compile_function, function, key, name, tokens)
                for key, function in functions(name, tokens, baselines).items()
            }
            for name, tokens in points
        ]
        waiting = [future for futures in compiling for future in futures.values()]
        for count, future in enumerate(waiting):
            with contextlib.suppress(concurrent.futures.TimeoutError, Exception):  # raised again where it is needed
                future.result(timeout=max(0.0, deadline_s - time.monotonic()))
            if sys.stderr.isatty():
                print(f"\rcompiled {count + 1} of {len(waiting)}", end="", file=sys.stderr)
        pool.shutdown(cancel_futures=True)
    return compiling


def results(compiling: Compiling) -> Programs:
    """The compiled programs; a baseline that did not compile is shown and left out."""
    programs = {}
    for key, future in compiling.items():
        if key in BASELINES and future.exception():
            print(f"{key}: left out, {str(future.exception())[:200]}", flush=True)
        else:
            programs[key] = future.result()
    return programs


def make_inputs(name: str, tokens: int, weights: list[Weights]) -> list[tuple[jax.Array, Weights]]:
    """Enough inputs that what they read exceeds the L2 cache twice over."""
    layer = LAYERS[name]
    count = max(timing.rotations(Case(name, tokens, layer).read_bytes), len(weights))
    keys = jax.random.split(jax.random.key(tokens, impl="rbg"), count)
    shape = (tokens, layer.model_width)
    return [
        (jax.random.normal(key, shape, jnp.bfloat16), weights[index % len(weights)]) for index, key in enumerate(keys)
    ]


def measure(name: str, tokens: int, programs: Programs, weights: list[Weights]) -> dict[str, Any]:
    """The record of one shape and token count.

    Raises:
      ValueError: the result is not the definition's.
    """
    inputs = make_inputs(name, tokens, weights)
    error = relative_error(programs["ours"](*inputs[0])[0], programs["definition"](*inputs[0])[0])
    if not error <= LARGEST_ERROR:
        raise ValueError(f"expected a relative error of at most {LARGEST_ERROR}, got {error}")
    active = [active_experts(programs["ours"](*arguments)[1]) for arguments in inputs]
    mean_active = sum(active) / len(active)
    measured = timing.measure(programs["ours"], inputs)
    floor = floor_us(LAYERS[name], tokens, mean_active)
    record = {
        "shape": name,
        "tokens": tokens,
        "time_us": round(measured.time_us, 2),
        "floor_us": round(floor, 2),
        "fraction_of_floor": round(floor / measured.time_us, 4),
        "active_experts": round(mean_active, 2),
        "relative_error": error,
        "kernels": [[kernel, round(time_us, 2)] for kernel, time_us in measured.kernels],
    }
    if "chained" in programs:
        record["chained_us"] = round(chained_us(programs["chained"], inputs[0][0], weights), 2)
    times_us = {
        key: round(timing.measure(program, inputs[:2], repeats=2).time_us, 1)
        for key, program in programs.items()
        if key in BASELINES
    }
    return record | ({"baselines_us": times_us} if times_us else {})


def relative_error(y_TD: jax.Array, exact_TD: jax.Array) -> float:
    exact_TD = exact_TD.astype(jnp.float32)
    return float(jnp.linalg.norm(y_TD.astype(jnp.float32) - exact_TD) / jnp.linalg.norm(exact_TD))


def run(points: list[tuple[str, int]], baselines: list[str], deadline_s: float) -> Iterator[dict[str, Any]]:
    """A record of each point; a point that fails gives one with its `error`, and the others go on."""
    compiled = compile_all(points, baselines, deadline_s)
    made, weights = "", []
    for (name, tokens), compiling in zip(points, compiled, strict=True):
        is_late = time.monotonic() > deadline_s
        if is_late or any(future.cancelled() for future in compiling.values()):
            print(f"{name}, {tokens} tokens: left out, --seconds are over", flush=True)
            continue
        if name != made:
            weights.clear()
            keys = jax.random.split(jax.random.key(0, impl="rbg"), copies(LAYERS[name]))
            made, weights = name, [make_weights(LAYERS[name], ROUTERS[name], key) for key in keys]
        try:
            yield measure(name, tokens, results(compiling), weights)
        except Exception as error:  # one point must not lose the others; it is recorded, shown, and fails the run
            yield {"shape": name, "tokens": tokens, "error": f"{type(error).__name__}: {error}"[:500]}


def torch_records(shapes: list[str], tokens: list[int]) -> dict[tuple[str, int], float]:
    """Microseconds of torch's grouped_mm layer by (shape, tokens), measured by a process of its own."""
    script = pathlib.Path(__file__).with_name("benchmark_torch_experts.py")
    points = [json.dumps([dataclasses.asdict(LAYERS[name]), name, count]) for name in shapes for count in tokens]
    done = subprocess.run([sys.executable, script], input="\n".join(points), capture_output=True, text=True)
    if done.returncode:
        print(f"torch: left out, {script.name} failed: {done.stderr.strip().splitlines()[-1:]}", flush=True)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {(row["shape"], row["tokens"]): row["time_us"] for row in rows}


def summary(records: list[dict[str, Any]]) -> str:
    lines = [f"{'shape':16} {'tokens':>6} {'us':>9} {'chained':>8} {'floor':>8} {'of it':>6} {'active':>6}  others"]
    for record in records:
        if "error" in record:
            lines.append(f"{record['shape']:16} {record['tokens']:6} {record['error'][:140]}")
            continue
        others = " ".join(f"{name}={time_us:.0f}" for name, time_us in record.get("baselines_us", {}).items())
        lines.append(
            f"{record['shape']:16} {record['tokens']:6} {record['time_us']:9.1f} {record.get('chained_us', 0):8.1f} "
            f"{record['floor_us']:8.1f} {record['fraction_of_floor']:6.1%} {record['active_experts']:6.1f}  {others}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(LAYERS), choices=list(LAYERS))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--baselines", nargs="*", default=list(BASELINES), choices=BASELINES)
    parser.add_argument("--seconds", type=float, default=600.0, help="start no further measurement after this long")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("docs/benchmarks/h200/kernels.jsonl"))
    flags = parser.parse_args()

    deadline_s = time.monotonic() + flags.seconds
    torch_us = {}
    if "torch" in flags.baselines and importlib.util.find_spec(
        "torch"
    ):  # first: jax takes the GPU's memory when it starts
        torch_us = torch_records(flags.shapes, [count for count in flags.tokens if count in BASELINE_TOKENS])
    device = dispatch.current_device()
    if device.platform != "gpu":
        print(f"needs a GPU; jax sees {device.kind}. `make aot` checks the kernels without one.", file=sys.stderr)
        return 2
    records = []
    points = [(name, tokens) for name in flags.shapes for tokens in flags.tokens]
    for record in run(points, flags.baselines, deadline_s):
        point = (record["shape"], record["tokens"])
        if point in torch_us:
            record.setdefault("baselines_us", {})["torch"] = torch_us[point]
        print(summary([record]).splitlines()[1], flush=True)
        timing.append_record(flags.output, record)
        records.append(record)
    print(summary(records))
    return int(any("error" in record for record in records))


if __name__ == "__main__":
    sys.exit(main())
