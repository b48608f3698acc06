"""A model ready to use: its modules and parameters, its config, its tokenizer."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

import sharding
from moe_jax import memory, models
from moe_jax.checkpoints import hub, load_parameters, orbax, save_parameters
from moe_jax.tokenizer import Tokenizer

BUNDLED = {"shakespeare": Path(__file__).parent / "bundled" / "shakespeare"}
PARAMETERS = "parameters"  # the folder of an Orbax checkpoint beside the tokenizer
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Model:
    """What `load` returns. `module` is a Flax NNX module; `stop_token_ids` end a generation; `hf_config` is the config.json."""

    module: Any
    config: Any
    hf_config: Mapping[str, Any]
    tokenizer: Tokenizer | None = None
    stop_token_ids: tuple[int, ...] = ()
    name: str = ""

    @property
    def model_type(self) -> str:
        return self.hf_config["model_type"]

    @property
    def is_encoder_decoder(self) -> bool:
        return hasattr(self.config, "num_decoder_layers")

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def context_length(self) -> int | None:
        """Positions that the model was made for; None where it has no bound (relative positions)."""
        return getattr(self.module, "context_length", None)

    @property
    def num_parameters(self) -> int:
        return sum(leaf.size for leaf in parameters(self.module).values())


def load(
    path_or_id: str | Path,
    *,
    dtype: str = "bfloat16",
    mesh: Mesh | str | None = None,
    strategy: str | None = None,
    check_finite: bool = False,
) -> Model:
    """Loads a Hugging Face checkpoint: a local directory, a hub id, or "shakespeare", which comes with the package.

    Args:
      dtype: type of parameters and activations: "float32", "bfloat16" or "float16". Routing, softmax and norms are float32.
      mesh: devices to split the model over, e.g. "ep=4,tp=2"; None for one device.
      strategy: how to split, one of `sharding.STRATEGIES`; "eptp" when a mesh is given.
      check_finite: also refuse NaN and infinite weights.

    Raises:
      ValueError: the architecture is unknown, its config asks for something unsupported, or the files do not hold exactly the
        model's tensors (everything wrong in one message).
    """
    _check_placement(dtype, mesh, strategy)
    directory = BUNDLED.get(str(path_or_id)) or hub.resolve(path_or_id)
    hf_config = _read_json(directory / "config.json")
    family, config, graph, shapes = _prepared(hf_config, str(path_or_id), dtype, mesh, strategy)
    loaded = load_parameters(directory, shapes, family.rules(config), check_finite=check_finite)
    return Model(
        module=merged(graph, loaded),
        config=config,
        hf_config=hf_config,
        tokenizer=Tokenizer(directory) if Tokenizer.is_in(directory) else None,
        stop_token_ids=_stop_token_ids(directory, config),
        name=str(path_or_id),
    )


def load_orbax(
    directory: str | Path, *, dtype: str = "bfloat16", mesh: Mesh | str | None = None, strategy: str | None = None
) -> Model:
    """Loads what `save_orbax` wrote, placed as asked for here, whatever mesh it was saved from; arguments are those of `load`.

    Raises:
      ValueError: as `load`.
    """
    _check_placement(dtype, mesh, strategy)
    directory = Path(directory)
    hf_config = orbax.read_orbax_config(directory / PARAMETERS)
    _, config, graph, shapes = _prepared(hf_config, str(directory), dtype, mesh, strategy)
    loaded = orbax.load_orbax(directory / PARAMETERS, shapes)
    return Model(
        module=merged(graph, loaded),
        config=config,
        hf_config=hf_config,
        tokenizer=Tokenizer(directory) if Tokenizer.is_in(directory) else None,
        stop_token_ids=_stop_token_ids(directory, config),
        name=str(directory),
    )


def save(model: Model, directory: str | Path) -> None:
    """Writes a Hugging Face checkpoint (config, safetensors, tokenizer) that transformers loads.

    Raises:
      ValueError: the directory exists and is not empty.
    """
    family = models.family_of(dict(model.hf_config))
    stored = parameters(model.module)
    config = dict(model.hf_config)
    config["dtype"] = str(next(iter(stored.values())).dtype)
    config.pop("torch_dtype", None)
    tokenizer_files = model.tokenizer.files() if model.tokenizer else ()
    save_parameters(Path(directory), stored, family.rules(model.config), config=config, tokenizer_files=tokenizer_files)


def save_orbax(model: Model, directory: str | Path) -> None:
    """Writes an Orbax checkpoint, each device's shards as they lie, and the tokenizer beside it.

    Raises:
      ValueError: there is a checkpoint already.
    """
    directory = Path(directory)
    orbax.save_orbax(directory / PARAMETERS, parameters(model.module), dict(model.hf_config))
    for file in model.tokenizer.files() if model.tokenizer else ():
        shutil.copyfile(file, directory / file.name)


def parameters(module: nnx.Module) -> dict[str, jax.Array]:
    """A module's parameters by dotted path, such as `layers.0.attention.q_NHD`."""
    return {name: variable[...] for name, variable in _named(nnx.state(module, nnx.Param)).items()}


def abstract_parameters(
    family: Any, config: Any, *, dtype: str
) -> tuple[tuple[Any, Any], dict[str, tuple[jax.ShapeDtypeStruct, tuple[str | None, ...]]]]:
    """The model of a config without any memory: its graph, and each parameter's shape and dimension names by dotted path."""
    build = functools.partial(family.build, config, dtype=jnp.dtype(dtype))
    module = nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(module)
    abstract = {
        name: (jax.ShapeDtypeStruct(variable.shape, variable.dtype), variable.get_metadata()["dimensions"])
        for name, variable in _named(state).items()
    }
    return (graphdef, state), abstract


def merged(graph: tuple[Any, Any], loaded: Mapping[str, jax.Array]) -> nnx.Module:
    """A graph's module with its parameters by dotted path."""
    graphdef, state = graph
    flat = [
        (path, variable.replace(loaded[".".join(str(part) for part in path)]))
        for path, variable in nnx.to_flat_state(state)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def _named(state: Any) -> dict[str, Any]:
    return {".".join(str(part) for part in path): variable for path, variable in nnx.to_flat_state(state)}


def _check_placement(dtype: str, mesh: Mesh | str | None, strategy: str | None) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"expected dtype to be one of {', '.join(DTYPES)}, got {dtype!r}")
    if strategy is not None and mesh is None:
        raise ValueError(f'expected a mesh beside strategy={strategy!r}, got mesh=None: pass for example mesh="ep=2"')


def _prepared(hf_config: dict[str, Any], name: str, dtype: str, mesh: Mesh | str | None, strategy: str | None):
    """The family, its config, the model's graph, and every parameter's shape and place; refuses what does not fit."""
    family = models.family_of(hf_config)
    config = family.Config.from_hf(hf_config)
    graph, abstract = abstract_parameters(family, config, dtype=dtype)
    if mesh is not None:
        mesh = sharding.make_mesh(mesh) if isinstance(mesh, str) else mesh
        abstract = _placed(abstract, mesh, strategy or "eptp")
    shapes = {path: leaf for path, (leaf, _) in abstract.items()}
    memory.require(
        shapes.values(),
        what=f"{name} in {dtype}",
        remedy='use dtype="bfloat16", or split it over more devices with mesh="ep=2"',
    )
    return family, config, graph, shapes


def _placed(abstract, mesh: Mesh, strategy: str):
    placed = {}
    for name, (leaf, dimensions) in abstract.items():
        where = sharding.placement(dimensions, leaf.shape, mesh=mesh, strategy=strategy, name=name)
        placed[name] = (jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), dimensions)
    return placed


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(
            f"expected a Hugging Face checkpoint with a config.json, got {path.parent} without one"
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"expected {path} to be JSON, got: {error}") from None


def _stop_token_ids(directory: Path, config: Any) -> tuple[int, ...]:
    """generation_config.json knows best (chat checkpoints list several there); else the config."""
    path = directory / "generation_config.json"
    ids = _read_json(path).get("eos_token_id") if path.exists() else None
    if ids is None:
        return config.eos_token_id
    return (ids,) if isinstance(ids, int) else tuple(ids)
