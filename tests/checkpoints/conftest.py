"""A toy model: two layers, four experts, tied embeddings; written by the safetensors library."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from moe_jax.checkpoints import Copy, Ignored, Rule

D, N, H, E, F, V = 8, 2, 3, 4, 5, 16
HF_LAYER, LAYER = "model.layers.{layer}.", "layers.{layer}."
EXPERT = HF_LAYER + "mlp.experts.{expert}."

RULES = (
    Rule("model.embed_tokens.weight", "embedding.weight_VD"),
    Rule(HF_LAYER + "self_attn.q_proj.weight", LAYER + "attention.q_NHD", "(n h) d -> n h d"),
    Rule(HF_LAYER + "self_attn.o_proj.weight", LAYER + "attention.o_DNH", "d (n h) -> d n h"),
    Rule(EXPERT + "gate_proj.weight", LAYER + "moe.up_EGFD", at=("{expert}", 0)),
    Rule(EXPERT + "up_proj.weight", LAYER + "moe.up_EGFD", at=("{expert}", 1)),
    Rule(EXPERT + "down_proj.weight", LAYER + "moe.down_EDF", at=("{expert}",)),
    Rule(HF_LAYER + "mlp.experts.gate_up_proj", LAYER + "moe.up_EGFD", "e (g f) d -> e g f d"),
    Rule(HF_LAYER + "mlp.experts.down_proj", LAYER + "moe.down_EDF"),
    Copy("lm_head.weight", "embedding.weight_VD"),
    Ignored(HF_LAYER + "self_attn.rotary_emb.inv_freq", "computed from the config"),
)


class Toy:
    """`tensors` by hub name, `parameters` by path: the same numbers, arranged by hand. `write` makes checkpoints."""

    rules = RULES

    def __init__(self, directory: Path):
        self.directory = directory
        rng = np.random.default_rng(0)
        self.tensors = {"model.embed_tokens.weight": _random(rng, V, D)}
        self.parameters = {"embedding.weight_VD": self.tensors["model.embed_tokens.weight"]}
        for layer in range(2):
            hf, ours = f"model.layers.{layer}.", f"layers.{layer}."
            q, o = _random(rng, N * H, D), _random(rng, D, N * H)
            gate, up, down = _random(rng, E, F, D), _random(rng, E, F, D), _random(rng, E, D, F)
            self.tensors |= {hf + "self_attn.q_proj.weight": q, hf + "self_attn.o_proj.weight": o}
            for expert in range(E):
                for name, stacked in (("gate", gate), ("up", up), ("down", down)):
                    self.tensors[f"{hf}mlp.experts.{expert}.{name}_proj.weight"] = stacked[expert]
            self.parameters |= {
                ours + "attention.q_NHD": q.reshape(N, H, D),
                ours + "attention.o_DNH": o.reshape(D, N, H),
                ours + "moe.up_EGFD": np.stack([gate, up], axis=1),
                ours + "moe.down_EDF": down,
            }

    def abstract(self, dtype="float32", sharding=None) -> dict[str, jax.ShapeDtypeStruct]:
        return {
            path: jax.ShapeDtypeStruct(values.shape, dtype, sharding=sharding)
            for path, values in self.parameters.items()
        }

    def fused(self) -> dict[str, np.ndarray]:
        """The tensors in the other spelling."""
        tensors = {name: values for name, values in self.tensors.items() if "experts" not in name}
        for layer in range(2):
            up_EGFD = self.parameters[f"layers.{layer}.moe.up_EGFD"]
            tensors[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = up_EGFD.reshape(E, 2 * F, D)
            tensors[f"model.layers.{layer}.mlp.experts.down_proj"] = self.parameters[f"layers.{layer}.moe.down_EDF"]
        return tensors

    def write(self, tensors: dict[str, np.ndarray] | None = None) -> Path:
        save_file(self.tensors if tensors is None else tensors, self.directory / "model.safetensors")
        return self.directory

    def write_shards(self) -> Path:
        """Two shards, a layer each: `0.safetensors` has the embedding too."""
        weight_map = {name: "1.safetensors" if "layers.1" in name else "0.safetensors" for name in self.tensors}
        for shard in ("0.safetensors", "1.safetensors"):
            held = {name: values for name, values in self.tensors.items() if weight_map[name] == shard}
            save_file(held, self.directory / shard)
        (self.directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return self.directory


def _random(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    directory = tmp_path / "toy"
    directory.mkdir()
    return Toy(directory)
