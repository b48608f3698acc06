"""Writes the Hugging Face reference fixtures: tiny random checkpoints and what `transformers` computes with them.

    pip install "torch==2.13.*" "transformers==5.23.*" safetensors
    python tests/families/make_fixtures.py                                     # all cases, a few minutes on a CPU
    python tests/families/make_fixtures.py --only mixtral/yarn --out /tmp/out  # one of them

This is the only file of the project that needs torch; tests read what it wrote (see fixtures/README.md).
Every number comes from the model read back from the files of the case by `from_pretrained`, never from the model that
wrote them, so that config.json and the tensors are the whole truth.

Weights are random, norms and biases too, so that a missed parameter shows. A seed is taken when no decision is a near
tie: `GREEDY_MARGIN` between the two best logits of every greedy step, `router_margin` between the last chosen expert's
logit and the first one left out. Otherwise two correct implementations could disagree, and the next seed is tried. It
is tried as well when generation falls into repeating itself, because such tokens would come out right from a wrong
cache too, and when an expert of a Switch model never gets a token.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import shutil
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, DynamicCache, EncoderDecoderCache

LENGTHS = (1, 7, 33)
NEW_TOKENS = 48
DECODER_TOKENS = 16
GREEDY_MARGIN = 1e-3
LEAST_DISTINCT = 6
MAX_ATTEMPTS = 400

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One fixture: `config` are the arguments of the HF config class, over the `BASE` of the family.

    keys: how config.json is written. "new": as transformers v5 does. "old": `rope_theta`, `rope_scaling`,
      `torch_dtype`, no `layer_types`. "minimal": old, and only the keys named here: HF's defaults decide the rest.
    names: "hub" (one tensor per expert, tied tensors once: what save_pretrained writes), "memory" (HF's in-memory
      names: experts fused in `gate_up_proj` and `down_proj`) or "duplicated" (tied tensors under each of their names).
    weights_of: the case with the same model, whose weights are repeated here under other names.
    """

    family: str
    name: str
    config: dict[str, Any] = field(default_factory=dict)
    keys: str = "new"
    names: str = "hub"
    weights_of: str = ""
    extra_json: dict[str, Any] = field(default_factory=dict)
    max_shard_size: str = "1GB"
    router_margin: float = 1e-4
    must_drop: bool = False

    @property
    def config_arguments(self) -> dict[str, Any]:
        base = {} if self.keys == "minimal" else BASE[self.family]
        return {**base, **self.config, "eos_token_id": None}


# ---------------------------------------------------------------- cases

_DECODER = dict(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    initializer_range=0.2,
)
BASE: dict[str, dict[str, Any]] = {
    "mixtral": dict(_DECODER, intermediate_size=12, num_local_experts=4, num_experts_per_tok=2),
    "olmoe": dict(_DECODER, intermediate_size=12, num_experts=6, num_experts_per_tok=3, num_key_value_heads=4),
    "qwen2_moe": dict(
        _DECODER,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=20,
        intermediate_size=28,
        num_experts=4,
        num_experts_per_tok=2,
    ),
    "qwen3_moe": dict(_DECODER, moe_intermediate_size=12, intermediate_size=28, num_experts=4, num_experts_per_tok=2),
    "switch_transformers": dict(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=16,
        num_heads=4,
        num_layers=2,
        num_decoder_layers=2,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        num_experts=4,
        decoder_start_token_id=0,
    ),
}


def rope(rope_type: str, theta: float = 10000.0, **parameters: Any) -> dict[str, Any]:
    return {"rope_type": rope_type, "rope_theta": theta, **parameters}


LLAMA3 = rope(
    "llama3", 500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=32)

MIXTRAL = [
    Case("mixtral", "gqa", dict(rope_parameters=rope("default", 100.0))),
    Case("mixtral", "gqa_fused_names", dict(rope_parameters=rope("default", 100.0)), names="memory", weights_of="gqa"),
    # Absent: rope_theta (1e6, not 1e4), num_key_value_heads (8), num_local_experts (8), num_experts_per_tok (2).
    Case(
        "mixtral",
        "defaults",
        dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=8, intermediate_size=8),
        keys="minimal",
    ),
    Case("mixtral", "sliding_window", dict(sliding_window=8, rope_parameters=rope("default", 5000.0)), keys="old"),
    Case(
        "mixtral",
        "mqa_head_dim_sharded",
        dict(num_key_value_heads=1, head_dim=16, hidden_size=48),
        max_shard_size="60KB",
    ),
    Case(
        "mixtral",
        "top1_five_experts_gelu_tied",
        dict(
            num_experts_per_tok=1,
            num_local_experts=5,
            hidden_act="gelu",
            tie_word_embeddings=True,
            num_key_value_heads=4,
        ),
    ),
    Case(
        "mixtral",
        "all_six_experts_relu_eps",
        dict(num_experts_per_tok=6, num_local_experts=6, hidden_act="relu", rms_norm_eps=0.1, num_hidden_layers=3),
    ),
    Case("mixtral", "linear_rope", dict(rope_parameters=rope("linear", factor=3.0)), keys="old"),
    Case(
        "mixtral",
        "dynamic_rope",
        dict(rope_parameters=rope("dynamic", 100.0, factor=4.0), max_position_embeddings=24, head_dim=8),
    ),
    # The margin is wider than bfloat16 moves the logits here: its error then is rounding, not a token sent elsewhere.
    Case("mixtral", "yarn", dict(rope_parameters=YARN, head_dim=12), router_margin=0.02),
    Case("mixtral", "llama3_sliding_window", dict(rope_parameters=LLAMA3, sliding_window=20)),
]

OLMOE = [
    Case("olmoe", "mha"),
    Case("olmoe", "mha_fused_names", names="memory", weights_of="mha"),
    # Absent: num_key_value_heads (= heads), num_experts (64), num_experts_per_tok (8), norm_topk_prob (false).
    Case(
        "olmoe",
        "defaults",
        dict(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=4),
        keys="minimal",
    ),
    Case("olmoe", "gqa_norm_topk", dict(num_key_value_heads=2, norm_topk_prob=True, hidden_act="gelu_pytorch_tanh")),
    Case(
        "olmoe",
        "clip_qkv_bias",
        dict(clip_qkv=0.6, attention_bias=True, rope_parameters=rope("default", 700.0)),
        keys="old",
    ),
    Case(
        "olmoe",
        "mqa_bias_tied_sharded",
        dict(num_key_value_heads=1, attention_bias=True, tie_word_embeddings=True),
        max_shard_size="40KB",
    ),
    Case("olmoe", "yarn_attention_factor", dict(rope_parameters=dict(YARN, attention_factor=1.5)), keys="old"),
    Case(
        "olmoe",
        "dynamic_rope_clip",
        dict(rope_parameters=rope("dynamic", factor=2.0), max_position_embeddings=40, clip_qkv=1.0),
    ),
    Case("olmoe", "llama3", dict(rope_parameters=LLAMA3), keys="old"),
    Case(
        "olmoe",
        "all_five_experts_gelu_eps",
        dict(num_experts=5, num_experts_per_tok=5, hidden_act="gelu", rms_norm_eps=0.1),
    ),
    Case("olmoe", "top1_relu", dict(num_experts=7, num_experts_per_tok=1, hidden_act="relu", num_hidden_layers=3)),
]

QWEN2_MOE = [
    Case("qwen2_moe", "shared_expert"),
    Case("qwen2_moe", "shared_expert_fused_names", names="memory", weights_of="shared_expert"),
    # Absent: num_experts (60), num_experts_per_tok (4), norm_topk_prob (false), qkv_bias (true), rope_theta (1e4).
    # Present and without effect, as in hub files: the sliding window, switched off.
    Case(
        "qwen2_moe",
        "defaults",
        dict(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=4,
            moe_intermediate_size=4,
            shared_expert_intermediate_size=12,
            intermediate_size=20,
            use_sliding_window=False,
            max_window_layers=1,
        ),
        keys="minimal",
        extra_json=dict(sliding_window=8),
    ),
    Case(
        "qwen2_moe",
        "no_bias_norm_topk_tied",
        dict(
            qkv_bias=False,
            norm_topk_prob=True,
            tie_word_embeddings=True,
            num_key_value_heads=4,
            rope_parameters=rope("default", 1e6),
        ),
        keys="old",
    ),
    # Sparse where (layer + 1) % 2 == 0 and not listed: layers 3 and 5 of six.
    Case(
        "qwen2_moe",
        "sparse_step_mlp_only",
        dict(num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[1], num_experts=3),
    ),
    # No layer_types: even layers below max_window_layers slide, here 0 and 2 of four.
    Case(
        "qwen2_moe",
        "sliding_max_window_layers",
        dict(num_hidden_layers=4, num_experts=3, use_sliding_window=True, sliding_window=6, max_window_layers=3),
        keys="old",
    ),
    Case(
        "qwen2_moe",
        "sliding_layer_types",
        dict(
            num_hidden_layers=3,
            use_sliding_window=True,
            sliding_window=9,
            layer_types=["full_attention", "sliding_attention", "sliding_attention"],
        ),
    ),
    Case(
        "qwen2_moe",
        "yarn_mscale_no_truncate",
        dict(rope_parameters=dict(YARN, mscale=1.3, mscale_all_dim=0.7, beta_fast=6.0, beta_slow=0.5, truncate=False)),
    ),
    Case(
        "qwen2_moe",
        "dynamic_rope",
        dict(rope_parameters=rope("dynamic", factor=2.0), max_position_embeddings=16),
        keys="old",
    ),
    Case("qwen2_moe", "head_dim_mqa_gelu", dict(head_dim=16, num_key_value_heads=1, hidden_act="gelu")),
    Case(
        "qwen2_moe",
        "top1_five_experts_sharded",
        dict(num_experts=5, num_experts_per_tok=1, hidden_act="relu", rms_norm_eps=0.1),
        max_shard_size="50KB",
    ),
    Case(
        "qwen2_moe",
        "all_experts_norm_topk",
        dict(num_experts_per_tok=4, norm_topk_prob=True, rope_parameters=rope("linear", factor=2.5)),
    ),
]

QWEN3_MOE = [
    Case("qwen3_moe", "head_dim", dict(head_dim=16, norm_topk_prob=True)),
    Case(
        "qwen3_moe",
        "head_dim_fused_names",
        dict(head_dim=16, norm_topk_prob=True),
        names="memory",
        weights_of="head_dim",
    ),
    # The keys of the hub's Qwen3-30B-A3B; those without effect get values that would show.
    Case(
        "qwen3_moe",
        "hub_keys",
        dict(head_dim=12, norm_topk_prob=True, rope_parameters=rope("default", 1e6)),
        keys="old",
        extra_json=dict(max_window_layers=1, sliding_window=4, attention_dropout=0.5, rope_scaling=None),
    ),
    # Absent: num_key_value_heads (4), head_dim (hidden / heads), num_experts (128), num_experts_per_tok (8).
    Case(
        "qwen3_moe",
        "defaults",
        dict(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=8, moe_intermediate_size=2),
        keys="minimal",
    ),
    Case(
        "qwen3_moe", "attention_bias_tied", dict(attention_bias=True, tie_word_embeddings=True, num_key_value_heads=1)
    ),
    # All layers slide: max_window_layers is not read.
    Case(
        "qwen3_moe",
        "sliding_window",
        dict(use_sliding_window=True, sliding_window=5, max_window_layers=1, num_hidden_layers=3),
        keys="old",
    ),
    Case(
        "qwen3_moe",
        "sparse_step_mlp_only",
        dict(num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3], num_experts=3),
    ),
    Case(
        "qwen3_moe",
        "yarn_betas",
        dict(head_dim=16, rope_parameters=dict(YARN, beta_fast=4.0, beta_slow=2.0)),
        keys="old",
    ),
    Case(
        "qwen3_moe",
        "dynamic_rope",
        dict(rope_parameters=rope("dynamic", 1000.0, factor=3.0), max_position_embeddings=33, head_dim=12),
    ),
    Case("qwen3_moe", "llama3", dict(rope_parameters=LLAMA3, head_dim=16)),
    Case(
        "qwen3_moe",
        "longrope",
        dict(
            max_position_embeddings=160,
            rope_parameters=rope(
                "longrope",
                original_max_position_embeddings=40,
                short_factor=[1.0, 1.1, 1.3, 1.6],
                long_factor=[1.5, 2.5, 4.0, 8.0],
            ),
        ),
        router_margin=0.02,  # as mixtral's yarn
    ),
    Case(
        "qwen3_moe",
        "top1_norm_sharded",
        dict(
            num_experts=5,
            num_experts_per_tok=1,
            norm_topk_prob=True,
            hidden_act="gelu_pytorch_tanh",
            num_key_value_heads=4,
        ),
        max_shard_size="50KB",
    ),
    Case(
        "qwen3_moe",
        "all_experts_relu_eps",
        dict(num_experts=6, num_experts_per_tok=6, hidden_act="relu", rms_norm_eps=0.1),
    ),
]

# What the hub's switch-base-* files say besides; transformers v5 reads none of it.
SWITCH_HUB_KEYS = dict(feed_forward_proj="relu", is_gated_act=False, router_type="tokens_masked")

SWITCH_TRANSFORMERS = [
    Case("switch_transformers", "tied"),
    Case("switch_transformers", "tied_duplicated_names", names="duplicated", weights_of="tied"),
    # Absent: tie_word_embeddings (true), expert_capacity (64), dense_act_fn (relu), relative_attention_* (32, 128).
    Case(
        "switch_transformers",
        "hub_keys",
        dict(
            vocab_size=64,
            d_model=32,
            d_kv=8,
            d_ff=16,
            num_heads=4,
            num_layers=4,
            num_decoder_layers=2,
            num_sparse_encoder_layers=2,
            num_sparse_decoder_layers=1,
            num_experts=3,
            decoder_start_token_id=0,
        ),
        keys="minimal",
        extra_json=SWITCH_HUB_KEYS,
    ),
    Case("switch_transformers", "untied_start_token", dict(tie_word_embeddings=False, decoder_start_token_id=5)),
    Case("switch_transformers", "capacity_drops", dict(expert_capacity=3, num_experts=3), must_drop=True),
    Case(
        "switch_transformers",
        "capacity_one_all_sparse",
        dict(expert_capacity=1, num_sparse_encoder_layers=2, num_sparse_decoder_layers=2),
        must_drop=True,
    ),
    # The margin is more than a step of bfloat16, in which the router computes, at |logit| < 8.
    Case(
        "switch_transformers",
        "router_bfloat16_bias",
        dict(router_dtype="bfloat16", router_bias=True),
        router_margin=0.04,
    ),
    Case(
        "switch_transformers",
        "router_bias_gelu",
        dict(router_bias=True, dense_act_fn="gelu", router_ignore_padding_tokens=True),
    ),
    # Zero sparse encoder layers still make layer 1 sparse; two of three in the decoder make all three sparse.
    Case(
        "switch_transformers",
        "zero_and_non_dividing",
        dict(
            num_layers=3, num_sparse_encoder_layers=0, num_decoder_layers=3, num_sparse_decoder_layers=2, num_experts=3
        ),
    ),
    # More sparse layers than layers make none; two of five make layers 1 and 3.
    Case(
        "switch_transformers",
        "dense_encoder_deep_decoder",
        dict(
            num_layers=1, num_sparse_encoder_layers=3, num_decoder_layers=5, num_sparse_decoder_layers=2, num_experts=3
        ),
    ),
    Case(
        "switch_transformers",
        "buckets_d_kv_gelu_new",
        dict(
            relative_attention_num_buckets=10,
            relative_attention_max_distance=14,
            d_kv=5,
            num_heads=3,
            dense_act_fn="gelu_new",
            layer_norm_epsilon=0.1,
        ),
    ),
    Case(
        "switch_transformers",
        "five_experts_silu_sharded",
        dict(num_experts=5, dense_act_fn="silu", tie_word_embeddings=False),
        max_shard_size="60KB",
    ),
]

CASES = MIXTRAL + OLMOE + QWEN2_MOE + QWEN3_MOE + SWITCH_TRANSFORMERS


# ---------------------------------------------------------------- the checkpoint


def is_switch(case: Case) -> bool:
    return case.family == "switch_transformers"


def auto_class(case: Case) -> type:
    return AutoModelForSeq2SeqLM if is_switch(case) else AutoModelForCausalLM


def first_seed(case: Case) -> int:
    """A case that repeats another's weights starts its search where the other did, and so ends there too."""
    return zlib.crc32(f"{case.family}/{case.weights_of or case.name}".encode()) % 1_000_000


def standard_deviation(name: str, parameter: torch.Tensor, config: Any) -> float:
    """Large enough that logits and routing spread, small enough that rounding does not grow from layer to layer."""
    fan_in = parameter.shape[-1]
    if name.startswith("shared.") or "relative_attention_bias" in name or name.endswith("coder.embed_tokens.weight"):
        return 1.0
    if "embed_tokens" in name:
        return 0.3  # small against what the layers add: a tied model would only repeat its input
    if "EncDecAttention.o" in name:  # nearly the same at every step, so all steps would say the same
        return 1.0 / math.sqrt(fan_in)
    if name.endswith("bias"):
        return 0.3
    if is_router(name) or name.startswith("lm_head"):
        return 3.0 / math.sqrt(fan_in)
    if name.endswith(("Attention.q.weight", "Attention.k.weight")):  # T5 does not divide the scores by sqrt(d_kv)
        return 1.2 / math.sqrt(fan_in) / config.d_kv**0.25
    if any(part in name for part in ("down_proj", "o_proj", ".wo.", "Attention.o.")):
        return 2.0 / math.sqrt(fan_in)
    return 1.2 / math.sqrt(fan_in)


def is_router(name: str) -> bool:
    return name.endswith(("mlp.gate.weight", "router.classifier.weight"))


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if "norm" in name:
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
            if name == "decoder.final_layer_norm.weight":  # a tied model with positive weights repeats its input
                parameter.mul_(torch.randint(2, parameter.shape, generator=generator) * 2 - 1)
        else:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * standard_deviation(name, parameter, model.config))


def write_checkpoint(case: Case, folder: Path, seed: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    config = AutoConfig.for_model(case.family, **copy.deepcopy(case.config_arguments))
    model = auto_class(case).from_config(config, dtype=torch.float32)
    randomize(model, seed)
    model.save_pretrained(folder, max_shard_size=case.max_shard_size)
    (folder / "generation_config.json").unlink()
    if case.names != "hub":
        save_other_names(case, model, folder)
    write_config(case, folder / "config.json")


def save_other_names(case: Case, model: torch.nn.Module, folder: Path) -> None:
    tensors = model.state_dict()
    if case.names == "memory":
        saved_twice = set(model.all_tied_weights_keys)
        tensors = {name: tensor for name, tensor in tensors.items() if name not in saved_twice}
    separate = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(separate, folder / "model.safetensors", metadata={"format": "pt"})


def write_config(case: Case, path: Path) -> None:
    written = json.loads(path.read_text())
    if case.keys != "new":
        written = with_old_keys(case, written)
    if case.keys == "minimal":
        kept = {*case.config_arguments, "model_type", "architectures", "torch_dtype"}
        written = {key: value for key, value in written.items() if key in kept}
    path.write_text(json.dumps({**written, **case.extra_json}, indent=2, sort_keys=True) + "\n")


def with_old_keys(case: Case, written: dict[str, Any]) -> dict[str, Any]:
    """What transformers v4 would have written. Its yarn and linear files say `type`, its llama3 files `rope_type`."""
    old = {key: value for key, value in written.items() if key not in ("rope_parameters", "dtype", "layer_types")}
    old["torch_dtype"] = written["dtype"]
    old["transformers_version"] = "4.51.0"
    if case.family == "qwen3_moe":
        old["num_experts"] = old.pop("num_local_experts")
    if "rope_parameters" in written:
        scaling = dict(written["rope_parameters"])
        old["rope_theta"] = scaling.pop("rope_theta")
        rope_type = scaling.pop("rope_type")
        type_key = "rope_type" if rope_type == "llama3" else "type"
        old["rope_scaling"] = None if rope_type == "default" else {type_key: rope_type, **scaling}
    return old


def load_checkpoint(case: Case, folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """With the code of the modelling file itself: the faster replacements refuse small experts, and round otherwise."""
    plain = {} if is_switch(case) else {"experts_implementation": "eager"}
    model, info = auto_class(case).from_pretrained(
        folder, dtype=dtype, output_loading_info=True, attn_implementation="eager", **plain
    )
    assert not any(info.values()), f"{folder}: tensors did not load: {info}"
    return model.eval()


# ---------------------------------------------------------------- what the model computes


class RouterRecord:
    """What every router of a model computed while it was recorded, by module name, one entry a call."""

    def __init__(self, model: torch.nn.Module, top_k: int):
        self.top_k = top_k
        self.logits: dict[str, list[torch.Tensor]] = {}
        self.experts: dict[str, list[torch.Tensor]] = {}
        for name, module in model.named_modules():
            if type(module).__name__.endswith(("TopKRouter", "Top1Router")):
                module.register_forward_hook(lambda _, __, output, name=name: self.record(name, output))

    def record(self, name: str, output: tuple[torch.Tensor, ...]) -> None:
        if output[0].ndim == 3:  # Switch: one-hot without the dropped tokens, probability, logits
            mask_TE, _, logits_TE = (part[0] for part in output)
            experts_TA = torch.where(mask_TE.sum(-1) > 0, mask_TE.argmax(-1), -1)[:, None]
        else:
            logits_TE, _, experts_TA = output
        self.logits.setdefault(name, []).append(logits_TE.float())
        self.experts.setdefault(name, []).append(experts_TA.int())

    def margin(self) -> float:
        """The least difference between the last chosen expert's logit and the first left out."""
        margins = [math.inf]
        for calls in self.logits.values():
            for logits_TE in calls:
                if self.top_k < logits_TE.shape[-1]:
                    best = logits_TE.sort(dim=-1, descending=True).values
                    margins.append((best[:, self.top_k - 1] - best[:, self.top_k]).min().item())
        return min(margins)


def all_experts_used(records: list[RouterRecord]) -> bool:
    used = {name: set[int]() for name in records[0].experts}
    for record in records:
        for name, calls in record.experts.items():
            used[name] |= set(torch.cat(calls).flatten().tolist())
    return all(used[name] >= set(range(logits[0].shape[-1])) for name, logits in records[0].logits.items())


def recorded_copy(model: torch.nn.Module) -> tuple[torch.nn.Module, RouterRecord]:
    """A fresh copy for every run, because dynamic rope remembers the longest sequence that it has seen."""
    fresh = copy.deepcopy(model)
    return fresh, RouterRecord(fresh, getattr(model.config, "num_experts_per_tok", 1))


@torch.no_grad()
def teacher_forced(
    case: Case, model: torch.nn.Module, prompt: torch.Tensor, decoder: torch.Tensor
) -> tuple[torch.Tensor, RouterRecord]:
    fresh, record = recorded_copy(model)
    decoder_argument = {"decoder_input_ids": decoder[None]} if is_switch(case) else {}
    logits = fresh(input_ids=prompt[None], use_cache=False, **decoder_argument).logits[0]
    return logits.float(), record


@torch.no_grad()
def greedy(case: Case, model: torch.nn.Module, prompt: torch.Tensor) -> tuple[torch.Tensor, float, RouterRecord]:
    fresh, record = recorded_copy(model)
    start = switch_start(case) if is_switch(case) else {}
    out = fresh.generate(
        prompt[None],
        attention_mask=torch.ones_like(prompt)[None],
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        use_cache=True,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        **start,
    )
    best = torch.cat(out.logits).topk(2).values
    tokens = out.sequences[0, -NEW_TOKENS:]
    assert len(out.logits) == NEW_TOKENS, "generation stopped early"
    return tokens, (best[:, 0] - best[:, 1]).min().item(), record


def switch_start(case: Case) -> dict[str, Any]:
    """A cache that grows by itself: the one `generate` would make has as many layers as the encoder."""
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    return {"decoder_start_token_id": case.config_arguments["decoder_start_token_id"], "past_key_values": cache}


def draw_tokens(case: Case, seed: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed + 1)
    vocab_size = case.config_arguments["vocab_size"]
    prompts = [torch.randint(vocab_size, (length,), generator=generator) for length in LENGTHS]
    decoder_BU = torch.randint(vocab_size, (len(LENGTHS), DECODER_TOKENS), generator=generator)
    decoder_BU[:, 0] = case.config_arguments.get("decoder_start_token_id", 0)
    return prompts, decoder_BU


def padded(rows: list[torch.Tensor], length: int) -> torch.Tensor:
    out = rows[0].new_zeros(len(rows), length, *rows[0].shape[1:])
    for row, values in zip(out, rows, strict=True):
        row[: len(values)] = values
    return out


def router_tensors(record: RouterRecord) -> Tensors:
    """Router logits [L, T, E] and chosen experts [L, T, A] of the sparse layers in order, for each stack of Switch."""
    tensors: Tensors = {}
    for stack in ("encoder.", "decoder.", "model."):
        layers = [name for name in record.logits if name.startswith(stack)]
        prefix = "" if stack == "model." else stack.replace(".", "_")
        if layers:
            tensors[f"{prefix}router_logits"] = torch.stack([record.logits[name][0] for name in layers])
            tensors[f"{prefix}router_experts"] = torch.stack([record.experts[name][0] for name in layers])
    return tensors


def relative_error(values: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    return ((values - reference).norm() / reference.norm()).reshape(1)


def compute(case: Case, folder: Path, seed: int) -> tuple[Tensors, dict[str, float]]:
    """The reference tensors, and how far the nearest decisions were from going the other way."""
    model = load_checkpoint(case, folder)
    low_precision = load_checkpoint(case, folder, torch.bfloat16)
    prompts, decoder_BU = draw_tokens(case, seed)
    forced = [teacher_forced(case, model, *pair) for pair in zip(prompts, decoder_BU, strict=True)]
    rounded = [teacher_forced(case, low_precision, *pair)[0] for pair in zip(prompts, decoder_BU, strict=True)]
    generated = [greedy(case, model, prompt) for prompt in prompts]
    logits = [logits for logits, _ in forced]
    tensors = {
        "prompts": padded(prompts, max(LENGTHS)).int(),
        "lengths": torch.tensor(LENGTHS, dtype=torch.int32),
        "logits": padded(logits, DECODER_TOKENS if is_switch(case) else max(LENGTHS)),
        "greedy_tokens": torch.stack([tokens for tokens, _, _ in generated]).int(),
        "bfloat16_relative_error": relative_error(torch.cat(rounded), torch.cat(logits)),
        **router_tensors(forced[-1][1]),
    }
    if is_switch(case):
        tensors["decoder_tokens"] = decoder_BU.int()
    records = [record for *_, record in [*forced, *generated]]
    if is_switch(case) and not all_experts_used(records):
        return tensors, {"greedy": 0.0, "router": 0.0}
    margins = {
        "greedy": min(margin for _, margin, _ in generated),
        "router": min(record.margin() for record in records),
    }
    return tensors, margins


# ---------------------------------------------------------------- a case, and all of them


def dropped(tensors: Tensors, stack: str) -> int:
    return int((tensors[f"{stack}_router_experts"] < 0).sum())


def is_accepted(case: Case, tensors: Tensors, margins: dict[str, float]) -> bool:
    if margins["greedy"] < GREEDY_MARGIN or margins["router"] < case.router_margin:
        return False
    if any(len(tokens.unique()) < LEAST_DISTINCT for tokens in tensors["greedy_tokens"]):
        return False
    return not case.must_drop or (dropped(tensors, "encoder") > 0 and dropped(tensors, "decoder") > 0)


def make(case: Case, out: Path) -> str:
    folder = out / case.family / case.name
    for seed in range(first_seed(case), first_seed(case) + MAX_ATTEMPTS):
        write_checkpoint(case, folder, seed)
        tensors, margins = compute(case, folder, seed)
        if is_accepted(case, tensors, margins):
            break
    else:
        raise RuntimeError(f"{case.family}/{case.name}: none of {MAX_ATTEMPTS} seeds will do; the last had {margins}")
    made = {"seed": seed, "torch": torch.__version__, "transformers": transformers.__version__}
    made |= {f"{name}_margin": f"{margin:.3g}" for name, margin in margins.items()}
    # One key: safetensors writes several in an order that changes from run to run.
    metadata = {"made": json.dumps(made)}
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "expected.safetensors", metadata=metadata)
    check_repeated_weights(case, out, seed)
    size = sum(path.stat().st_size for path in folder.iterdir())
    attempts = seed - first_seed(case) + 1
    error = tensors["bfloat16_relative_error"].item()
    return f"{case.family}/{case.name}: {size / 1000:.0f} kB, {attempts} seeds, bfloat16 error {error:.3f}, {made}"


def check_repeated_weights(case: Case, out: Path, seed: int) -> None:
    if case.weights_of:
        with safe_open(out / case.family / case.weights_of / "expected.safetensors", "pt") as other:
            assert json.loads(other.metadata()["made"])["seed"] == seed, (
                f"{case.name} needs {case.weights_of} made anew first"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "fixtures")
    parser.add_argument("--only", default="", help="make the cases whose family/name starts with this")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)  # a fixed order of summation
    for case in CASES:
        if f"{case.family}/{case.name}".startswith(arguments.only):
            print(make(case, arguments.out), flush=True)


if __name__ == "__main__":
    main()
