"""Times one MoE layer, routing included, at the shapes of real checkpoints, beside what else runs on the same GPU.

    python scripts/benchmark_kernels.py --shapes qwen3-30b mixtral --tokens 1 8 64 --baselines xla ragged_dot
    python scripts/benchmark_kernels.py --tokens 32 64 128 256 --baselines decode compact grouped

Random weights and tokens, hence nearly uniform routing; inputs rotate beyond the L2 cache; results are checked against
the plain-JAX definition in the same run. Times are sums of the kernels' device times: gaps between launches, about a
microsecond each in a CUDA graph, are not in them. The floor is the time to read the experts that were active and the
gate, or that of the FLOPs, whichever is longer, at what the GPU can do at best (`timing.CEILINGS`). Appends one JSON
line for each point to --output as it comes, the most telling points first and other implementations last;
scripts/plot_kernels.py makes a table and a picture of them. What this device has a line for is left out, so that a run
can be stopped and taken up again; --again measures it anew. Each point has a process of its own, which compiles while
another measures.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from flags import count, require_writable, seconds

from pallas_kernels import aot, dispatch, processes, timing
from pallas_kernels.experts import cases, compact_sm90, decode_sm90, experts, grouped_sm90
from pallas_kernels.experts import ragged as experts_ragged
from pallas_kernels.experts.cases import LAYERS, Case, Layer
from pallas_kernels.route import route
from pallas_kernels.route.cases import ROUTERS, Router

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
BASELINE_TOKENS = (1, 8, 64, 512, 4096, 8192)
BASELINES = ("xla", "ragged_dot", "tokamax", "torch")
OURS = "ours"  # and XLA, which checks it
# Of ours, whichever dispatch chooses: to see whether it chooses right, or whether it should choose another.
KERNELS = {each.IMPLEMENTATION.name: each.IMPLEMENTATION for each in (decode_sm90, compact_sm90, grouped_sm90)}
ROTATED_BYTES = 1e9
LEAST_ROUTINGS = 2
# Two bfloat16 computations, each within 4e-3 of the true value.
LARGEST_ERROR = 8e-3
MOST_PARTED = 0.01  # of the tokens


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
    read = active_experts * layer.expert_bytes + gate_bytes
    flops = tokens * (layer.active * layer.expert_bytes + gate_bytes)  # two bytes and two FLOPs for each weight
    best = timing.ceilings()
    return 1e6 * max(read / best.read_bytes_per_s, flops / best.bf16_flops_per_s)


def copies(layer: Layer) -> int:
    """How many layers of weights there are, so that together they exceed the L2 cache many times over."""
    return max(1, round(ROTATED_BYTES / (layer.num_experts * layer.expert_bytes)))


def active_experts(experts_TA: jax.Array) -> int:
    return len(np.unique(np.asarray(experts_TA)))


# Compiled, by name: `ours`, `xla` (the definition), and what makes inputs and checks results.
Programs = dict[str, Any]
SEED = jax.ShapeDtypeStruct((), jnp.int32)


def compile_new_weights(name: str) -> Callable[[np.int32], Weights]:
    return jax.jit(functools.partial(make_weights, LAYERS[name], ROUTERS[name])).lower(SEED).compile()


def compile_layer(name: str, tokens: int, layer: LayerFunction) -> Any:
    x_TD = jax.ShapeDtypeStruct((tokens, LAYERS[name].model_width), jnp.bfloat16)
    weights = jax.eval_shape(functools.partial(make_weights, LAYERS[name], ROUTERS[name]), SEED)
    return jax.jit(layer).lower(x_TD, weights).compile()


def compile_baseline(name: str, tokens: int, baseline: str) -> Any:
    return compile_layer(name, tokens, layer_function(name, "reference", baseline_experts()[baseline]))


def compile_point(name: str, tokens: int, layer: LayerFunction) -> Programs:
    """What one shape and token count needs, `layer` being ours."""
    x_TD = jax.ShapeDtypeStruct((tokens, LAYERS[name].model_width), jnp.bfloat16)

    weights = jax.eval_shape(functools.partial(make_weights, LAYERS[name], ROUTERS[name]), SEED)

    def new_x(seed: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.key(seed, impl="rbg"), x_TD.shape, x_TD.dtype)

    return {
        "ours": compile_layer(name, tokens, layer),
        "xla": compile_baseline(name, tokens, "xla"),
        "new_weights": compile_new_weights(name),
        "new_x": jax.jit(new_x).lower(SEED).compile(),
        "compare": jax.jit(compare).lower(*[jax.eval_shape(layer, x_TD, weights)] * 2).compile(),
    }


def takes_minutes(baseline: str, layer: Layer, tokens: int) -> bool:
    """Whether XLA's ragged_dot, which multiplies every row with every expert, needs more than 2e14 FLOPs."""
    return baseline == "ragged_dot" and tokens * layer.active * layer.num_experts * layer.expert_bytes > 2e14


def measure(name: str, tokens: int, programs: Programs) -> dict[str, Any]:
    """The record of one shape and token count.

    Raises:
      ValueError: the result is not the definition's.
    """
    weights = [programs["new_weights"](np.int32(index)) for index in range(copies(LAYERS[name]))]
    count = max(timing.rotations(Case(name, tokens, LAYERS[name]).read_bytes), len(weights), LEAST_ROUTINGS)
    inputs = [(programs["new_x"](np.int32(index)), weights[index % len(weights)]) for index in range(count)]
    error, parted = map(float, programs["compare"](programs["ours"](*inputs[0]), programs["xla"](*inputs[0])))
    if not (error <= LARGEST_ERROR and parted * tokens <= max(1, MOST_PARTED * tokens)):
        raise ValueError(
            f"expected a relative error of at most {LARGEST_ERROR} where experts agree, and other experts for at most "
            f"{MOST_PARTED:.0%} of the tokens; got {error} and {parted:.2%}"
        )
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
        "tokens_of_other_experts": round(parted * tokens),
        "kernels": [[kernel, round(time_us, 2)] for kernel, time_us in measured.kernels],
        "baselines_us": {"xla": baseline_us(programs["xla"], inputs[0])} if tokens in BASELINE_TOKENS else {},
    }


def baseline_us(program: Any, arguments: tuple[jax.Array, Weights]) -> float:
    return round(timing.measure(program, [arguments], repeats=2).time_us, 1)


def compare(ours: tuple[jax.Array, jax.Array], theirs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The relative error over tokens that went to the same experts, and the share of those that did not.

    Where two experts' logits are nearly equal, sums in another order may choose the other one.
    """
    (y_TD, experts_TA), (exact_TD, exact_experts_TA) = ours, theirs
    is_same_T = (jnp.sort(experts_TA, axis=1) == jnp.sort(exact_experts_TA, axis=1)).all(axis=1)
    y_TD, exact_TD = (jnp.where(is_same_T[:, None], each_TD.astype(jnp.float32), 0.0) for each_TD in (y_TD, exact_TD))
    return jnp.linalg.norm(y_TD - exact_TD) / jnp.linalg.norm(exact_TD), 1.0 - is_same_T.mean()


@dataclasses.dataclass(frozen=True)
class Task:
    """`what`: OURS, a baseline, or one of KERNELS."""

    shape: str
    tokens: int
    what: str


def work(task: Task) -> dict[str, Any]:
    """A process: compiles, then measures alone on the GPU."""
    name, tokens = task.shape, task.tokens
    if task.what == OURS:
        programs = compile_point(name, tokens, layer_function(name))
        with processes.turn_on_gpu():
            return measure(name, tokens, programs)
    if task.what in KERNELS:
        programs = compile_point(name, tokens, layer_function(name, run_experts=KERNELS[task.what].run))
        with processes.turn_on_gpu():
            time_us = measure(name, tokens, programs)["time_us"]
        return {"shape": name, "tokens": tokens, "baselines_us": {task.what: time_us}}
    new_weights, program = compile_new_weights(name), compile_baseline(name, tokens, task.what)
    x_TD = jax.random.normal(jax.random.key(0), (tokens, LAYERS[name].model_width), jnp.bfloat16)
    with processes.turn_on_gpu():
        time_us = baseline_us(program, (x_TD, new_weights(np.int32(0))))
    return {"shape": name, "tokens": tokens, "baselines_us": {task.what: time_us}}


def tasks_of(shapes: list[str], tokens: list[int], baselines: list[str], measured: list[dict[str, Any]]) -> list[Task]:
    """What `measured` lacks, in the order to do it."""
    done = {(line["shape"], line["tokens"], OURS) for line in measured if "time_us" in line}
    done |= {(line["shape"], line["tokens"], name) for line in measured for name in line.get("baselines_us", {})}
    ordered = sorted(tokens, key=lambda count: (count not in BASELINE_TOKENS, count))
    ours = [Task(name, count, OURS) for count in ordered for name in shapes]
    others = [
        Task(name, count, baseline)
        for baseline in baselines
        for count in ordered
        for name in shapes
        if is_comparable(baseline, name, count)
    ]
    return [task for task in ours + others if (task.shape, task.tokens, task.what) not in done]


def is_comparable(baseline: str, name: str, tokens: int) -> bool:
    """Whether it is timed at this point by itself: XLA is with ours, and a kernel of ours where it can run."""
    if baseline in KERNELS:
        operands, named = aot.shapes_of(functools.partial(cases.arguments, Case(name, tokens, LAYERS[name])))
        return KERNELS[baseline].supports(dispatch.current_device(), *operands, **named) is None
    return baseline != "xla" and tokens in BASELINE_TOKENS and not takes_minutes(baseline, LAYERS[name], tokens)


def torch_records(tasks: list[Task], timeout_s: float) -> list[dict[str, Any]]:
    """Records of torch's grouped_mm layer, from one process for all; what it had in time."""
    script = pathlib.Path(__file__).with_name("benchmark_torch_experts.py")
    by_shape = sorted(tasks, key=lambda task: task.shape)  # stable; weights are made once for each shape
    points = [json.dumps([dataclasses.asdict(LAYERS[task.shape]), task.shape, task.tokens]) for task in by_shape]
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
    return [{"shape": row["shape"], "tokens": row["tokens"], "baselines_us": {"torch": row["time_us"]}} for row in rows]


def summary(records: list[dict[str, Any]]) -> str:
    lines = [f"{'shape':16} {'tokens':>6} {'us':>9} {'floor':>8} {'of it':>6} {'active':>6}  others"]
    for record in records:
        if "error" in record:
            lines.append(f"{record['shape']:16} {record['tokens']:6} {record['error'][:140]}")
            continue
        ours = " " * 33
        if "time_us" in record:
            ours = f"{record['time_us']:9.1f} {record['floor_us']:8.1f} "
            ours += f"{record['fraction_of_floor']:6.1%} {record['active_experts']:6.1f}"
        others = " ".join(f"{name}={time_us:.0f}" for name, time_us in record.get("baselines_us", {}).items())
        lines.append(f"{record['shape']:16} {record['tokens']:6} {ours}  {others}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(LAYERS), choices=list(LAYERS))
    parser.add_argument("--tokens", nargs="+", type=count, default=list(TOKENS))
    parser.add_argument("--baselines", nargs="*", default=list(BASELINES), choices=[*BASELINES, *KERNELS])
    parser.add_argument("--again", action="store_true", help="measure what has its line too")
    parser.add_argument("--processes", type=count, default=os.cpu_count())
    parser.add_argument("--seconds", type=seconds, default=600.0, help="end after this long, whatever is left")
    parser.add_argument("--output", type=pathlib.Path, help="docs/benchmarks/<device>/kernels.jsonl by default")
    flags = parser.parse_args()
    deadline_s = time.monotonic() + flags.seconds

    processes.share_gpu()
    device = dispatch.current_device()
    if device.platform != "gpu":
        print(f"needs a GPU; jax sees {device.kind}. `make aot` checks the kernels without one.", file=sys.stderr)
        return 2
    here = {OURS, *KERNELS, *baseline_experts(), *(["torch"] if importlib.util.find_spec("torch") else [])}
    output = flags.output or timing.results_path("kernels.jsonl")
    require_writable(output)
    measured = [] if flags.again else timing.records_of_here(output)
    tasks = tasks_of(flags.shapes, flags.tokens, flags.baselines, measured)
    tasks = [task for task in tasks if task.what in here]
    by_jax, by_torch = ([task for task in tasks if (task.what == "torch") is is_torch] for is_torch in (False, True))
    records: list[dict[str, Any]] = []

    def keep(record: dict[str, Any]) -> None:
        print(summary([record]).splitlines()[1], flush=True)
        timing.append_record(output, record)
        records.append(record)

    for outcome in processes.outcomes(work, by_jax, processes=flags.processes, deadline_s=deadline_s):
        task = outcome.task
        if outcome.error is None:
            keep(outcome.result)
        elif task.what == OURS:
            keep({"shape": task.shape, "tokens": task.tokens, "error": outcome.error})
        else:
            print(f"{task.shape}, {task.tokens} tokens, {task.what}: left out, {outcome.error}", flush=True)
    if by_torch and time.monotonic() < deadline_s:
        for record in torch_records(by_torch, deadline_s - time.monotonic()):
            keep(record)
    ours = sorted((record for record in records if "time_us" in record or "error" in record), key=_place)
    print(summary(ours))
    failed = sum("error" in record for record in ours)
    left_out = sum(task.what == OURS for task in tasks) - len(ours)
    print(f"{len(ours) - failed} points measured, {failed} failed, {left_out} left out as --seconds were over")
    return int(failed + left_out > 0)


def _place(record: dict[str, Any]) -> tuple[int, int]:
    return list(LAYERS).index(record["shape"]), record["tokens"]


if __name__ == "__main__":
    sys.exit(main())
