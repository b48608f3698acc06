"""A model ready to use: its modules and parameters, its config, its tokenizer."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding

import sharding
from moe_jax import memory, models
from moe_jax.checkpoints import hub, load_parameters, orbax, save_parameters
from moe_jax.layers.moe import MoE
from moe_jax.models.hf_config import as_token_ids
from moe_jax.tokenizer import Tokenizer

BUNDLED = {"shakespeare": Path(__file__).parent / "bundled" / "shakespeare"}
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Model:
    """What `load` returns.

    `module` is a Flax NNX module; `stop_token_ids` end a generation; `hf_config` is the config.json.

    `layout` says how it lies over several devices; None on one.
    """

    module: Any
    config: Any
    hf_config: Mapping[str, Any]
    tokenizer: Tokenizer | None = None
    stop_token_ids: tuple[int, ...] = ()
    name: str = ""
    layout: sharding.Layout | None = None

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
        family = models.family_of(dict(self.hf_config))
        _, abstract = abstract_parameters(family, self.config, dtype="float32")
        return sum(leaf.size for leaf, _ in abstract.values())

    def on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        """Trace and run the model's programs inside: on one device it does nothing."""
        if self.layout is None:
            return contextlib.nullcontext()
        assert isinstance(self.layout.mesh, Mesh)
        return jax.set_mesh(self.layout.mesh)


def load(
    path_or_id: str | Path,
    *,
    dtype: str = "bfloat16",
    mesh: Mesh | str | None = None,
    strategy: str | None = None,
    attention: str | None = None,
    capacity_factor: float | None = None,
    check_finite: bool = False,
) -> Model:
    """Loads a Hugging Face checkpoint: a local directory, a hub id, or "shakespeare", which comes with the package.

    Args:
      dtype: type of parameters and activations: "float32", "bfloat16" or "float16". Routing, softmax and norms are float32.
      mesh: devices to split the model over, e.g. "ep=4,tp=2"; None for one device.
      strategy: how tokens meet experts, one of `sharding.STRATEGIES`, or two for prefill and decode, "ep_agrs/ep_psum";
        "eptp_psum" when a mesh is given. Experts that the devices do not divide are filled up with empty ones.
      attention: "tp" splits everything but the experts by heads and widths, "dp" by requests; by default "dp" where the
        strategy of decoding splits tokens.
      capacity_factor: lets `ep_a2a` and `eptp_dp` send at most this times an even share of the choices to each device; what
        is over is dropped, and its routing shows expert -1. None drops nothing.
      check_finite: also refuse NaN and infinite weights.

    Raises:
      ValueError: the architecture is unknown, its config asks for something unsupported, or the files do not hold exactly the
        model's tensors (everything wrong in one message); or the mesh does not divide the model.
    """
    _require_dtype(dtype)  # before anything is downloaded
    layout = _layout(mesh, strategy=strategy, attention=attention, capacity_factor=capacity_factor)
    directory = BUNDLED.get(str(path_or_id)) or hub.resolve(_path(path_or_id, "a directory or a hub id"))
    hf_config = _read_json(directory / "config.json")
    plan = _planned(directory, hf_config, str(path_or_id), dtype, layout)
    rules = plan.family.rules(plan.config)
    loaded = load_parameters(directory, plan.to_load, rules, check_finite=check_finite)
    return _ready(plan, loaded, hf_config, str(path_or_id))


def load_orbax(
    directory: str | Path,
    *,
    dtype: str = "bfloat16",
    mesh: Mesh | str | None = None,
    strategy: str | None = None,
    attention: str | None = None,
    capacity_factor: float | None = None,
) -> Model:
    """Loads what `save_orbax` wrote, placed as asked for here, whatever mesh it was saved from; arguments are those of `load`.

    Raises:
      ValueError: as `load`.
    """
    _require_dtype(dtype)
    layout = _layout(mesh, strategy=strategy, attention=attention, capacity_factor=capacity_factor)
    directory = _path(directory)
    hf_config = orbax.read_orbax_config(directory)
    plan = _planned(directory, hf_config, str(directory), dtype, layout)
    loaded = orbax.load_orbax(directory, plan.to_load)
    return _ready(plan, loaded, hf_config, str(directory))


def save(model: Model, directory: str | Path, *, overwrite: bool = False) -> None:
    """Writes a Hugging Face checkpoint (config, safetensors, tokenizer) that transformers loads.

    Appears when it is complete. `overwrite` replaces what is in the directory, all of it.

    Raises:
      ValueError: the directory exists and is not empty.
    """
    family = models.family_of(dict(model.hf_config))
    stored = _stored(model)
    config = dict(model.hf_config)
    config["dtype"] = str(next(iter(stored.values())).dtype)
    config.pop("torch_dtype", None)
    save_parameters(
        _path(directory),
        stored,
        family.rules(model.config),
        config=config,
        tokenizer_files=model.tokenizer.files() if model.tokenizer else (),
        overwrite=overwrite,
    )


def save_orbax(model: Model, directory: str | Path, *, overwrite: bool = False) -> None:
    """Writes an Orbax checkpoint, each device's shards as they lie, and the tokenizer beside it.

    Appears when it is complete: a save that is killed leaves what was there before. `overwrite` replaces what is in the
    directory, all of it. Where several processes hold the model, all of them call this.

    Raises:
      ValueError: the directory exists and is not empty.
    """
    orbax.save_orbax(
        _path(directory),
        _stored(model),
        dict(model.hf_config),
        tokenizer_files=model.tokenizer.files() if model.tokenizer else (),
        overwrite=overwrite,
    )


def _require_dtype(dtype: Any) -> None:
    """Raises `ValueError` for a dtype that models do not come in."""
    if dtype not in DTYPES:
        raise ValueError(f"expected dtype to be one of {', '.join(DTYPES)}, got {dtype!r}")


def _path(path: Any, wanted: str = "a directory") -> Path:
    if not isinstance(path, str | Path):
        raise ValueError(f"expected {wanted}, got {path!r}")
    return Path(path)


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


def _layout(mesh: Mesh | str | None, **choices: Any) -> sharding.Layout | None:
    given = [f"{name}={value!r}" for name, value in choices.items() if value is not None]
    for name in ("strategy", "attention"):
        if not isinstance(choices[name], str | None) or choices[name] == "":
            raise ValueError(f"expected {name} to be a name, or None for the default, got {choices[name]!r}")
    if mesh is not None and not isinstance(mesh, str | Mesh):
        raise ValueError(f'expected mesh to be sizes like "ep=4,tp=2" or a jax.sharding.Mesh, got {mesh!r}')
    if mesh is None:
        if given:
            raise ValueError(f'expected a mesh beside {", ".join(given)}, got mesh=None: pass for example mesh="ep=2"')
        return None
    return sharding.plan_layout(sharding.make_mesh(mesh) if isinstance(mesh, str) else mesh, **choices)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """A model that is about to be loaded: what to load, where, and the graph to put it in.

    `places` is None where one device holds everything.
    """

    family: Any
    config: Any
    graph: tuple[Any, Any]
    layout: sharding.Layout | None
    places: Mapping[str, sharding.Placement] | None
    to_load: Mapping[str, jax.ShapeDtypeStruct]
    tokenizer: Tokenizer | None
    stop_token_ids: tuple[int, ...]

    def module(self, loaded: dict[str, jax.Array]) -> nnx.Module:
        """The model of what was loaded; `loaded` is emptied on the way, so that nothing is there twice."""
        if self.layout is None or self.places is None:
            return merged(self.graph, loaded)
        filled_up = {path: place.filled_up(loaded.pop(path)) for path, place in self.places.items()}
        module = merged(self.graph, filled_up)
        for _, part in nnx.iter_modules(module):
            if isinstance(part, MoE):
                part.exchange = self.layout.exchange()
        return module


def _planned(
    directory: Path, hf_config: dict[str, Any], name: str, dtype: str, layout: sharding.Layout | None
) -> _Plan:
    """Refuses what is not supported, is not divided by the mesh, does not fit, or cannot be read beside the weights."""
    family = models.family_of(hf_config)
    config = family.Config.from_hf(hf_config)
    graph, abstract = abstract_parameters(family, config, dtype=dtype)
    where: Any = None
    if layout is not None and layout.mesh.size == 1:
        # One device: nothing is exchanged, and nothing distinguishes it from a model without a mesh.
        where, layout = SingleDeviceSharding(layout.mesh.devices.flat[0]), None
    places = None if layout is None else _places(layout, abstract)
    to_load = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=places[path].loading if places else where)
        for path, (leaf, _) in abstract.items()
    }
    kept = [
        jax.ShapeDtypeStruct(places[path].padded_shape, leaf.dtype, sharding=places[path].sharding) if places else leaf
        for path, leaf in to_load.items()
    ]
    remedy = 'use dtype="bfloat16", or split it over more devices with mesh="ep=2"'
    memory.require(kept, what=f"{name} in {dtype}", remedy=remedy)
    tokenizer = Tokenizer(directory) if Tokenizer.is_in(directory) else None
    return _Plan(
        family, config, graph, layout, places, to_load, tokenizer, stop_token_ids=_stop_token_ids(directory, config)
    )


def _ready(plan: _Plan, loaded: dict[str, jax.Array], hf_config: Mapping[str, Any], name: str) -> Model:
    return Model(
        module=plan.module(loaded),
        config=plan.config,
        hf_config=hf_config,
        tokenizer=plan.tokenizer,
        stop_token_ids=plan.stop_token_ids,
        name=name,
        layout=plan.layout,
    )


def _stored(model: Model) -> dict[str, jax.Array]:
    """A model's parameters as checkpoints have them: without the empty experts that a mesh asked for."""
    stored = parameters(model.module)
    if model.layout is None:
        return stored
    if any(isinstance(part, MoE) and part.tables is not None for _, part in nnx.iter_modules(model.module)):
        raise ValueError(f"{model.name}: its experts are where `rebalanced` put them; save the model as it was loaded")
    dtype = str(next(iter(stored.values())).dtype)
    _, abstract = abstract_parameters(models.family_of(dict(model.hf_config)), model.config, dtype=dtype)
    places = _places(model.layout, abstract)
    return {path: places[path].cut_back(values) for path, values in stored.items()}


def _places(layout: sharding.Layout, abstract) -> dict[str, sharding.Placement]:
    return {name: layout.placement(name, dimensions, leaf.shape) for name, (leaf, dimensions) in abstract.items()}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        keys = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(
            f"expected a Hugging Face checkpoint with a config.json, got {path.parent} without one"
        ) from None
    except OSError as error:
        raise ValueError(f"expected {path} to be a file that can be read, got: {error}") from None
    except ValueError as error:  # no JSON, or no text
        raise ValueError(f"expected {path} to be JSON, got: {error}") from None
    if not isinstance(keys, dict):
        raise ValueError(f"expected {path} to be a JSON object, got a {type(keys).__name__}")
    return keys


def _stop_token_ids(directory: Path, config: Any) -> tuple[int, ...]:
    """generation_config.json knows best (chat checkpoints list several there); else the config."""
    path = directory / "generation_config.json"
    ids = _read_json(path).get("eos_token_id") if path.exists() else None
    return config.eos_token_id if ids is None else as_token_ids(ids, f"eos_token_id in {path}")
