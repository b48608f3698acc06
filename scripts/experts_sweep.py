"""How latency grows with the number of experts: TinyMistral with 1 to 6 of them, two active where there are two.

    python scripts/experts_sweep.py

The project that this one continues ran experts one after another: 13.5 ms per token with one, 28.6 with six, a straight
line. Appends a JSON line for each number to --output; scripts/plot_generate.py draws both lines.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import benchmark_generate
from benchmark_generate import CONFIGS, STUDENT_MODEL, STUDENT_PROMPT, Point

TOLD_FIRST = (2, 6, 1)


def with_experts(config: dict[str, Any], count: int) -> dict[str, Any]:
    """The config with so many experts, and at most as many active."""
    return config | {"num_local_experts": count, "num_experts_per_tok": min(config["num_experts_per_tok"], count)}


def main() -> int:
    from pallas_kernels import timing

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=pathlib.Path, default=CONFIGS / f"{STUDENT_MODEL}.json")
    parser.add_argument("--experts", nargs="+", type=int, default=[1, 2, 3, 4, 5, 6])
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--prompt", type=int, default=STUDENT_PROMPT)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=300.0, help="end after this long, whatever is left")
    parser.add_argument("--processes", type=int, default=6, help="that compile at once")
    parser.add_argument("--output", type=pathlib.Path, help="docs/benchmarks/<device>/experts_sweep.jsonl by default")
    flags = parser.parse_args()
    deadline_s = time.monotonic() + flags.seconds
    benchmark_generate.prepare()
    flags.output = flags.output or timing.results_path("experts_sweep.jsonl")
    config = json.loads(flags.config.read_text())
    counts = sorted(flags.experts, key=lambda count: (count not in TOLD_FIRST, count))
    configs = {f"{flags.config.stem}, experts: {count}": with_experts(config, count) for count in counts}
    points = [Point("decode", name, 1, flags.prompt, flags.new_tokens) for name in configs]
    records = benchmark_generate.run(points, configs, flags, deadline_s)
    return int(any("error" in record for record in records) or len(records) < len(points))


if __name__ == "__main__":
    sys.exit(main())
