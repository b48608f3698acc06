"""Another place for experts while a model is in use: replicas of the busy ones, and which device has which."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.generate import RoutingTrace
from moe_jax.layers.moe import MoE
from moe_jax.model import Model
from sharding.placement import Tables, expert_loads, identity, plan


class Places(nnx.Module):
    """One layer's `sharding.placement.Tables`: inputs of the model's programs, like its parameters."""

    def __init__(self, tables: Tables):
        self.phys2log_P = nnx.Variable(jnp.asarray(tables.phys2log_P))
        self.log2phys_ER = nnx.Variable(jnp.asarray(tables.log2phys_ER))
        self.replicas_E = nnx.Variable(jnp.asarray(tables.replicas_E))

    def get_value(self) -> Tables:
        return Tables(self.phys2log_P[...], self.log2phys_ER[...], self.replicas_E[...])


def measured_loads(model: Model, routing: RoutingTrace) -> list[np.ndarray]:
    """How often each expert of every sparse layer was chosen, prompts and new tokens together.

    `routing` is that of `generate(..., routed_experts=True)`.
    """
    layers = _sparse_layers(model.module)
    both = np.concatenate([_by_layer(routing.prompt_experts_BLTA), _by_layer(routing.experts_BLUA)], axis=1)
    if len(both) != len(layers):
        raise ValueError(f"expected a routing of {len(layers)} sparse layers, got {len(both)}")
    return [expert_loads(experts_X, layer.gate_ED.shape[0]) for experts_X, layer in zip(both, layers, strict=True)]


def rebalanced(model: Model, loads: Sequence[np.ndarray], *, spare: int = 1) -> Model:
    """The model with each layer's experts where a plan from these loads puts them, `spare` more slots on each device.

    Results are the same up to the order of sums. The first call makes the model's programs compile again, for more slots;
    further ones, with the same `spare`, only move weights. The model that comes back shares all other arrays; it cannot be
    saved: save the one that was loaded.

    Raises:
      ValueError: the model is on one device, or its strategy splits every expert; loads of the wrong number or length.
    """
    if model.layout is None or not (devices := model.layout.parts(model.layout.decode.experts)) > 1:
        raise ValueError(f"{model.name}: expected a model whose mesh and strategy split whole experts over devices")
    module = nnx.merge(*nnx.split(model.module))
    layers = _sparse_layers(module)
    if len(loads) != len(layers):
        raise ValueError(f"expected loads of {len(layers)} sparse layers, got {len(loads)}")
    for layer, loads_E in zip(layers, loads, strict=True):
        num_experts = layer.gate_ED.shape[0]
        if np.shape(loads_E) != (num_experts,):
            raise ValueError(f"expected {num_experts} loads for every layer, got {np.shape(loads_E)}")
        before = identity(num_experts) if layer.tables is None else layer.tables.get_value()
        after = plan(loads_E, devices=devices, slots=-(-num_experts // devices) + spare)
        # An expert's weights are in its first slot.
        source_P = np.asarray(before.log2phys_ER)[after.phys2log_P, 0]
        for name in ("up_EGFD", "down_EDF"):
            parameter = getattr(layer, name)
            setattr(layer, name, parameter.replace(_moved(parameter.get_value(), source_P)))
        layer.tables = nnx.data(Places(after))
    return dataclasses.replace(model, module=module)


def _moved(weights_EX: jax.Array, source_P: np.ndarray) -> jax.Array:
    return _take(weights_EX.sharding)(weights_EX, source_P)


@functools.lru_cache(maxsize=64)
def _take(where: Any):
    return jax.jit(lambda weights_EX, source_P: jnp.take(weights_EX, source_P, axis=0), out_shardings=where)


def _by_layer(experts_BLTA: np.ndarray) -> np.ndarray:
    return experts_BLTA.transpose(1, 0, 2, 3).reshape(experts_BLTA.shape[1], -1)


def _sparse_layers(module: nnx.Module) -> list[MoE]:
    return [part for _, part in nnx.iter_modules(module) if isinstance(part, MoE)]
