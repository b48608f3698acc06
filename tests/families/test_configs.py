"""Every config key is read, named as irrelevant, or refused by name."""

import json
from pathlib import Path

import pytest

from moe_jax import models

CONFIGS = Path(__file__).parents[2] / "configs"


def hf_config(name: str = "qwen3-30b-a3b", **changes):
    return json.loads((CONFIGS / f"{name}.json").read_text()) | changes


def read(config):
    return models.family_of(config).Config.from_hf(config)


@pytest.mark.parametrize("name", ["tinymistral-6x248m", "olmoe-1b-7b", "qwen1.5-moe-a2.7b", "qwen3-30b-a3b"])
def test_unknown_key_is_named(name):
    with pytest.raises(ValueError, match=r"unknown config keys: attention_sink_tokens=4\."):
        read(hf_config(name, attention_sink_tokens=4))


def test_unknown_model_type_lists_the_families():
    with pytest.raises(ValueError, match=r"one of mixtral, olmoe, qwen2_moe.*got 'llama'"):
        read({"model_type": "llama"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(rope_scaling={"rope_type": "su", "factor": 2}), r"expected rope_type to be one of default, .*got 'su'"),
        (dict(rope_scaling={"type": "yarn"}), r"rope type 'yarn': unknown keys \[\], missing keys \['factor'\]"),
        (dict(rope_scaling={"type": "linear", "factor": 2, "beta": 1}), r"unknown keys \['beta'\]"),
        (
            dict(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}),
            "partial_rotary_factor other than 1",
        ),
        (dict(partial_rotary_factor=0.5), "'partial_rotary_factor' to be 1 or 1.0, got 0.5"),
        (dict(hidden_act="mish"), "'hidden_act' to be one of silu, .*got 'mish'"),
        (dict(hidden_size=0), "'hidden_size' to be a whole number of at least 1, got 0"),
        (dict(num_experts="many"), "'num_experts' to be a whole number of at least 1, got 'many'"),
        (dict(quantization_config={"quant_method": "fp8"}), "expected unquantised weights, got quantization_config"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        read(hf_config(**changes))


def test_switch_refuses_gates_that_hugging_face_does_not_have():
    with pytest.raises(ValueError, match="'is_gated_act' to be False, got True"):
        read({"model_type": "switch_transformers", "is_gated_act": True})


def test_qwen2_windows_follow_hugging_face():
    """Even layers below max_window_layers slide, and only if use_sliding_window says so."""
    config = hf_config("qwen1.5-moe-a2.7b", use_sliding_window=True, max_window_layers=3, sliding_window=9)
    assert read(config).windows == (9, None, 9) + (None,) * 21
    assert read(config | dict(use_sliding_window=False)).windows == (None,) * 24
    with pytest.raises(ValueError, match="use_sliding_window is false"):
        read(config | dict(use_sliding_window=False, layer_types=["sliding_attention"] * 24))


def test_old_and_new_rope_keys_read_alike():
    yarn = {"factor": 4.0, "original_max_position_embeddings": 512}
    old = hf_config(rope_scaling={"type": "yarn", **yarn}, rope_theta=5e5)
    new = hf_config(rope_parameters={"rope_type": "yarn", "rope_theta": 5e5, **yarn})
    new.pop("rope_theta")
    new.pop("rope_scaling")
    assert read(old).rope == read(new).rope
