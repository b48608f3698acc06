"""Writes parameters as a Hugging Face checkpoint that transformers loads: the weight tables, inverted."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moe_jax import progress
from moe_jax.checkpoints.rules import Copy, Ignored, Part, Rule, spellings
from moe_jax.checkpoints.safetensors import INDEX, SINGLE, write

MAX_SHARD_BYTES = 5_000_000_000


def save_parameters(
    directory: str | Path,
    parameters: Mapping[str, jax.Array],
    rules: Sequence[Rule | Ignored | Copy],
    *,
    config: Mapping[str, Any],
    tokenizer_files: Sequence[str | Path] = (),
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Writes `config.json`, the parameters in the hub's spelling, and copies of the tokenizer's files.

    Appears under its name when it is complete: a run that is interrupted leaves nothing there, or what was there
    before. Fetches one parameter at a time to the host. Tied copies are not written.

    Args:
      config: the contents of `config.json`; its `dtype` should be that of the parameters.
      max_shard_bytes: where there are more bytes of tensors, writes shards of at most this size and their index.
      overwrite: replace what is in the directory; everything in it goes.

    Raises:
      ValueError: the directory is not empty, or a parameter has no rule.
    """
    directory = Path(directory)
    shards = _shards(_entries(parameters, rules), max_shard_bytes)
    with replaced(directory, overwrite=overwrite) as target:
        (target / "config.json").write_text(json.dumps(dict(config), indent=2, sort_keys=True) + "\n")
        for file in map(Path, tokenizer_files):
            shutil.copyfile(file, target / file.name)
        with progress.bar(
            f"Saving {directory.name}", sum(entry.nbytes for shard in shards for entry in shard)
        ) as advance:
            for name, shard in zip(_file_names(len(shards)), shards, strict=True):
                tensors = [(entry.part.name, entry.dtype, entry.shape) for entry in shard]
                write(target / name, tensors, _values(shard, parameters, advance))
        if len(shards) > 1:
            (target / INDEX).write_text(json.dumps(_index(shards), indent=2, sort_keys=True) + "\n")


@contextlib.contextmanager
def replaced(directory: Path, *, overwrite: bool, is_primary: bool = True) -> Iterator[Path]:
    """A new directory beside `directory` that takes its name when the block ends well, and vanishes when it does not.

    A process that is killed inside leaves what was there before, and the unfinished directory, which the next one
    removes. Where several processes save together, all enter with the same arguments, and only the primary one touches
    the directories.

    Raises:
      ValueError: there is something under that name already that may not be overwritten, or nothing can be written there.
    """
    directory = directory.absolute()
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"expected {directory} to be a directory or nothing yet, got a file: choose another name")
    if not overwrite and directory.exists() and any(directory.iterdir()):
        raise ValueError(
            f"expected {directory} to be a new or empty directory, got one that is neither: "
            "choose another name or pass overwrite=True"
        )
    incomplete = directory.with_name(f".{directory.name}.incomplete")
    if not is_primary:
        yield incomplete
        return
    shutil.rmtree(incomplete, ignore_errors=True)
    try:
        incomplete.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"expected a directory that can be written, got {directory}: {error}") from None
    try:
        yield incomplete
        if directory.exists():
            _exchange(incomplete, directory)
        else:
            incomplete.rename(directory)
    finally:
        shutil.rmtree(incomplete, ignore_errors=True)


AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux's fcntl.h and fs.h


def _exchange(one: Path, other: Path) -> None:
    """Swaps the names of two directories: in one step on Linux, in two where the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 and renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return
    aside = one.with_name(f"{one.name}.aside")
    other.rename(aside)
    one.rename(other)
    aside.rename(one)


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One tensor to write: the part of which parameter, and what it will look like."""

    path: str
    part: Part
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def _entries(parameters: Mapping[str, jax.Array], rules: Sequence[Rule | Ignored | Copy]) -> list[_Entry]:
    return [
        _Entry(path, part, np.dtype(values.dtype), part.rule.tensor_shape(values.shape))
        for path, values in parameters.items()
        for part in spellings(path, values.shape, rules)[0]
    ]


def _shards(entries: Sequence[_Entry], max_shard_bytes: int) -> list[list[_Entry]]:
    """Fills shards one after the other. Wider dtypes first: every tensor lies at a multiple of its item size."""
    shards: list[list[_Entry]] = [[]]
    size_bytes = 0
    for entry in sorted(entries, key=lambda entry: -entry.dtype.itemsize):
        if shards[-1] and size_bytes + entry.nbytes > max_shard_bytes:
            shards.append([])
            size_bytes = 0
        shards[-1].append(entry)
        size_bytes += entry.nbytes
    return shards


def _file_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _index(shards: Sequence[Sequence[_Entry]]) -> dict[str, Any]:
    names = _file_names(len(shards))
    return {
        "metadata": {"total_size": sum(entry.nbytes for shard in shards for entry in shard)},
        "weight_map": {entry.part.name: name for name, shard in zip(names, shards, strict=True) for entry in shard},
    }


def _values(shard: Sequence[_Entry], parameters: Mapping[str, jax.Array], advance) -> Iterator[np.ndarray]:
    """The tensors' values. Those of one parameter follow each other, so that it is fetched once."""
    path, fetched = None, np.empty(0)
    for entry in shard:
        if entry.path != path:
            path, fetched = entry.path, np.asarray(parameters[entry.path])
        at: tuple[Any, ...] = (*entry.part.at, ...)
        yield entry.part.rule.to_hf(fetched[at])
        advance(entry.nbytes)
