"""How latency grows with the number of experts: TinyMistral with 1 to 6 of them, two active where there are two.

    python scripts/experts_sweep.py

The project that this one continues ran experts one after another: 13.5 ms per token with one, 28.6 with six, a straight
line. Appends a JSON line for each number to --output; scripts/plot_generate.py draws both lines.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import pathlib
import sys
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from benchmark_generate import CONFIGS, STUDENT_MODEL, STUDENT_PROMPT, prepare


def with_experts(config: dict[str, Any], count: int) -> dict[str, Any]:
    """The config with so many experts, and at most as many active."""
    return config | {"num_local_experts": count, "num_experts_per_tok": min(config["num_experts_per_tok"], count)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=pathlib.Path, default=CONFIGS / f"{STUDENT_MODEL}.json")
    parser.add_argument("--experts", nargs="+", type=int, default=[1, 2, 3, 4, 5, 6])
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--prompt", type=int, default=STUDENT_PROMPT)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=300.0, help="start no further measurement after this long")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("docs/benchmarks/h200/experts_sweep.jsonl"))
    flags = parser.parse_args()
    deadline_s = time.monotonic() + flags.seconds
    prepare()

    from moe_jax import profiling, testing
    from pallas_kernels import timing

    config = json.loads(flags.config.read_text())
    shape = dict(batch=1, prompt=flags.prompt, new_tokens=flags.new_tokens)
    # Two, one and six first: what the comparison needs.
    counts = sorted(flags.experts, key=lambda count: (count not in (2, 1, 6), count))
    done = 0
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        programs = {
            count: pool.submit(
                profiling.compile_generate,
                testing.abstract_model(with_experts(config, count), dtype=flags.dtype),
                **shape,
            )
            for count in counts
        }
        for count, program in programs.items():
            if time.monotonic() > deadline_s:
                print(f"{count} experts: left out, --seconds are over", flush=True)
                continue
            model = testing.large_random_model(with_experts(config, count), dtype=flags.dtype)
            times = profiling.measure(program.result(), profiling.parameters_of(model), repeats=5)
            record = {
                "model": flags.config.stem,
                "experts": count,
                "active": min(config["num_experts_per_tok"], count),
                "dtype": flags.dtype,
                **shape,
                "ms_per_token": round(times.per_token_ms, 4),
                "first_token_ms": round(times.first_token_ms, 3),
            }
            timing.append_record(flags.output, record)
            print(f"{count} experts: {times.per_token_ms:.3f} ms per token", flush=True)
            done += 1
    return int(done < len(counts))


if __name__ == "__main__":
    sys.exit(main())
