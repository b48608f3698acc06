"""What a program moves and computes on one device, counted without the hardware it is meant for.

Three ways to count the same thing, and a fourth, by formula, in `sharding.formulas`; tests hold them against each other:

- `from_jaxpr` walks the traced program: collectives that are written out (`shard_map`), over an `AbstractMesh` of any
  size, in milliseconds.
- `from_compiled` reads the optimised HLO: also collectives that XLA's partitioner put in, and temporary memory. On CPU it
  needs as many (forced) devices; bfloat16 collectives become float32 there, see `width`.
- `gpu_mesh` gives GPUs that are not there, any number of them, to compile for: then `from_compiled` reads the real module.

XLA's own cost analysis counts a loop's body once and knows no collectives; that is why this reads text.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from sharding import machines
from sharding.axes import MESH_AXES

ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER = "all-reduce", "all-gather", "reduce-scatter"
ALL_TO_ALL, RAGGED_ALL_TO_ALL, PERMUTE = "all-to-all", "ragged-all-to-all", "collective-permute"


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation: groups of `devices`, of which at most `local` share a node.

    in_bytes, out_bytes: a device's operand and result. times: how often it runs.

    Bytes are what one device sends, by algorithms that send as little as possible: rings or trees that finish inside a
    node before they leave it, pairwise exchange for all-to-all. Example: an all-gather whose result has 64 MiB, over 16
    devices on 2 nodes, sends 60 MiB, of which 4 MiB leave the node (the device's own shard, once to the other node).
    """

    kind: str
    devices: int
    local: int
    in_bytes: float
    out_bytes: float
    times: int = 1

    @property
    def wire_bytes(self) -> float:
        return self.within_bytes + self.between_bytes

    @property
    def within_bytes(self) -> float:
        """Over links inside a node."""
        if self.kind in (ALL_TO_ALL, RAGGED_ALL_TO_ALL):
            return self.times * self._exchanged * (self.local - 1) / self.devices
        if self.kind == PERMUTE:
            return self.times * self.in_bytes * (self.local > 1)
        return self.times * self._gathered * (self.devices - self.nodes) / self.devices

    @property
    def between_bytes(self) -> float:
        """Over links that leave the node."""
        if self.kind in (ALL_TO_ALL, RAGGED_ALL_TO_ALL):
            return self.times * self._exchanged * (self.devices - self.local) / self.devices
        if self.kind == PERMUTE:
            return self.times * self.in_bytes * (self.local == 1)
        return self.times * self._gathered * (self.nodes - 1) / self.devices

    @property
    def nodes(self) -> int:
        return -(-self.devices // self.local)

    @property
    def _exchanged(self) -> float:
        # A ragged exchange has a buffer on one side that holds the worst case; what travels fits into both.
        return min(self.in_bytes, self.out_bytes) if self.kind == RAGGED_ALL_TO_ALL else self.in_bytes

    @property
    def _gathered(self) -> float:
        """An all-reduce is a reduce-scatter and an all-gather, each of the whole operand."""
        return {ALL_REDUCE: 2 * self.in_bytes, ALL_GATHER: self.out_bytes, REDUCE_SCATTER: self.in_bytes}[self.kind]


@dataclasses.dataclass(frozen=True)
class Account:
    """One device's share of a program.

    flops: of multiplications of matrices (two for each multiply and add). hbm_bytes: their operands and results, each
    once. argument_bytes, temporary_bytes: memory as compiled, None where nothing was compiled.
    """

    collectives: tuple[Collective, ...]
    flops: float
    hbm_bytes: float
    argument_bytes: int | None = None
    temporary_bytes: int | None = None

    @property
    def wire_bytes(self) -> float:
        return sum(collective.wire_bytes for collective in self.collectives)

    @property
    def within_bytes(self) -> float:
        return sum(collective.within_bytes for collective in self.collectives)

    @property
    def between_bytes(self) -> float:
        return sum(collective.between_bytes for collective in self.collectives)

    def bytes_by_kind(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for collective in self.collectives:
            found[collective.kind] = found.get(collective.kind, 0) + collective.wire_bytes
        return found


def local_devices(groups: np.ndarray, devices_per_node: int) -> int:
    """How many devices of a group share a node at most, in the group that is spread widest; devices are numbered node after
    node. Example: on nodes of 8, of the groups 0 to 5 and 6 to 11 the second has 4 on one node."""
    nodes = np.sort(np.asarray(groups) // devices_per_node, axis=-1)
    place = np.broadcast_to(np.arange(nodes.shape[-1]), nodes.shape)
    is_first = np.diff(nodes, axis=-1, prepend=-1) != 0
    first = np.maximum.accumulate(np.where(is_first, place, 0), axis=-1)  # place of the first device of the same node
    return int((place - first).max(axis=-1).min()) + 1


def mesh_groups(sizes: dict[str, int], axes: tuple[str, ...]) -> np.ndarray:
    """`[groups, devices]`: which devices of a mesh take part in a collective over these axes, numbered row by row."""
    names = list(sizes)
    kept, reduced = [names.index(n) for n in names if n not in axes], [names.index(axis) for axis in axes]
    numbers = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
    return numbers.transpose(kept + reduced).reshape(-1, math.prod(sizes[axis] for axis in axes))


# ---------------------------------------------------------------- traced programs

_PRIMITIVES = {
    "psum": ALL_REDUCE,
    "psum_invariant": ALL_REDUCE,
    "pmax": ALL_REDUCE,
    "pmin": ALL_REDUCE,
    "all_gather": ALL_GATHER,
    "all_gather_invariant": ALL_GATHER,
    "reduce_scatter": REDUCE_SCATTER,
    "all_to_all": ALL_TO_ALL,
    "ragged_all_to_all": RAGGED_ALL_TO_ALL,
    "ppermute": PERMUTE,
}
_KERNELS = ("pallas_call", "core_map", "mosaic_gpu")


def from_jaxpr(
    function: Callable[..., Any], *shapes: Any, devices_per_node: int = 8, platform: str = "cuda"
) -> Account:
    """Counts in the trace of `function(*shapes)`: what stands inside `shard_map`, as each device runs it.

    Of `lax.platform_dependent` the branch of `platform` counts, of other conditions the last; a `while` counts once (its
    length is unknown), a `scan` as often as it runs. Kernels (Pallas) are not looked into.
    """
    collectives: list[Collective] = []
    totals = {"flops": 0.0, "hbm_bytes": 0.0}
    for equation, sizes, times in _equations(jax.make_jaxpr(function)(*shapes).jaxpr, {}, 1, platform):
        name = equation.primitive.name
        if name in _PRIMITIVES:
            collectives.append(_traced_collective(equation, _PRIMITIVES[name], sizes, times, devices_per_node))
        elif name in ("dot_general", "ragged_dot", "ragged_dot_general"):
            totals["flops"] += times * _traced_flops(equation)
            arrays = [*equation.invars[:2], *equation.outvars]
            totals["hbm_bytes"] += times * sum(_traced_bytes(variable) for variable in arrays)
    real = tuple(collective for collective in collectives if collective.devices > 1)
    return Account(real, totals["flops"], totals["hbm_bytes"])


def _equations(jaxpr: Any, sizes: dict[str, int], times: int, platform: str) -> Iterator[tuple[Any, dict, int]]:
    """Every equation, with the mesh around it and how often it runs."""
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        yield equation, sizes, times
        if name in _KERNELS:
            continue
        if name == "shard_map":
            inner = sizes | dict(parameters["mesh"].shape)
            yield from _equations(_jaxpr(parameters["jaxpr"]), inner, times, platform)
        elif name == "scan":
            yield from _equations(_jaxpr(parameters["jaxpr"]), sizes, times * parameters["length"], platform)
        elif name == "while":
            yield from _equations(_jaxpr(parameters["body_jaxpr"]), sizes, times, platform)
        elif name == "cond":
            yield from _equations(_jaxpr(_branch(parameters, platform)), sizes, times, platform)
        else:
            for parameter in parameters.values():
                if hasattr(parameter, "eqns") or hasattr(parameter, "jaxpr"):
                    yield from _equations(_jaxpr(parameter), sizes, times, platform)


def _jaxpr(closed: Any) -> Any:
    return closed.jaxpr if hasattr(closed, "jaxpr") else closed


def _branch(parameters: dict[str, Any], platform: str) -> Any:
    branches, platforms = parameters["branches"], parameters.get("branches_platforms")
    if platforms is None:
        return branches[-1]
    chosen = (branch for branch, names in zip(branches, platforms, strict=True) if names is None or platform in names)
    return next(chosen)


def _traced_collective(equation, kind: str, sizes: dict[str, int], times: int, devices_per_node: int) -> Collective:
    axes = equation.params.get("axes", equation.params.get("axis_name"))
    groups = mesh_groups(sizes, (axes,) if isinstance(axes, str) else tuple(axes))
    operands = equation.invars[:1] if kind == RAGGED_ALL_TO_ALL else equation.invars
    return Collective(
        kind=kind,
        devices=groups.shape[1],
        local=local_devices(groups, devices_per_node),
        in_bytes=sum(_traced_bytes(variable) for variable in operands),
        out_bytes=sum(_traced_bytes(variable) for variable in equation.outvars),
        times=times,
    )


def _traced_bytes(variable: Any) -> int:
    return math.prod(variable.aval.shape) * variable.aval.dtype.itemsize


def _traced_flops(equation: Any) -> float:
    left, result = equation.invars[0].aval.shape, math.prod(equation.outvars[0].aval.shape)
    if equation.primitive.name != "dot_general":
        return 2.0 * result * left[-1]
    (contracted, _), _ = equation.params["dimension_numbers"]
    return 2.0 * result * math.prod(left[axis] for axis in contracted)


# ---------------------------------------------------------------- compiled programs

_ITEM_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "s64": 8, "u64": 8,
    "f4e2m1fn": 0.5, "f8e4m3": 1, "f8e4m3fn": 1, "f8e5m2": 1, "f8e8m0fnu": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8,
}  # fmt: skip
_SHAPE = re.compile(r"\b(" + "|".join(sorted(_ITEM_BYTES, key=len, reverse=True)) + r")\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\(")
_CALLED = re.compile(r"(?:calls|true_computation|false_computation|to_apply|called_computations)=\{?%?([\w.\-]+)")
_KINDS = (RAGGED_ALL_TO_ALL, ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, ALL_TO_ALL, PERMUTE)


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    line: str

    @property
    def kind(self) -> str | None:
        """Of a collective that is done at once, or begins here."""
        opcode = self.opcode.removesuffix("-start")
        return opcode if opcode in _KINDS else None

    @property
    def operands(self) -> list[str]:
        """Names of the operands, which stand between the opcode's parentheses."""
        depth, text = 1, self.line.split(self.opcode + "(", 1)[1]
        for end, letter in enumerate(text):
            depth += (letter == "(") - (letter == ")")
            if depth == 0:
                return re.findall(r"%([\w.\-]+)", text[:end])
        raise ValueError(f"expected balanced parentheses in HLO, got {self.line}")


def from_compiled(compiled: Any, *, devices: int, devices_per_node: int = 8, width: int | None = None) -> Account:
    """Counts in what `jax.jit(...).lower(...).compile()` returned; arguments are those of `from_hlo`."""
    memory = compiled.memory_analysis()
    account = from_hlo(compiled.as_text(), devices=devices, devices_per_node=devices_per_node, width=width)
    return dataclasses.replace(
        account, argument_bytes=memory.argument_size_in_bytes, temporary_bytes=memory.temp_size_in_bytes
    )


def from_hlo(text: str, *, devices: int, devices_per_node: int = 8, width: int | None = None) -> Account:
    """Counts in optimised HLO, loops as often as XLA knows they run.

    width: set for a bfloat16 program compiled for CPU, where XLA sends bfloat16 as float32. Then float32 collectives of
      rows of this many values count half.

    Raises:
      ValueError: a collective's groups are written in a way that is not known here.
    """
    computations, entry = _parsed(text)
    collectives: list[Collective] = []
    totals = {"flops": 0.0, "hbm_bytes": 0.0}
    for instruction, shapes, times in _instructions(computations, entry, 1):
        if instruction.kind:
            groups = _groups(instruction.line, devices)
            collective = _compiled_collective(instruction, shapes, groups, times, devices_per_node, width)
            collectives.append(collective)
        elif instruction.opcode == "dot":
            arrays = [*(shapes[name] for name in instruction.operands), instruction.shape]
            totals["flops"] += times * _compiled_flops(instruction, shapes)
            totals["hbm_bytes"] += times * sum(_bytes(shape) for shape in arrays)
    real = tuple(collective for collective in collectives if collective.devices > 1)
    return Account(real, totals["flops"], totals["hbm_bytes"])


def _parsed(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    computations: dict[str, list[_Instruction]] = {}
    entry = current = ""
    for line in text.splitlines():
        header, instruction = _COMPUTATION.match(line), _INSTRUCTION.match(line)
        if header:
            current = header[2]
            computations[current] = []
            entry = current if header[1] else entry
        elif instruction and current:
            computations[current].append(_Instruction(instruction[1], instruction[2], instruction[3], line))
    if not entry:
        raise ValueError("expected optimised HLO with an ENTRY computation, got none")
    return computations, entry


def _instructions(
    computations: dict[str, list[_Instruction]], name: str, times: int
) -> Iterator[tuple[_Instruction, dict[str, str], int]]:
    """Every instruction that runs, with the shapes by name around it and how often it runs."""
    shapes = {instruction.name: instruction.shape for instruction in computations[name]}
    for instruction in computations[name]:
        yield instruction, shapes, times
        if instruction.opcode == "while":
            known = re.search(r"known_trip_count[^0-9]*(\d+)", instruction.line)
            body = re.search(r"body=%?([\w.\-]+)", instruction.line)
            assert body is not None
            yield from _instructions(computations, body[1], times * (int(known[1]) if known else 1))
            continue
        if instruction.kind:  # its computation adds two numbers
            continue
        branches = re.search(r"branch_computations=\{(.*?)\}", instruction.line)
        called = _CALLED.findall(instruction.line)
        for computation in called + (re.findall(r"%([\w.\-]+)", branches[1]) if branches else []):
            if computation in computations:
                yield from _instructions(computations, computation, times)


def _compiled_collective(
    instruction: _Instruction,
    shapes: dict[str, str],
    groups: np.ndarray,
    times: int,
    devices_per_node: int,
    width: int | None,
) -> Collective:
    kind, operands = instruction.kind, instruction.operands
    assert kind is not None
    size = groups.shape[1]
    in_bytes = sum(_bytes(shapes[name], width) for name in (operands[:1] if kind == RAGGED_ALL_TO_ALL else operands))
    if kind == RAGGED_ALL_TO_ALL:
        out_bytes = _bytes(shapes[operands[1]], width)
    else:  # of the result, which an asynchronous start writes beside its operands
        out_bytes = in_bytes * {ALL_GATHER: size, REDUCE_SCATTER: 1 / size}.get(kind, 1)
    return Collective(kind, size, local_devices(groups, devices_per_node), in_bytes, out_bytes, times)


def _bytes(shape: str, width: int | None = None) -> float:
    total = 0.0
    for dtype, dimensions in _SHAPE.findall(shape):
        sizes = [int(size) for size in dimensions.split(",") if size]
        is_widened = width is not None and dtype == "f32" and bool(sizes) and sizes[-1] == width
        total += _ITEM_BYTES[dtype] * math.prod(sizes) * (0.5 if is_widened else 1)
    return total


def _compiled_flops(instruction: _Instruction, shapes: dict[str, str]) -> float:
    (_, left), (_, result) = _SHAPE.findall(shapes[instruction.operands[0]])[0], _SHAPE.findall(instruction.shape)[0]
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.line)
    sizes = [int(size) for size in left.split(",") if size]
    inner = math.prod(sizes[int(axis)] for axis in contracted[1].split(",") if axis) if contracted else 1
    return 2.0 * inner * math.prod(int(size) for size in result.split(",") if size)


def _groups(line: str, devices: int) -> np.ndarray:
    """`[groups, devices]` of a collective, from any of the ways in which HLO writes them."""
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", line):
        return _numbers(pairs[1])
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", line):
        return _numbers(listed[1])
    if counted := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape, source, order = ([int(n) for n in (part or "").split(",") if n] for part in counted.groups())
        numbers = np.arange(math.prod(source)).reshape(source)
        return (numbers.transpose(order) if order else numbers).reshape(shape)
    if named := re.search(r"replica_groups=mesh\[(.*?)\]\s*\{(.*?)\}", line):
        sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        axes = tuple(re.findall(r"'([^']+)'", named[2]))
        if set(axes) <= set(sizes):
            return mesh_groups(sizes, axes)
    if re.search(r"replica_groups=\{\}", line):
        return np.arange(devices)[None]
    raise ValueError(f"expected a collective with replica groups of a known form, got {line.strip()[:200]}")


def _numbers(text: str) -> np.ndarray:
    return np.array([[int(number) for number in group.split(",")] for group in text.strip("{}").split("},{")])


# ---------------------------------------------------------------- GPUs that are not there


def gpu_mesh(machine: machines.Machine, sizes: dict[str, int]) -> Mesh:
    """A mesh of GPUs that XLA compiles for without seeing one. Example: `{"ep": 8, "tp": 8}` is 64 of them.

    Raises:
      ModuleNotFoundError: the CUDA compiler wheels are not installed.
    """
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    devices = np.array(_gpus(machine.name, machines.xla_target(machine), math.prod(shape)))
    return Mesh(devices.reshape(shape), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


@functools.cache
def _gpus(name: str, target: str, count: int) -> list[Any]:
    try:
        is_installed = importlib.util.find_spec("jax_plugins.xla_cuda13") is not None
    except ModuleNotFoundError:
        is_installed = False
    if not is_installed:
        raise ModuleNotFoundError(
            f"compiling for {name} needs the package jax-cuda13-plugin and its compiler wheels, which are not installed: "
            "pip install 'moe-jax[aot]'"
        )
    topology = topologies.get_topology_desc(platform="cuda", topology=f"1x1x{count}", target_config=target)
    return list(topology.devices)
