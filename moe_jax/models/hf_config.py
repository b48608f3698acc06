"""Reading a Hugging Face `config.json` so that no key is overlooked: each is read, named as irrelevant, or refused."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from moe_jax.layers.rope import Rope
from pallas_kernels import Activation

# Keys that every transformers config may carry and that change no logit at inference.
_IRRELEVANT = """
    _attn_implementation _attn_implementation_autoset _name_or_path add_cross_attention architectures attention_dropout auto_map
    bad_words_ids begin_suppress_tokens chunk_size_feed_forward cross_attention_hidden_size diversity_penalty do_sample
    early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id id2label initializer_range is_decoder label2id length_penalty max_length min_length
    model_type no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states
    output_router_logits output_scores prefix pretraining_tp problem_type pruned_heads remove_invalid_values repetition_penalty
    return_dict return_dict_in_generate router_aux_loss_coef router_jitter_noise sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torchscript
    transformers_version typical_p use_bfloat16 use_cache
"""
IRRELEVANT = frozenset(_IRRELEVANT.split())

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}


def as_token_ids(value: Any, what: str) -> tuple[int, ...]:
    """One token id or a list of them, as files write them, as a tuple.

    Raises:
      ValueError: it is neither.
    """
    ids = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not all(isinstance(each, int) and not isinstance(each, bool) and abs(each) < 2**31 for each in ids):
        raise ValueError(f"expected {what} to be a token id or a list of them, got {value!r}")
    return ids


class HFConfig:
    """The keys of one `config.json`, ticked off as they are read.

    Example: `hf = HFConfig(d, "olmoe"); width = hf.take("hidden_size"); ...; hf.finish()` raises if a key was left over.
    """

    def __init__(self, keys: dict[str, Any], model_type: str):
        if keys.get("model_type", model_type) != model_type:
            raise ValueError(f"expected a config of model_type {model_type!r}, got {keys['model_type']!r}")
        if keys.get("quantization_config"):
            raise ValueError(
                f"{model_type}: expected unquantised weights, got quantization_config; convert them to bfloat16 first"
            )
        self._keys = dict(keys)
        self._seen = {"quantization_config"}
        self.model_type = model_type

    def take(self, name: str, default: Any = ..., *aliases: str) -> Any:
        """The value of `name` (or of its other spellings); null counts as absent. Without a default it must be there."""
        self._seen.update((name, *aliases))
        for key in (name, *aliases):
            if self._keys.get(key) is not None:
                return self._keys[key]
        if default is ...:
            raise ValueError(f"{self.model_type}: config key {name!r} is missing")
        return default

    def has(self, name: str) -> bool:
        """Whether the key is there at all, be it null."""
        return name in self._keys

    def positive(self, name: str, default: Any = ..., *aliases: str, most: int | None = None) -> int:
        """A whole number of at least 1, and of at most `most`."""
        value = self.take(name, default, *aliases)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (most is not None and value > most):
            bound = "of at least 1" if most is None else f"from 1 to {most}"
            raise self._unexpected(name, f"a whole number {bound}", value)
        return value

    def number(self, name: str, default: float) -> float:
        """A finite number above 0."""
        value = self.take(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self._unexpected(name, "a number above 0", value)
        return value

    def flag(self, name: str, default: bool) -> bool:
        """true or false."""
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise self._unexpected(name, "true or false", value)
        return value

    def _unexpected(self, name: str, expected: str, value: Any) -> ValueError:
        return ValueError(f"{self.model_type}: expected config key {name!r} to be {expected}, got {value!r}")

    def irrelevant(self, *names: str) -> None:
        """Names keys that this family's Hugging Face code reads in training only, or not at all."""
        self._seen.update(names)

    def refuse(self, name: str, *, unless: Collection[Any], why: str) -> None:
        """Refuses any value of a key but those that change nothing."""
        value = self.take(name, None)
        if value is not None and value not in unless:
            expected = " or ".join(repr(each) for each in unless)
            raise ValueError(f"{self.model_type}: expected config key {name!r} to be {expected}, got {value!r}: {why}")

    def activation(self, name: str = "hidden_act", default: str = "silu") -> Activation:
        """The activation, in the words of `pallas_kernels.experts`."""
        value = self.take(name, default)
        if not isinstance(value, str) or value not in _ACTIVATIONS:
            raise self._unexpected(name, f"one of {', '.join(_ACTIVATIONS)}", value)
        return _ACTIVATIONS[value]

    def rope(self, *, head_dim: int, max_position_embeddings: int, default_theta: float) -> Rope:
        """The rotary embedding, from `rope_parameters` or from `rope_scaling` and `rope_theta`."""
        theta = self.number("rope_theta", default_theta)
        self.refuse("partial_rotary_factor", unless=(1, 1.0), why="this family rotates whole heads")
        parameters = self.take("rope_parameters", None)
        scaling = self.take("rope_scaling", None)
        for name, value in (("rope_parameters", parameters), ("rope_scaling", scaling)):
            if not isinstance(value, dict | None):
                raise self._unexpected(name, "an object, or null", value)
        try:
            return Rope.from_hf(
                scaling or parameters,
                rope_theta=theta,
                head_dim=head_dim,
                max_position_embeddings=max_position_embeddings,
            )
        except ValueError as error:
            raise ValueError(f"{self.model_type}: {error}") from None

    def token_ids(self, name: str) -> tuple[int, ...]:
        """One token id, several, or none: always a tuple."""
        return as_token_ids(self.take(name, ()), f"{self.model_type}: config key {name!r}")

    def finish(self) -> None:
        """Refuses the config if a key was neither read nor named.

        Raises:
          ValueError: the unknown keys.
        """
        self.irrelevant(
            "dtype", "torch_dtype", "bos_token_id", "pad_token_id", "decoder_start_token_id", "is_encoder_decoder"
        )
        unknown = sorted(set(self._keys) - self._seen - IRRELEVANT)
        if unknown:
            listed = ", ".join(f"{key}={self._keys[key]!r}" for key in unknown)
            raise ValueError(
                f"{self.model_type}: unknown config keys: {listed}. A key that is ignored may change the result: "
                "remove it from config.json if it does not, or add it to the family's Config."
            )
