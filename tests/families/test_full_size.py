"""Models of full size, built without memory: their parameter counts are the published ones, and their rules fill them all."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from moe_jax import models
from moe_jax.checkpoints import Rule
from moe_jax.checkpoints.rules import spellings
from moe_jax.model import abstract_parameters

CONFIGS = Path(__file__).parents[2] / "configs"
PUBLISHED = {  # billions of parameters, as the model cards round them
    "tinymistral-6x248m": 1.0,
    "olmoe-1b-7b": 6.92,
    "qwen1.5-moe-a2.7b": 14.3,
    "qwen3-30b-a3b": 30.5,
    "mixtral-8x7b": 46.7,
}


def built(name: str):
    hf_config = json.loads((CONFIGS / f"{name}.json").read_text())
    family = models.family_of(hf_config)
    config = family.Config.from_hf(hf_config)
    return family, config, abstract_parameters(family, config, dtype="bfloat16")[1]


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts(name):
    _, _, abstract = built(name)
    billions = sum(leaf.size for leaf, _ in abstract.values()) / 1e9
    assert round(billions, len(str(PUBLISHED[name]).split(".")[1])) == PUBLISHED[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_parameter_has_a_rule_and_names_its_dimensions(name):
    family, config, abstract = built(name)
    for path, (leaf, dimensions) in abstract.items():
        assert spellings(path, leaf.shape, family.rules(config)), path
        assert len(dimensions) == len(leaf.shape), path


def test_a_layer_counted_by_hand():
    """TinyMistral: 32 query and 8 key/value heads of 32, 6 experts of 3 x 4096 x 1024, a gate, two norms."""
    _, _, abstract = built("tinymistral-6x248m")
    attention = (32 + 8 + 8 + 32) * 32 * 1024
    experts = 6 * 3 * 4096 * 1024 + 6 * 1024
    layer = sum(leaf.size for path, (leaf, _) in abstract.items() if path.startswith("layers.0."))
    assert layer == attention + experts + 2 * 1024


def test_rules_are_one_per_tensor():
    for name in PUBLISHED:
        family, config, _ = built(name)
        names = [rule.hf for rule in family.rules(config) if isinstance(rule, Rule)]
        assert len(names) == len(set(names))


def test_nothing_was_allocated():
    _, _, abstract = built("mixtral-8x7b")
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf, _ in abstract.values())
    assert np.prod(abstract["layers.0.feed_forward.up_EGFD"][0].shape) == 8 * 2 * 14336 * 4096
