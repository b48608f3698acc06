"""Shows where a decode step or a prefill goes: microseconds and share of each operator, and a trace for Perfetto.

    python scripts/profile_step.py --model tinymistral-6x248m --batch 1
    python scripts/profile_step.py --model olmoe-1b-7b --phase prefill --prompt 4095

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
from typing import Any, NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from benchmark_generate import CONFIGS, compile_options, config_at, prepare
from flags import count, require_writable

STEPS = 32  # profiled
NO_GRAPHS = {"xla_gpu_graph_min_graph_size": 1_000_000}


class Profile(NamedTuple):
    """One phase: the program as it is and what it ran with, its microseconds, and its kernels where they are told apart.

    hlo: the text of the compiled module that the kernels are instructions of.
    """

    program: Any
    leaves: tuple[Any, ...]
    tokens: int
    step_us: float
    kernels: list[Any]
    hlo: str


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


def decode_profile(abstract: Any, config: dict[str, Any], flags: argparse.Namespace) -> Profile:
    from moe_jax import profiling, testing
    from pallas_kernels import timing

    shape = dict(batch=flags.batch, prompt=flags.prompt, new_tokens=4 * STEPS)
    program, plain = compiled(abstract, "advance_options", shape)
    with timing.gpu_to_oneself():
        leaves = profiling.parameters_of(testing.large_random_model(config, dtype=flags.dtype))
        step_us = 1e3 * profiling.measure(program, leaves).per_token_ms
        # Prefill and one token are in both profiles: the difference is the steps alone.
        kernels = profiling.per_step(*(kernels_of(plain, leaves, tokens) for tokens in (1, 1 + STEPS)), steps=STEPS)
    return Profile(program, leaves, 1 + STEPS, step_us, kernels, plain.advance.as_text())


def prefill_profile(abstract: Any, config: dict[str, Any], flags: argparse.Namespace) -> Profile:
    from moe_jax import profiling, testing
    from pallas_kernels import timing

    shape = dict(batch=flags.batch, prompt=flags.prompt, new_tokens=1)
    program, plain = compiled(abstract, "prefill_options", shape)
    with timing.gpu_to_oneself():
        leaves = profiling.parameters_of(testing.large_random_model(config, dtype=flags.dtype))
        step_us = 1e3 * profiling.measure_first_token(program, leaves)
        kernels = kernels_of(plain, leaves, 1)
    return Profile(program, leaves, 1, step_us, kernels, plain.prefill.as_text())


PHASES = {"decode": decode_profile, "prefill": prefill_profile}


def compiled(abstract: Any, which: str, shape: dict[str, int]) -> tuple[Any, Any]:
    """The program as it is, and one whose part that is profiled has no CUDA graphs."""
    import jax

    from moe_jax import profiling

    options = compile_options()
    program = profiling.compile_generate(abstract, **shape, **{which: options})
    if jax.default_backend() != "gpu":
        return program, program
    return program, profiling.compile_generate(abstract, **shape, **{which: options | NO_GRAPHS})


def kernels_of(program: Any, leaves: tuple[Any, ...], tokens: int) -> list[Any]:
    from moe_jax import profiling

    with tempfile.TemporaryDirectory(prefix="profile-") as folder:
        return profiling.kernel_times(profiled(program, leaves, tokens, folder))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tinymistral-6x248m", choices=[path.stem for path in CONFIGS.iterdir()])
    parser.add_argument("--config", type=pathlib.Path, help="a config.json to profile instead of --model")
    parser.add_argument("--phase", default="decode", choices=list(PHASES), help="a decode step, or reading the prompts")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--batch", type=count, default=1)
    parser.add_argument("--prompt", type=count, default=128)
    parser.add_argument("--trace", type=pathlib.Path, help="folder for the trace of the program as it is")
    parser.add_argument("--output", type=pathlib.Path, help="docs/benchmarks/<device>/profile.jsonl by default")
    flags = parser.parse_args()
    prepare()
    path = flags.config or CONFIGS / f"{flags.model}.json"
    config = config_at(path)

    from moe_jax import profiling, testing
    from pallas_kernels import timing

    output = flags.output or timing.results_path("profile.jsonl")
    require_writable(output)
    abstract = testing.abstract_model(config, dtype=flags.dtype)
    profile = PHASES[flags.phase](abstract, config, flags)
    operators, rows = by_operator(profile.kernels, profiling.instructions(profile.hlo))
    operators["gaps"] = profile.step_us - sum(operators.values())
    record = {
        "model": path.stem,
        "phase": flags.phase,
        "batch": flags.batch,
        "prompt": flags.prompt,
        "dtype": flags.dtype,
        "step_us": round(profile.step_us, 2),
        "launches": round(sum(kernel.calls for kernel in profile.kernels), 1),
        "operators_us": {name: round(time_us, 2) for name, time_us in operators.items()},
        "kernels": rows,
    }
    timing.append_record(output, record)
    print(table(record))
    for row in rows[:40]:
        print(*row)
    if flags.trace:
        print(f"trace: {profiled(profile.program, profile.leaves, profile.tokens, flags.trace).parent}")
    return 0


def table(record: dict[str, Any]) -> str:
    what = f"{record['model']}, {record['phase']}, {record['batch']} x {record['prompt']}"
    lines = [f"{what}: {record['step_us']:.1f} us, {record['launches']} launches"]
    for name, time_us in record["operators_us"].items():
        lines.append(f"{name:26} {time_us:9.1f} us {time_us / record['step_us']:7.1%}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
