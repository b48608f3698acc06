"""Compiles for an H200 on a machine without a GPU, down to machine code, and says what came out.

Needs the CUDA compiler wheels (`pip install 'moe-jax[aot]'`, no driver). `h200_target.txtpb` describes the GPU to XLA.
What it shows: whether a kernel compiles at all, registers and spills, shared memory, how many kernels a program
launches, and whether XLA copies something large. What it cannot show: speed, races, deadlocks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import math
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import dispatch

SHARED_MEMORY_BYTES = 227 * 1024  # what one block may have on Hopper
LARGE_COPY_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One Mosaic GPU kernel as ptxas made it."""

    name: str
    registers: int
    spill_bytes: int
    shared_memory_bytes: int


@dataclasses.dataclass(frozen=True)
class Program:
    """What a function became on the GPU.

    kernels: the distinct Mosaic kernels.
    launches: every launch of one call, in order; Mosaic kernels by their own name, XLA's fusions, library calls and
      copies by HLO's.
    large_copies: the copies and transposes among them that write a mebibyte or more: usually weights or caches, by
      mistake.
    temporary_bytes: device memory beside arguments and results.
    """

    kernels: tuple[Kernel, ...]
    launches: tuple[str, ...]
    large_copies: tuple[str, ...]
    temporary_bytes: int


def compile_for_h200(function: Callable[..., Any], *args: Any, donate: tuple[int, ...] = ()) -> Program:
    """Compiles `function(*args)`; the leaves of `args` need only a shape and a dtype. `donate`: positions of donated ones.

    Dispatch chooses as it would on the GPU.

    Raises:
      ModuleNotFoundError: the CUDA compiler wheels are not installed.
      ValueError: from Mosaic, a kernel needs more shared memory than a block may have.
    """
    mesh = _h200_mesh()
    device = mesh.devices.flat[0]
    replicated = NamedSharding(mesh, PartitionSpec())
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated), args)
    h200 = dispatch.Device("gpu", device.device_kind, device.core_count)
    with (
        tempfile.TemporaryDirectory(prefix="mosaic-") as folder,
        _mosaic_dumps_to(folder),
        dispatch.compiling_for(h200),
    ):
        compiled = jax.jit(lambda *leaves: function(*leaves), donate_argnums=donate).lower(*shapes).compile()
        kernels = _read_kernels(pathlib.Path(folder))
    hlo, memory = compiled.as_text(), compiled.memory_analysis()
    assert hlo is not None and memory is not None  # only backends that cannot print or plan return None
    launches = _launches(hlo)
    large = tuple(name for name, opcode, size in launches if size >= LARGE_COPY_BYTES and _is_copy(name, opcode))
    return Program(kernels, tuple(name for name, _, _ in launches), large, memory.temp_size_in_bytes)


def shapes_of(
    arguments: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What `arguments()` would return, with shapes in place of arrays and all else as it is; allocates nothing."""
    static: dict[str, Any] = {}

    def arrays():
        operands, named = arguments()
        arrays, rest = split_arrays(named)
        static.update(rest)
        return operands, arrays

    operands, named = jax.eval_shape(arrays)
    return operands, static | named


def split_arrays(named: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Named arguments in two: those that hold arrays (or their shapes), which `jax.jit` traces, and the others."""

    def holds_arrays(value: Any) -> bool:
        return any(isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(value))

    arrays = {name: value for name, value in named.items() if holds_arrays(value)}
    return arrays, {name: value for name, value in named.items() if name not in arrays}


@functools.cache
def _h200_mesh() -> Mesh:
    try:
        is_installed = importlib.util.find_spec("jax_plugins.xla_cuda13") is not None
    except ModuleNotFoundError:
        is_installed = False
    if not is_installed:
        raise ModuleNotFoundError(
            "compiling for the GPU needs the package jax-cuda13-plugin and its compiler wheels, which are not "
            "installed: pip install 'moe-jax[aot]'"
        )
    target = (pathlib.Path(__file__).parent / "h200_target.txtpb").read_text()
    topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=target)
    return topologies.make_mesh(topology, (1,), ("x",))


@contextlib.contextmanager
def _mosaic_dumps_to(folder: str) -> Iterator[None]:
    before = os.environ.get("MOSAIC_GPU_DUMP_TO")
    os.environ["MOSAIC_GPU_DUMP_TO"] = folder
    try:
        yield
    finally:
        if before is None:
            del os.environ["MOSAIC_GPU_DUMP_TO"]
        else:
            os.environ["MOSAIC_GPU_DUMP_TO"] = before


def _read_kernels(folder: pathlib.Path) -> tuple[Kernel, ...]:
    return tuple(_read_kernel(path) for path in sorted(folder.glob("*.ptxas")))


def _read_kernel(ptxas: pathlib.Path) -> Kernel:
    text = ptxas.read_text()
    registers = max(int(count) for count in re.findall(r"Used (\d+) registers", text))
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
    # Kernels with lane semantics skip layout inference: for them the log of all passes, which is large, has to do.
    dumps = [ptxas.with_name(ptxas.stem + suffix) for suffix in (".after_layout_inference.txt", ".mlir-passes.log")]
    lowered = next(dump for dump in dumps if dump.exists()).read_text()
    shared = re.search(r"dynamic_shared_memory_size %c(\d+)_i32", lowered)
    return Kernel(
        name=re.sub(r"_\d+$", "", ptxas.stem),
        registers=registers,
        spill_bytes=sum(int(stores) + int(loads) for stores, loads in spills),
        shared_memory_bytes=int(shared.group(1)) if shared else 0,
    )


# Instructions of scheduled HLO that start no work on the device.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "call", "while", "conditional", "partition-id",
    "replica-id", "after-all", "copy-done", "async-done", "opt-barrier",
}  # fmt: skip
_INSTRUCTION = re.compile(r"^  (?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([a-z][a-z0-9-]*)\(")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%(\S+) \(.*\{$")
_MOSAIC_NAME = re.compile(r'custom_call_target="mosaic_gpu.*op_name="[^"]*?([^/"]+)/\w+"')
_FUSED = re.compile(r"(?:kind=k\w+, calls|to_apply)=%([\w.-]+)")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s64": 8, "u64": 8, "f64": 8}


def _launches(hlo: str) -> list[tuple[str, str, int]]:
    """(name, opcode, bytes of the result) of each instruction that starts device work, outside fusions and reducers."""
    is_inlined = {name for line in hlo.splitlines() if (_opcode(line) != "call") for name in _FUSED.findall(line)}
    found, computation = [], ""
    for line in hlo.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            computation = header.group(1)
        instruction = _INSTRUCTION.match(line)
        if instruction and computation not in is_inlined and instruction.group(3) not in _FREE:
            name, shape, opcode = instruction.groups()
            mosaic = _MOSAIC_NAME.search(line)
            found.append((mosaic.group(1) if mosaic else name, opcode, _size_bytes(shape)))
    return found


def _opcode(line: str) -> str:
    instruction = _INSTRUCTION.match(line)
    return instruction.group(3) if instruction else ""


def _size_bytes(shape: str) -> int:
    sizes = (
        math.prod(int(dim) for dim in dims.split(",") if dim) * _BYTES.get(dtype, 4)
        for dtype, dims in re.findall(r"([a-z]\w*)\[([\d,]*)\]", shape)
    )
    return sum(sizes)


def _is_copy(name: str, opcode: str) -> bool:
    return (
        opcode in ("copy", "copy-start", "transpose")
        or re.search(r"wrapped_(copy|transpose)|^(copy|transpose)", name) is not None
    )
