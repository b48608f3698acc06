"""The safetensors format: a memory-mapped reader for every dtype, and a writer that streams.

A file is the length of a JSON header (8 bytes, little endian), the header with each tensor's dtype, shape and byte
range, and the bytes. Own code, because safetensors' numpy reader knows neither bfloat16 nor the 8-bit floats, and
cannot read part of a tensor.
"""

from __future__ import annotations

import dataclasses
import json
import math
import mmap
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from moe_jax.checkpoints.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "F32": np.dtype(np.float32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where one tensor lies: nothing of it is read before `mapped` and an index."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int  # bytes from the beginning of the file

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def mapped(self) -> tuple[np.ndarray, Callable[[], None]]:
        """The tensor as a read-only memory map, and a function that gives the memory of pages read so far back."""
        if self.nbytes == 0:
            return np.empty(self.shape, self.dtype), lambda: None
        before = self.offset % mmap.ALLOCATIONGRANULARITY
        with open(self.file, "rb") as file:
            pages = mmap.mmap(file.fileno(), self.nbytes + before, access=mmap.ACCESS_READ, offset=self.offset - before)
        values = np.frombuffer(pages, self.dtype, math.prod(self.shape), before).reshape(self.shape)
        return values, lambda: pages.madvise(mmap.MADV_DONTNEED)


@dataclasses.dataclass(frozen=True)
class Contents:
    """What the files of a checkpoint hold, from their headers alone.

    `problems` are sentences about files that are missing, truncated or no safetensors. `has_all_names` is False where
    such a file leaves open which tensors it held; `lost` are the names that are known to have been in one.
    """

    tensors: Mapping[str, Tensor]
    problems: Sequence[str] = ()
    lost: frozenset[str] = frozenset()
    has_all_names: bool = True


def read_contents(directory: Path) -> Contents:
    """Reads the headers of `model.safetensors`, or of the shards that `model.safetensors.index.json` lists.

    Raises:
      CheckpointError: the directory has neither. Everything that is wrong with the files themselves is in `problems`.
    """
    check_has_weights(directory)
    if (directory / INDEX).exists():
        return _read_shards(directory, _weight_map(directory / INDEX))
    try:
        tensors, problems = read_header(directory / SINGLE)
    except CheckpointError as error:
        return Contents({}, [str(error)], has_all_names=False)
    return Contents(tensors, problems)


def check_has_weights(directory: Path) -> None:
    """Raises `CheckpointError` if a directory has neither of the two files that `read_contents` begins with."""
    if (directory / INDEX).exists() or (directory / SINGLE).exists():
        return
    expected = f"expected {SINGLE} or {INDEX} in {directory}"
    names = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
    if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
        raise CheckpointError(
            f"{expected}, got PyTorch files only, which can run code and are not read. Convert them where torch is: "
            f'AutoModelForCausalLM.from_pretrained("{directory}").save_pretrained("converted")'
        )
    raise CheckpointError(f"{expected}, got {', '.join(names) if names else 'nothing'}")


def read_header(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of one file, and sentences about bytes that are missing or too many.

    Raises:
      CheckpointError: the header cannot be read.
    """
    if not path.is_file():
        raise CheckpointError(f"{path.name}: {'not a file' if path.exists() else 'missing file'}")
    size_bytes = path.stat().st_size
    with open(path, "rb") as file:
        length_bytes = file.read(8)
        if len(length_bytes) < 8:
            raise CheckpointError(f"{path.name}: truncated, expected at least 8 bytes, got {size_bytes}")
        (length,) = struct.unpack("<Q", length_bytes)
        if length > 100_000_000:
            raise CheckpointError(
                f"{path.name}: not a safetensors file, expected a header length below 100 MB, got {length}"
            )
        if 8 + length > size_bytes:
            raise CheckpointError(f"{path.name}: truncated, expected a header of {8 + length} bytes, got {size_bytes}")
        header = file.read(length)
    try:
        entries = json.loads(header.decode())
        entries.pop("__metadata__", None)
        tensors = {name: _tensor(name, entry, path, 8 + length) for name, entry in entries.items()}
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path.name}: expected a safetensors header, got one that is not valid: {error!r}"
        ) from None
    return tensors, _byte_problems(path, tensors, 8 + length, size_bytes)


def write(path: Path, tensors: Iterable[tuple[str, np.dtype, tuple[int, ...]]], values: Iterable[np.ndarray]) -> None:
    """Writes a file of the named tensors, whose values are asked for one by one, in the same order.

    Wider dtypes should come first, as readers want every tensor aligned to its item size.

    Raises:
      ValueError: values do not have the promised dtype and shape, or safetensors has no such dtype.
    """
    tensors = list(tensors)
    header = _header(tensors)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for (name, dtype, shape), value in zip(tensors, values, strict=True):
            if (value.dtype, value.shape) != (dtype, shape):
                raise ValueError(f"{name}: expected {dtype} {list(shape)}, got {value.dtype} {list(value.shape)}")
            file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def _header(tensors: Sequence[tuple[str, np.dtype, tuple[int, ...]]]) -> bytes:
    # transformers reads only files that say which framework wrote them.
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in tensors:
        if dtype not in _NAMES:
            raise ValueError(f"{name}: expected a dtype that safetensors has ({', '.join(DTYPES)}), got {dtype}")
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def _read_shards(directory: Path, weight_map: Mapping[str, str]) -> Contents:
    tensors: dict[str, Tensor] = {}
    problems: list[str] = []
    unread: set[str] = set()
    for shard in sorted(set(weight_map.values())):
        try:
            found, byte_problems = read_header(directory / shard)
        except CheckpointError as error:
            problems.append(f"{error}, listed by {INDEX}")
            unread.add(shard)
            continue
        problems += byte_problems
        problems += [f"{name}: in both {tensors[name].file.name} and {shard}" for name in found.keys() & tensors.keys()]
        tensors = found | tensors
    lost = frozenset(name for name, shard in weight_map.items() if shard in unread)
    for name, shard in weight_map.items():
        if shard not in unread and (name not in tensors or tensors[name].file.name != shard):
            problems.append(f"{name}: {INDEX} places it in {shard}, which does not have it")
    return Contents(tensors, problems, lost)


def _weight_map(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        if not all(isinstance(shard, str) and Path(shard).name == shard for shard in weight_map.values()):
            raise ValueError("a shard is not the name of a file beside it")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path.name}: expected JSON with a weight_map from tensor to file, got: {error!r}"
        ) from None
    return weight_map


def _tensor(name: str, entry: dict[str, Any], path: Path, data: int) -> Tensor:
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if entry["dtype"] not in DTYPES:
        known = ", ".join(DTYPES)
        raise CheckpointError(f"{path.name}: {name}: expected a dtype of {known}, got {entry['dtype']}")
    if not all(isinstance(size, int) and size >= 0 for size in (*shape, begin, end)):
        raise CheckpointError(f"{path.name}: {name}: expected whole numbers for shape and bytes, got {entry}")
    tensor = Tensor(name, DTYPES[entry["dtype"]], shape, path, data + begin)
    if end - begin != tensor.nbytes:
        raise CheckpointError(
            f"{path.name}: {name}: expected {tensor.nbytes} bytes for {entry['dtype']} {list(shape)}, got {end - begin}"
        )
    return tensor


def _byte_problems(path: Path, tensors: Mapping[str, Tensor], data: int, size_bytes: int) -> list[str]:
    """The tensors must cover the bytes after the header one after the other."""
    end = data
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset != end:
            return [f"{path.name}: {tensor.name}: expected to begin at byte {end}, got {tensor.offset}"]
        end += tensor.nbytes
    if end > size_bytes:
        cut = [tensor.name for tensor in tensors.values() if tensor.offset + tensor.nbytes > size_bytes]
        return [
            f"{path.name}: truncated, expected {end} bytes, got {size_bytes}; incomplete: {', '.join(sorted(cut)[:5])}"
        ]
    if end < size_bytes:
        return [f"{path.name}: expected {end} bytes, got {size_bytes}: {size_bytes - end} belong to no tensor"]
    return []
