"""Text to token ids and back, by the tokenizer that comes with a checkpoint."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2

FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json")
TEMPLATE = "chat_template.jinja"
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Tokenizer:
    """A checkpoint's tokenizer, read by transformers; imported on first use because that takes a second or two.

    Raises:
      ValueError: transformers cannot read it.
    """

    def __init__(self, directory: Path):
        self._directory = directory
        with _quiet():
            from transformers import AutoTokenizer

            try:
                self._tokenizer: Any = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
            except Exception as error:  # whatever its many readers raise
                raise ValueError(
                    f"expected a tokenizer that transformers can read in {directory}, got {type(error).__name__}: {error}"
                ) from error

    @staticmethod
    def is_in(directory: Path) -> bool:
        return any((directory / name).exists() for name in FILES)

    def files(self) -> list[Path]:
        """The tokenizer's files, for copying beside a saved model."""
        names = (
            *FILES,
            "tokenizer_config.json",
            "special_tokens_map.json",
            "added_tokens.json",
            "merges.txt",
            TEMPLATE,
        )
        return [self._directory / name for name in names if (self._directory / name).exists()]

    def encode(self, text: str) -> list[int]:
        """Token ids, with the special tokens that the checkpoint puts around a text.

        Raises:
          ValueError: the text is not valid Unicode.
        """
        return self._ids(text)

    def _ids(self, text: str, **options: Any) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half a surrogate pair, as of bytes decoded with errors="surrogateescape"
            raise ValueError(f"expected text of valid Unicode, got {text[error.start]!r} in it: {error}") from None
        return list(self._tokenizer.encode(text, verbose=False, **options))  # prompts too long are refused elsewhere

    def decode(self, tokens: Sequence[int]) -> str:
        """Text without special tokens."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation, ready for the assistant's next turn, by the checkpoint's chat template.

        Raises:
          ValueError: the checkpoint has no chat template, or it takes no such conversation.
        """
        self.require_chat_template()
        try:
            text = self._tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        except jinja2.TemplateError as error:  # such as of templates that know no system message
            raise ValueError(f"the checkpoint's chat template refuses this conversation: {error}") from None
        return self._ids(text, add_special_tokens=False)

    def require_chat_template(self) -> None:
        """Raises `ValueError` where the checkpoint has no chat template."""
        if not self._tokenizer.chat_template:
            raise ValueError(
                "expected a checkpoint with a chat template, got one without: it was not trained for chat; "
                "use `moe-jax generate` or a chat- or instruction-tuned checkpoint"
            )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers from telling users that it found no PyTorch, which is not needed."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


class TextStream:
    """Turns a growing list of tokens into pieces of text, holding back bytes of an unfinished character."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._start = 0  # tokens before are emitted and no longer matter to how later ones read
        self._emitted = ""

    def add(self, token: int) -> str:
        """The text that this token completes, possibly none."""
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens[self._start :])
        if text.endswith(REPLACEMENT):
            return ""
        piece = text[len(self._emitted) :]
        # A token's text may depend on the one before it (a leading space): keep one as context.
        self._start = max(len(self._tokens) - 1, 0)
        self._emitted = self._tokenizer.decode(self._tokens[self._start :])
        return piece

    def finish(self) -> str:
        """What was held back, at the end."""
        return self._tokenizer.decode(self._tokens[self._start :])[len(self._emitted) :]
