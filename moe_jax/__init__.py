"""Mixture-of-Experts language models in JAX, at the speed of the GPU's memory.

model = moe_jax.load("shakespeare")
out = moe_jax.generate(model, ["ROMEO:", "To be"], max_new_tokens=64)
"""

from moe_jax.generate import Compiled, Generated, RoutingTrace, compile, generate, logits
from moe_jax.model import Model, load, load_orbax, save, save_orbax
from moe_jax.sampling import Sampling
from moe_jax.streaming import Piece, stream

__all__ = [
    "Compiled",
    "Generated",
    "Model",
    "Piece",
    "RoutingTrace",
    "Sampling",
    "compile",
    "generate",
    "load",
    "load_orbax",
    "logits",
    "save",
    "save_orbax",
    "stream",
]
