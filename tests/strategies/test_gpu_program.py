"""The decode step of a split model as XLA compiles it for eight H200s, which need not be there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import sharding
from moe_jax import models
from moe_jax.kv_cache import KVCache
from moe_jax.layers.moe import MoE
from moe_jax.model import abstract_parameters
from pallas_kernels import dispatch
from sharding import account, machines

CONFIG = Path(__file__).parents[2] / "configs" / "olmoe-1b-7b.json"
BATCH, CAPACITY = 8, 256
LARGE_BYTES = 2**20


def compiled(strategy: str):
    """One layer of OLMoE, a token for each of 8 requests, on ep=4 x tp=2."""
    layout = sharding.plan_layout(account.gpu_mesh(machines.load("h200"), {"ep": 4, "tp": 2}), strategy=strategy)
    hf_config = json.loads(CONFIG.read_text()) | {"num_hidden_layers": 1}
    family = models.family_of(hf_config)
    graph, abstract = abstract_parameters(family, family.Config.from_hf(hf_config), dtype="bfloat16")
    module = nnx.merge(*graph)
    for _, part in nnx.iter_modules(module):
        if isinstance(part, MoE):
            part.exchange = layout.exchange()
    graphdef, state = nnx.split(module)

    def placed(path, variable):
        name = ".".join(map(str, path))
        leaf, dimensions = abstract[name]
        where = layout.placement(name, dimensions, leaf.shape).sharding
        return variable.replace(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where))

    state = nnx.from_flat_state([(path, placed(path, each)) for path, each in nnx.to_flat_state(state)])

    def empty_cache(state):
        return nnx.merge(graphdef, state).empty_cache(BATCH, CAPACITY)

    def decode(state, tokens_B, cache):
        step = nnx.merge(graphdef, state).decode(tokens_B, cache)
        results = (jnp.argmax(layout.split_logits(step.logits_BV), axis=-1), step.cache)
        return layout.settled(results, is_cache=lambda part: isinstance(part, KVCache))

    cache = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout.cache_sharding(leaf.shape)),
        jax.eval_shape(empty_cache, state),
    )
    tokens_B = jax.ShapeDtypeStruct((BATCH,), jnp.int32, sharding=NamedSharding(layout.mesh, P()))
    with dispatch.compiling_for(dispatch.Device("gpu", "NVIDIA H200", 132)), jax.set_mesh(layout.mesh):
        return jax.jit(decode, donate_argnums=2).lower(state, tokens_B, cache).compile()


@pytest.mark.aot
@pytest.mark.parametrize("strategy", ["eptp_psum", "ep_a2a"])
def test_kernels_run_on_each_device_and_nothing_large_moves(strategy):
    program = compiled(strategy)
    hlo = program.as_text()
    assert len(re.findall(r'custom_call_target="mosaic_gpu[^"]*"', hlo)) == 2  # the router, the experts
    # No weights are gathered: 8 requests' activations, and the kernels' own buffers, are all that a step needs.
    assert program.memory_analysis().temp_size_in_bytes < 4 * LARGE_BYTES
