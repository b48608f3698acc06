"""How latency grows with the number of experts: TinyMistral with 1 to 6 of them, two active where there are two.

    python scripts/experts_sweep.py

The project that this one continues ran experts one after another: 13.5 ms per token with one, 28.6 with six, a straight
line. Appends a JSON line for each number to --output; scripts/plot_generate.py draws both lines.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from benchmark_generate import CONFIGS, STUDENT_MODEL, STUDENT_PROMPT, Point, config_at, measured, prepare
from flags import count, seconds, two_or_more

TOLD_FIRST = (2, 6, 1)


def with_experts(config: dict[str, Any], number: int) -> dict[str, Any]:
    """The config with so many experts, and at most as many active."""
    return config | {"num_local_experts": number, "num_experts_per_tok": min(config["num_experts_per_tok"], number)}


def main() -> int:
    from pallas_kernels import timing

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=pathlib.Path, default=CONFIGS / f"{STUDENT_MODEL}.json")
    parser.add_argument("--experts", nargs="+", type=count, default=[1, 2, 3, 4, 5, 6])
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--prompt", type=count, default=STUDENT_PROMPT)
    parser.add_argument("--new-tokens", type=two_or_more, default=128)
    parser.add_argument("--seconds", type=seconds, default=300.0, help="end after this long, whatever is left")
    parser.add_argument("--processes", type=count, default=6, help="that compile at once")
    parser.add_argument("--output", type=pathlib.Path, help="docs/benchmarks/<device>/experts_sweep.jsonl by default")
    flags = parser.parse_args()
    prepare()
    flags.output = flags.output or timing.results_path("experts_sweep.jsonl")
    config = config_at(flags.config)
    if config["model_type"] != "mixtral":
        raise SystemExit(
            f"expected --config to be a mixtral, got {config['model_type']}: others name experts otherwise"
        )
    counts = sorted(set(flags.experts), key=lambda number: (number not in TOLD_FIRST, number))
    configs = {f"{flags.config.stem}, experts: {number}": with_experts(config, number) for number in counts}
    points = [Point("decode", name, 1, flags.prompt, flags.new_tokens) for name in configs]
    return measured(points, configs, flags)


if __name__ == "__main__":
    sys.exit(main())
