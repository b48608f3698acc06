"""Times decoding of the bundled model at batch 1, as `moe-jax generate` runs it and in one program.

    python scripts/benchmark_bundled.py

`generate_tokens_per_s` is one compiled loop; `stream_tokens_per_s` has every token on the host, with its routed experts, as
the command line shows them. Medians (and the fastest) of --repeats runs after one that compiles, prefill of the short
prompt included. `load_average` tells whether the machine was busy with something else: processor time, summed over
threads, suffers less from that. Appends a JSON line to --output.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import tyro

sys.path.insert(0, str(Path(__file__).parent))

from flags import require_writable

import moe_jax

PROMPT = "ROMEO:"


@dataclasses.dataclass(frozen=True)
class Options:
    """What to time."""

    tokens: int = 256
    repeats: int = 5
    dtype: str = "bfloat16"
    output: Path = Path("docs/benchmarks/cpu/bundled.jsonl")


def rates(name: str, run: Callable[[], object], options: Options) -> dict[str, float]:
    """Tokens per second, and processor milliseconds a token of all threads, of `run`, which makes `options.tokens`."""
    run()
    wall_s, processor_s = [], []
    for _ in range(options.repeats):
        begin_wall_s, begin_processor_s = time.perf_counter(), time.process_time()
        run()
        wall_s.append(time.perf_counter() - begin_wall_s)
        processor_s.append(time.process_time() - begin_processor_s)
    return {
        f"{name}_tokens_per_s": round(options.tokens / statistics.median(wall_s), 1),
        f"{name}_fastest_tokens_per_s": round(options.tokens / min(wall_s), 1),
        f"{name}_processor_ms_per_token": round(1e3 * statistics.median(processor_s) / options.tokens, 2),
    }


def processor() -> str:
    """What the computations ran on: the GPU's name, or the CPU's with the cores that this process may use."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {len(os.sched_getaffinity(0))} cores"


def main(options: Options) -> None:
    if options.repeats < 1:
        raise SystemExit(f"expected --repeats of at least 1, got {options.repeats}")
    require_writable(options.output)
    model = moe_jax.load("shakespeare", dtype=options.dtype)
    arguments = dict(
        max_new_tokens=options.tokens,
        stop_token_ids=(),
        sampling=moe_jax.Sampling(temperature=0.8, min_p=0.05),
    )
    line = {
        **rates("generate", lambda: moe_jax.generate(model, PROMPT, **arguments), options),
        **rates("stream", lambda: list(moe_jax.stream(model, PROMPT, routed_experts=True, **arguments)), options),
        "tokens": options.tokens,
        "batch": 1,
        "prompt": PROMPT,
        "dtype": options.dtype,
        "parameters": model.num_parameters,
        "device": processor(),
        "load_average": round(os.getloadavg()[0], 2),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
        "date": datetime.date.today().isoformat(),
    }
    with options.output.open("a") as lines:
        lines.write(json.dumps(line) + "\n")
    print(json.dumps(line, indent=2))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
