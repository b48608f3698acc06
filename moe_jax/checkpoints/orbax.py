"""Orbax checkpoints: parameters as they are, for training and for other meshes. Only this file imports orbax."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint.experimental.v1 as ocp
from jax.sharding import SingleDeviceSharding

from moe_jax.checkpoints.errors import CheckpointError


def save_orbax(path: str | Path, parameters: Mapping[str, jax.Array], config: Mapping[str, Any]) -> None:
    """Saves parameters by path, each device's shards as they lie, with the contents of `config.json` alongside.

    Raises:
      ValueError: there is a checkpoint already.
    """
    path = Path(path).absolute()
    if path.exists():
        raise ValueError(f"expected {path} not to exist yet, got a path that does: choose another name")
    ocp.save(path, dict(parameters), custom_metadata=dict(config))


def read_orbax_config(path: str | Path) -> dict[str, Any]:
    """The config that was saved with the parameters."""
    return dict(_metadata(path).custom_metadata or {})


def load_orbax(path: str | Path, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Loads exactly the parameters of `abstract`, with its dtypes and shardings, whatever they were saved with.

    Raises:
      CheckpointError: the checkpoint holds other parameters or shapes (all of them listed).
    """
    saved = _metadata(path).metadata
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
        raise CheckpointError(f"{path} does not hold exactly this model's parameters", problems)
    here = SingleDeviceSharding(jax.devices()[0])
    placed = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or here)
        for name, leaf in abstract.items()
    }
    return ocp.load(Path(path).absolute(), placed)


def _metadata(path: str | Path) -> Any:
    try:
        return ocp.metadata(Path(path).absolute())
    except (ocp.errors.InvalidLayoutError, FileNotFoundError) as error:
        raise CheckpointError(f"expected a directory that save_orbax wrote, got {path}") from error
