"""Run by test_placement.py: loads a checkpoint onto eight CPU devices in several ways, prints results and memory.

python loads_in_a_process.py DIRECTORY
"""

import gc
import json
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.checkpoints import Rule, load_parameters

E, F, D, LAYERS = 8, 128, 1024, 12
SHAPES = {"up_EGFD": (E, 2, F, D), "down_EDF": (E, D, F)}
FUSED = (
    Rule("{layer}.gate_up", "{layer}.up_EGFD", "e (g f) d -> e g f d"),
    Rule("{layer}.down", "{layer}.down_EDF", "e f d -> e d f"),
)
RULES = (
    Rule("{layer}.{expert}.gate", "{layer}.up_EGFD", at=("{expert}", 0)),
    Rule("{layer}.{expert}.up", "{layer}.up_EGFD", at=("{expert}", 1)),
    Rule("{layer}.{expert}.down", "{layer}.down_EDF", at=("{expert}",)),
    *FUSED,
)
CASES = (
    ("one device", "float32"),
    ("one device", "float16"),
    ("experts", "float16"),
    ("widths", "float32"),
    ("copies", "float16"),
)
SPLITS = {"one device": None, "experts": P("x"), "widths": P(None, None, "y", "x"), "copies": P()}


def memory_bytes(key: str) -> int:
    """`VmRSS`, memory held now, or `VmHWM`, the most since `forget_peak`."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def expected(path: str) -> np.ndarray:
    """Different in every layer, parameter, expert and row."""
    layer, name = path.split(".")
    shape = SHAPES[name]
    rows = np.arange(np.prod(shape[:-1]), dtype=np.float32).reshape(*shape[:-1], 1)
    return np.broadcast_to(rows + 0.5 * int(layer) + len(name), shape)


def abstract(split: P | None, dtype: str) -> dict[str, jax.ShapeDtypeStruct]:
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    leaves = {}
    for layer in range(LAYERS):
        for name, shape in SHAPES.items():
            sharding = None if split is None else NamedSharding(mesh, P(*split[: len(shape)]))
            leaves[f"{layer}.{name}"] = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    return leaves


def measure(directory: Path, split: str, dtype: str) -> dict[str, object]:
    leaves = abstract(SPLITS[split], dtype)
    gc.collect(0)
    before = memory_bytes("VmRSS")
    forget_peak()
    loaded = load_parameters(directory, leaves, RULES)
    peak = memory_bytes("VmHWM") - before
    return {
        "directory": directory.name,
        "split": split,
        "dtype": dtype,
        "is_right": all(
            np.array_equal(np.asarray(values), expected(path).astype(dtype)) for path, values in loaded.items()
        ),
        "is_placed": all(
            values.sharding == leaves[path].sharding or split == "one device" for path, values in loaded.items()
        ),
        "peak_bytes": peak,
        "model_bytes": sum(_buffers(loaded).values()),
        "largest_bytes": max(values.nbytes for values in loaded.values()),
    }


def _buffers(loaded: dict[str, jax.Array]) -> dict[int, int]:
    """Bytes by address: CPU devices that hold the same values may share them."""
    shards = [shard.data for values in loaded.values() for shard in values.addressable_shards]
    return {shard.unsafe_buffer_pointer(): shard.nbytes for shard in shards}


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    for spelling in ("one_by_one", "fused"):
        for split, dtype in CASES:
            print(json.dumps(measure(Path(sys.argv[1]) / spelling, split, dtype)), flush=True)
