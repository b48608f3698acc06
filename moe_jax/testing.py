"""Tiny random models of every family, for tests and examples: they go everywhere a real one goes."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx

from moe_jax import models
from moe_jax.layers.parameter import INITIAL_SCALE
from moe_jax.model import Model


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
    return Model(
        module, config, hf_config, stop_token_ids=config.eos_token_id, name=f"random {hf_config['model_type']}"
    )
