"""Orbax checkpoints: parameters as they are, for training and for other meshes. Only this file imports orbax.

A directory with the parameters in a folder of their own, and the tokenizer's files beside it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint.experimental.v1 as ocp
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding

from moe_jax.checkpoints.errors import CheckpointError
from moe_jax.checkpoints.save import replaced

PARAMETERS = "parameters"
DAMAGED = "files of it are missing or cut short; copy it again, or save it anew"


def save_orbax(
    directory: str | Path,
    parameters: Mapping[str, jax.Array],
    config: Mapping[str, Any],
    *,
    tokenizer_files: Sequence[str | Path] = (),
    overwrite: bool = False,
) -> None:
    """Saves parameters by path, each device's shards as they lie, with the contents of `config.json`.

    Appears under its name when it is complete: a run that is killed leaves nothing there, or what was there before.
    Where several processes hold the parameters, all of them call this, with one file system.

    Args:
      tokenizer_files: copied beside the parameters.
      overwrite: replace what is in the directory; everything in it goes.

    Raises:
      ValueError: the directory is not empty.
    """
    is_primary = jax.process_index() == 0
    with replaced(Path(directory), overwrite=overwrite, is_primary=is_primary) as target:
        _wait_for_all("moe_jax.save_orbax: directory made")
        ocp.save(target / PARAMETERS, dict(parameters), custom_metadata=dict(config))
        for file in map(Path, tokenizer_files if is_primary else ()):
            shutil.copyfile(file, target / file.name)
    _wait_for_all("moe_jax.save_orbax: done")


def _wait_for_all(what: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def is_orbax(directory: str | Path) -> bool:
    """Whether `save_orbax` wrote it."""
    return (Path(directory) / PARAMETERS).is_dir()


def read_orbax_config(directory: str | Path) -> dict[str, Any]:
    """The config that was saved with the parameters.

    Raises:
      CheckpointError: there is none, or it cannot be read.
    """
    config = dict(_metadata(directory).custom_metadata or {})
    if not config:
        raise CheckpointError(f"expected a model's config with the parameters of {directory}, got none: {DAMAGED}")
    return config


def read_orbax_dtypes(directory: str | Path) -> set[str]:
    """The parameters' dtypes, by name."""
    return {str(leaf.dtype) for leaf in _metadata(directory).metadata.values()}


def load_orbax(directory: str | Path, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Loads exactly the parameters of `abstract`, with its dtypes and shardings, whatever they were saved with.

    Raises:
      CheckpointError: the checkpoint holds other parameters or shapes (all of them listed), or cannot be read.
    """
    saved = _metadata(directory).metadata
    problems = {
        "missing": [f"{name} {list(leaf.shape)}" for name, leaf in abstract.items() if name not in saved],
        "extra": [f"{name} {list(leaf.shape)}" for name, leaf in saved.items() if name not in abstract],
        "wrong shape": [
            f"{name}, expected {list(leaf.shape)}, got {list(saved[name].shape)}"
            for name, leaf in abstract.items()
            if name in saved and tuple(saved[name].shape) != tuple(leaf.shape)
        ],
    }
    if any(problems.values()):
        raise CheckpointError(f"{directory} does not hold exactly this model's parameters", problems)
    here = SingleDeviceSharding(jax.devices()[0])
    placed = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or here)
        for name, leaf in abstract.items()
    }
    try:
        return ocp.load(Path(directory).absolute() / PARAMETERS, placed)
    except Exception as error:
        if type(error) is not Exception and not isinstance(error, json.JSONDecodeError):
            raise  # memory, interruption: not the files, for which Orbax and TensorStore raise these two
        raise CheckpointError(f"expected all data of {directory}, got some that cannot be read: {DAMAGED}") from error


def _metadata(directory: str | Path) -> Any:
    try:
        found = ocp.metadata(Path(directory).absolute() / PARAMETERS)
    except (ocp.errors.InvalidLayoutError, FileNotFoundError) as error:
        raise CheckpointError(f"expected a directory that save_orbax wrote, got {directory}") from error
    if found.metadata is None:  # Orbax logs why
        raise CheckpointError(f"expected a list of parameters in {directory}, got none that can be read: {DAMAGED}")
    return found
