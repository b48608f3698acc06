"""Random models of every family: tiny ones for tests and examples, large ones for measurements."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax import memory, models
from moe_jax.layers.parameter import INITIAL_SCALE
from moe_jax.model import Model, abstract_parameters, merged


def random_model(hf_config: dict[str, Any], *, dtype: str = "float32", seed: int = 0, scale: float = 0.02) -> Model:
    """A model of the given `config.json` keys with random parameters, without a tokenizer.

    Matrices are normal with standard deviation `scale`; small ones give nearly equal logits.
    """
    family = models.family_of(hf_config)
    config = family.Config.from_hf(hf_config)
    module = family.build(config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(seed))
    for _, parameter in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        if parameter.ndim > 1:
            parameter.set_value(parameter[...] * (scale / INITIAL_SCALE))
    return _named(module, config, hf_config)


def abstract_model(hf_config: dict[str, Any], *, dtype: str = "bfloat16") -> Model:
    """The model without its parameters' values: shapes to compile for, at any size."""
    family = models.family_of(hf_config)
    config = family.Config.from_hf(hf_config)
    graph, _ = abstract_parameters(family, config, dtype=dtype)
    return _named(nnx.merge(*graph), config, hf_config)


def large_random_model(
    hf_config: dict[str, Any], *, dtype: str = "bfloat16", seed: int = 0, scale: float = 0.02
) -> Model:
    """As `random_model`, but every parameter is made where it stays, on the device: 90 GB take seconds.

    Matrices are normal with standard deviation `scale`, norms one, biases zero. The same seed gives the same values on
    the same kind of device (XLA's own bit generator).

    Raises:
      ValueError: it does not fit in the device's memory.
    """
    family = models.family_of(hf_config)
    config = family.Config.from_hf(hf_config)
    graph, abstract = abstract_parameters(family, config, dtype=dtype)
    shapes = {path: leaf for path, (leaf, _) in abstract.items()}
    memory.require(
        shapes.values(),
        what=f"a random {hf_config['model_type']} in {dtype}",
        remedy="take a smaller config, or fewer layers",
    )
    values = {path: _random(path, leaf, (seed, index), scale) for index, (path, leaf) in enumerate(shapes.items())}
    return _named(merged(graph, values), config, hf_config)


def _random(path: str, leaf: jax.ShapeDtypeStruct, seeds: tuple[int, int], scale: float) -> jax.Array:
    if "bias" in path:
        return jnp.zeros(leaf.shape, leaf.dtype)
    if leaf.ndim == 1:
        return jnp.ones(leaf.shape, leaf.dtype)
    return _normal(leaf.shape, leaf.dtype)(np.asarray(seeds, np.uint32), np.float32(scale))


def compile_values(hf_config: dict[str, Any], *, dtype: str = "bfloat16") -> None:
    """Compiles ahead what `large_random_model` of the same arguments runs; needs no memory yet."""
    family = models.family_of(hf_config)
    _, abstract = abstract_parameters(family, family.Config.from_hf(hf_config), dtype=dtype)
    for leaf, _ in abstract.values():
        if leaf.ndim > 1:
            _normal(leaf.shape, leaf.dtype)


@functools.cache
def _normal(shape: tuple[int, ...], dtype: jnp.dtype) -> jax.stages.Compiled:
    def values(seeds_2: jax.Array, scale: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seeds_2[0], impl="rbg"), seeds_2[1])
        return (jax.random.normal(key, shape, dtype).astype(jnp.float32) * scale).astype(dtype)

    return jax.jit(values).lower(np.zeros(2, np.uint32), np.float32(0)).compile()


def _named(module: Any, config: Any, hf_config: dict[str, Any]) -> Model:
    return Model(
        module, config, hf_config, stop_token_ids=config.eos_token_id, name=f"random {hf_config['model_type']}"
    )
