"""Fills parameters from safetensors files, each straight to its (sharded) place."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import progress
from moe_jax.checkpoints.errors import CheckpointError
from moe_jax.checkpoints.rules import Copy, Ignored, Part, Rule, copies, spellings
from moe_jax.checkpoints.safetensors import Contents, Tensor, read_contents

PIECE_BYTES = 32 * 2**20  # read, cast and let go at a time
MAX_READERS = 8  # threads
ALIGNMENT = 64  # bytes: such buffers become arrays on a CPU without another copy


def load_parameters(
    directory: str | Path,
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    rules: Sequence[Rule | Ignored | Copy],
    *,
    check_finite: bool = False,
) -> dict[str, jax.Array]:
    """Loads the parameters whose paths, shapes, dtypes and (optional) shardings `abstract` gives.

    Names and shapes of all files are matched before any data is read. Then one parameter after the other is read
    through memory maps, cast, and put where its sharding says, reading only what the devices of this process hold.
    Host memory above the model's own stays below two of its largest parameters. Shows a progress bar on a terminal
    after two seconds.

    Args:
      check_finite: also look for NaN and infinite values, as loaded (a float16 overflows above 65504).

    Raises:
      CheckpointError: the files do not hold exactly these parameters: tensors missing, extra, twice there, of another
        shape or kind of dtype, files missing or truncated (everything in one error); tied tensors differ; values are
        not finite.
    """
    directory = Path(directory)
    contents = read_contents(directory)
    plan = _matched(directory, contents, abstract, rules)
    _check_tied(directory, plan)
    not_finite: set[str] = set()
    parameters = {}
    total_bytes = sum(tensor.nbytes for sources in plan.sources.values() for _, tensor in sources)
    workers = min(MAX_READERS, os.cpu_count() or 1)
    with progress.bar(f"Loading {directory.name}", total_bytes) as advance, ThreadPoolExecutor(workers) as pool:
        for path, leaf in abstract.items():
            reader = _Reader(leaf, plan.sources[path], pool, advance, not_finite if check_finite else None)
            # A transfer under way keeps its host buffer alive, a finished one until JAX's hook into the collector runs.
            parameters[path] = jax.block_until_ready(reader.placed())
            gc.collect(0)
    if not_finite:
        raise CheckpointError(f"{directory} holds values that are not finite", {"NaN or infinite": sorted(not_finite)})
    return parameters


Sources = list[tuple[Part, Tensor]]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The tensors that fill each parameter, and pairs of tensors that must be equal."""

    sources: dict[str, Sources]
    tied: list[tuple[Tensor, Tensor]]


def _matched(
    directory: Path,
    contents: Contents,
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    rules: Sequence[Rule | Ignored | Copy],
) -> _Plan:
    """Every tensor must have its use and every parameter its tensors; looks at names, shapes and dtypes only."""
    tensors = contents.tensors
    kinds = ("missing", "extra", "twice", "wrong shape", "wrong dtype")
    problems: dict[str, list[str]] = {kind: [] for kind in kinds}
    sources: dict[str, Sources] = {}
    tied: list[tuple[Tensor, Tensor]] = []
    owners: dict[str, str] = {}
    for path, leaf in abstract.items():
        options = spellings(path, leaf.shape, rules)
        duplicates = [Part(name, (), options[0][0].rule) for name in copies(path, rules)]
        _claim(path, (*itertools.chain(*options), *duplicates), owners)
        chosen, others = _chosen(path, options, duplicates, contents, problems)
        for part in (*chosen, *others):
            _check_part(part, leaf, contents, problems)
        sources[path] = [(part, tensors[part.name]) for part in chosen if part.name in tensors]
        tied += [(tensors[part.name], original) for part in others for _, original in sources[path]]
    ignored = [rule for rule in rules if isinstance(rule, Ignored)]
    for name in sorted(tensors.keys() - owners.keys()):
        if not any(rule.matches(name) for rule in ignored):
            problems["extra"].append(f"{name} {list(tensors[name].shape)}")
    found = {"file": contents.problems, **problems}
    if any(found.values()):
        raise CheckpointError(f"{directory} does not hold exactly this model's tensors", found)
    return _Plan(sources, tied)


def _claim(path: str, parts: Iterable[Part], owners: dict[str, str]) -> None:
    for part in parts:
        if owners.setdefault(part.name, path) != path:
            raise ValueError(f"the rules let {part.name} fill both {owners[part.name]} and {path}")


def _chosen(
    path: str, options: list[list[Part]], duplicates: list[Part], contents: Contents, problems: dict[str, list[str]]
) -> tuple[list[Part], list[Part]]:
    """The spelling that the files have (or a tied copy, or the hub's if they have none), and the other copies."""

    def is_present(part: Part) -> bool:
        return part.name in contents.tensors or part.name in contents.lost

    present = [option for option in options if any(map(is_present, option))]
    others = [part for part in duplicates if part.name in contents.tensors]
    if len(present) > 1:
        problems["twice"].append(f"{path}, by {present[0][0].name} and by {present[1][0].name}")
    if present:
        return present[0], others
    return ([others[0]], others[1:]) if others else (options[0], [])


def _check_part(part: Part, leaf: jax.ShapeDtypeStruct, contents: Contents, problems: Mapping[str, list[str]]) -> None:
    expected = part.rule.tensor_shape(leaf.shape)
    tensor = contents.tensors.get(part.name)
    if tensor is None:
        if contents.has_all_names and part.name not in contents.lost:
            problems["missing"].append(f"{part.name} {list(expected)}")
        return
    if tensor.shape != expected:
        problems["wrong shape"].append(f"{part.name}, expected {list(expected)}, got {list(tensor.shape)}")
    if not _is_castable(tensor.dtype, leaf.dtype):
        problems["wrong dtype"].append(
            f"{part.name}, expected {leaf.dtype} or a floating dtype of 16 bits or more to cast, got {tensor.dtype}"
        )


def _is_castable(source: np.dtype, target: np.dtype) -> bool:
    """Between floats; not of 8 bits, which mean nothing without their scales."""
    return source == target or all(
        jnp.issubdtype(dtype, jnp.floating) and np.dtype(dtype).itemsize >= 2 for dtype in (source, target)
    )


def _check_tied(directory: Path, plan: _Plan) -> None:
    different = [f"{copy.name} from {original.name}" for copy, original in plan.tied if not _are_equal(copy, original)]
    if different:
        raise CheckpointError(
            f"{directory} holds tensors that the config ties to others but that differ from them; "
            "expected equal bits, or tie_word_embeddings=false in config.json",
            {"differs": different},
        )


def _are_equal(first: Tensor, second: Tensor) -> bool:
    if first.dtype != second.dtype:
        return False
    (first_values, release_first), (second_values, release_second) = first.mapped(), second.mapped()
    first_bytes, second_bytes = (values.reshape(-1).view(np.uint8) for values in (first_values, second_values))
    for begin in range(0, first.nbytes, PIECE_BYTES):
        piece = slice(begin, begin + PIECE_BYTES)
        if not np.array_equal(first_bytes[piece], second_bytes[piece]):
            return False
        release_first()
        release_second()
    return True


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Reads one parameter. Names of tensors with values that are not finite go to `not_finite`, unless it is None."""

    leaf: jax.ShapeDtypeStruct
    sources: Sources
    pool: ThreadPoolExecutor
    advance: Callable[[int], None]
    not_finite: set[str] | None

    def placed(self) -> jax.Array:
        if self.leaf.sharding is None:
            return jax.device_put(self._block(tuple((0, size) for size in self.leaf.shape)))
        blocks: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

        def block_at(index: Any) -> np.ndarray:
            """Devices that hold the same block share one reading of it."""
            box = tuple(each.indices(size)[:2] for each, size in zip(index, self.leaf.shape, strict=True))
            if box not in blocks:
                blocks[box] = self._block(box)
            return blocks[box]

        return jax.make_array_from_callback(self.leaf.shape, self.leaf.sharding, block_at, dtype=self.leaf.dtype)

    def _block(self, box: tuple[tuple[int, int], ...]) -> np.ndarray:
        """The parameter's values between (begin, end) in every dimension."""
        block = _aligned_empty(tuple(end - begin for begin, end in box), self.leaf.dtype)

        def fill(source: tuple[Part, Tensor]) -> None:
            part, tensor = source
            if not all(begin <= place < end for place, (begin, end) in zip(part.at, box, strict=False)):
                return
            values, release = tensor.mapped()
            inside: tuple[Any, ...] = tuple(slice(begin, end) for begin, end in box[len(part.at) :])
            place: tuple[Any, ...] = tuple(at - begin for at, (begin, _) in zip(part.at, box, strict=False))
            values = part.rule.to_ours(values, self.leaf.shape)[(*inside, ...)]
            self._copy(values, block[(*place, ...)], tensor.name, release)

        list(self.pool.map(fill, self.sources))
        return block

    def _copy(self, values: np.ndarray, out: np.ndarray, name: str, release: Callable[[], None]) -> None:
        """Copies and casts piece by piece, giving back the memory of what was read."""
        rows = values.shape[0] if values.ndim else 1
        rows_at_once = max(1, PIECE_BYTES * rows // max(1, values.nbytes))
        for begin in range(0, rows, rows_at_once):
            piece = slice(begin, begin + rows_at_once) if values.ndim else ...
            out[piece] = values[piece]
            if self.not_finite is not None and not np.isfinite(out[piece]).all():
                self.not_finite.add(name)
            release()
            self.advance(values[piece].nbytes)


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    buffer = np.empty(nbytes + ALIGNMENT, np.uint8)
    begin = -buffer.ctypes.data % ALIGNMENT
    return buffer[begin : begin + nbytes].view(dtype).reshape(shape)
