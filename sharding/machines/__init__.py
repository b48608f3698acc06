"""Machines as numbers: one JSON file each, every constant with its source. Predictions read constants nowhere else."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Machine:
    """One kind of device and the network between them. Rates are per device and, on links, per direction.

    `*_fraction`: how much of a rate the best software reaches at large sizes. `*_us`: what an operation costs before its
    first byte or FLOP: launches, synchronisation. `expert_*` is the MoE layer's two multiplications, `dense_*` all other
    matrices, `cache_*` attention over the cache, `prefill_*` attention among the tokens of a prompt.
    `within_*` are links inside a node, `between_*` those that leave it.
    """

    name: str
    device: str
    memory_bytes: float
    memory_fraction: float
    hbm_bytes_per_s: float
    flops_per_s: float
    expert_hbm_fraction: float
    expert_flops_fraction: float
    expert_us: float
    dense_hbm_fraction: float
    dense_flops_fraction: float
    dense_us: float
    cache_hbm_fraction: float
    prefill_flops_fraction: float
    attention_us: float
    devices_per_node: int
    within_bytes_per_s: float
    within_fraction: float
    within_us: float
    between_bytes_per_s: float
    between_fraction: float
    between_us: float
    peer_us: float
    sources: dict[str, str] = dataclasses.field(default_factory=dict, compare=False, repr=False)
    xla_target: dict[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def is_measured(self, constant: str) -> bool:
        return self.sources[constant].startswith("measured")


CONSTANTS = tuple(
    field.name for field in dataclasses.fields(Machine) if field.name not in ("name", "device", "sources", "xla_target")
)


def names() -> list[str]:
    """The machines there are files for."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def path_of(name_or_path: str | Path) -> Path:
    """Where a machine's constants are: in this folder by its name, or in a file of one's own."""
    return Path(name_or_path) if str(name_or_path).endswith(".json") else FOLDER / f"{name_or_path}.json"


def load(name_or_path: str | Path) -> Machine:
    """A machine of this folder by its name, or of any file by its path.

    Raises:
      ValueError: there is no such machine, or its file lacks a constant, has an unknown one, or gives no source.
    """
    path = path_of(name_or_path)
    if not path.exists():
        raise ValueError(f"expected a machine among {', '.join(names())}, or a path to a .json, got {name_or_path}")
    read = json.loads(path.read_text())
    constants = read["constants"]
    for problem, found in (
        ("lacks", sorted(set(CONSTANTS) - set(constants))),
        ("has unknown", sorted(set(constants) - set(CONSTANTS))),
        ("gives no source of", sorted(name for name, entry in constants.items() if not entry.get("source"))),
    ):
        if found:
            raise ValueError(f"{path.name} {problem} constants: {', '.join(found)}")
    values = {name: entry["value"] for name, entry in constants.items()}
    sources = {name: entry["source"] for name, entry in constants.items()}
    return Machine(read["name"], read["device"], **values, sources=sources, xla_target=read.get("xla_target", {}))


def save(machine: Machine, path: Path) -> None:
    """Writes a machine's file; `load` reads it back."""
    constants = {name: {"value": getattr(machine, name), "source": machine.sources[name]} for name in CONSTANTS}
    content = {"name": machine.name, "device": machine.device, "constants": constants, "xla_target": machine.xla_target}
    path.write_text(json.dumps(content, indent=2) + "\n")


def with_constants(machine: Machine, source: str, **values: float) -> Machine:
    """The machine with these constants replaced and their source noted."""
    changes: dict[str, Any] = dict(values)
    return dataclasses.replace(machine, sources=machine.sources | dict.fromkeys(values, source), **changes)


def xla_target(machine: Machine) -> str:
    """What XLA's compiler wants to know of a GPU it cannot see, as a text protocol buffer.

    Raises:
      ValueError: the machine is no GPU that XLA compiles for.
    """
    gpu = machine.xla_target
    if not gpu:
        raise ValueError(f"{machine.name}: expected an xla_target in its file, got none; h100, h200 and b200 have one")
    major, minor = gpu["compute_capability"]
    capability = f"major: {major} " + (f"minor: {minor} " if minor else "") + "feature_extension: ACCELERATED_FEATURES"
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: {gpu["cores"]} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {gpu["memory_bytes_per_s"]} l2_cache_size: {gpu["l2_bytes"]} clock_rate_ghz: {gpu["clock_ghz"]}
  device_memory_size: {gpu["memory_bytes"]} shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ {capability} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation" device_address_bits: 64 ecc_enabled: true name: "{machine.device}"
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.28.1" cub_version: "3.1.2"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 28 patch: 1 }}
device_description_str: "{machine.device}"
"""
