"""Shows where a decode step goes: microseconds and share of each operator, and a trace for Perfetto.

    python scripts/profile_step.py --model tinymistral-6x248m --batch 1

The time of a step is measured without a profiler. Kernels are then profiled in the same program compiled without CUDA
graphs, where each is known by its instruction; the compiler's notes on where an instruction came from give its
operator. What the kernels leave of the step's time are gaps between them. A second trace, of the program as it is, goes to
--trace: open the .trace.json.gz in ui.perfetto.dev, or the folder in XProf. Appends a JSON line to --output;
scripts/plot_generate.py makes a table and a picture of it.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import tempfile
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from benchmark_generate import CONFIGS, config_at, prepare
from flags import count, require_writable

STEPS = 32  # profiled
NO_GRAPHS = {"xla_gpu_graph_min_graph_size": 1_000_000}


def profiled(program: Any, leaves: tuple[Any, ...], tokens: int, directory: str | pathlib.Path) -> pathlib.Path:
    """Profiles one generation of so many tokens, after one that warms up; returns the profile's path."""
    import jax

    from moe_jax import profiling

    _, state = program.run(leaves, program.new_cache(leaves), tokens)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(str(directory), profiler_options=options):
        program.run(leaves, state.cache, tokens)
    return profiling.trace_file(directory)


def by_operator(kernels: list[Any], origins: dict[str, Any]) -> tuple[dict[str, float], list[list[Any]]]:
    """Microseconds of each operator, longest first, and the rows of kernels behind them."""
    from moe_jax import profiling

    totals: dict[str, float] = {}
    rows = []
    for kernel in sorted(kernels, key=lambda each: -each.total_us):
        origin = origins.get(kernel.instruction)
        operator = profiling.operator_of(origin) if origin else profiling.OTHER
        totals[operator] = totals.get(operator, 0.0) + kernel.total_us
        rows.append([kernel.instruction, kernel.kernel[:60], operator, kernel.calls, round(kernel.total_us, 2)])
    return dict(sorted(totals.items(), key=lambda each: -each[1])), rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tinymistral-6x248m", choices=[path.stem for path in CONFIGS.iterdir()])
    parser.add_argument("--config", type=pathlib.Path, help="a config.json to profile instead of --model")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--batch", type=count, default=1)
    parser.add_argument("--prompt", type=count, default=128)
    parser.add_argument("--trace", type=pathlib.Path, help="folder for the trace of the program as it is")
    parser.add_argument("--output", type=pathlib.Path, help="docs/benchmarks/<device>/profile.jsonl by default")
    flags = parser.parse_args()
    prepare()
    path = flags.config or CONFIGS / f"{flags.model}.json"
    config = config_at(path)

    import jax

    from moe_jax import profiling, testing
    from pallas_kernels import timing

    output = flags.output or timing.results_path("profile.jsonl")
    require_writable(output)
    abstract = testing.abstract_model(config, dtype=flags.dtype)
    shape = dict(batch=flags.batch, prompt=flags.prompt, new_tokens=4 * STEPS)
    program = profiling.compile_generate(abstract, **shape)
    has_graphs = jax.default_backend() == "gpu"
    plain = profiling.compile_generate(abstract, **shape, advance_options=NO_GRAPHS) if has_graphs else program
    leaves = profiling.parameters_of(testing.large_random_model(config, dtype=flags.dtype))
    step_us = 1e3 * profiling.measure(program, leaves).per_token_ms
    with tempfile.TemporaryDirectory(prefix="profile-") as folder:
        # Prefill and one token are in both profiles: the difference is the steps alone.
        runs = [
            profiling.kernel_times(profiled(plain, leaves, tokens, f"{folder}/{tokens}")) for tokens in (1, 1 + STEPS)
        ]
    kernels = profiling.per_step(*runs, steps=STEPS)
    operators, rows = by_operator(kernels, profiling.instructions(plain.advance.as_text()))
    operators["gaps"] = step_us - sum(operators.values())
    record = {
        "model": path.stem,
        "batch": flags.batch,
        "prompt": flags.prompt,
        "dtype": flags.dtype,
        "step_us": round(step_us, 2),
        "launches": round(sum(kernel.calls for kernel in kernels), 1),
        "operators_us": {name: round(time_us, 2) for name, time_us in operators.items()},
        "kernels": rows,
    }
    timing.append_record(output, record)
    print(table(record))
    for row in rows[:40]:
        print(*row)
    if flags.trace:
        print(f"trace: {profiled(program, leaves, 1 + STEPS, flags.trace).parent}")
    return 0


def table(record: dict[str, Any]) -> str:
    lines = [f"{record['model']}, batch {record['batch']}: {record['step_us']:.1f} us, {record['launches']} launches"]
    for name, time_us in record["operators_us"].items():
        lines.append(f"{name:26} {time_us:9.1f} us {time_us / record['step_us']:7.1%}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
