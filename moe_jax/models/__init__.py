"""Families of models, by the `model_type` of their Hugging Face config.

Every family is one file with the same parts in the same order: what is unusual about it, `Config`, blocks that only it has, the
model (`build`), and the weight table (`rules`).
"""

from types import ModuleType
from typing import Any

from moe_jax.models import mixtral, olmoe, qwen2_moe, qwen3_moe, switch_transformers

FAMILIES: dict[str, ModuleType] = {
    "mixtral": mixtral,
    "olmoe": olmoe,
    "qwen2_moe": qwen2_moe,
    "qwen3_moe": qwen3_moe,
    "switch_transformers": switch_transformers,
}


def family_of(hf_config: dict[str, Any]) -> ModuleType:
    """The family of a `config.json`.

    Raises:
      ValueError: there is no family for its `model_type`.
    """
    model_type = hf_config.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(
            f"expected a config whose model_type is one of {', '.join(FAMILIES)}, got {model_type!r}: "
            "this architecture is not supported yet (docs/adding_a_model.md shows how to add it)"
        )
    return FAMILIES[model_type]


__all__ = ["FAMILIES", "family_of"]
