"""Checkpoints: Hugging Face safetensors in and out by weight tables, Orbax, the hub.

Knows no model: parameters are flat dicts by dotted path.
"""

from moe_jax.checkpoints.errors import CheckpointError
from moe_jax.checkpoints.load import load_parameters
from moe_jax.checkpoints.rules import Copy, Ignored, Rule
from moe_jax.checkpoints.save import save_parameters

__all__ = ["CheckpointError", "Copy", "Ignored", "Rule", "load_parameters", "save_parameters"]
