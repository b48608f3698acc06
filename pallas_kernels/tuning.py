"""Measured tile settings per device, as tables beside this file. Without one, kernels use their analytic defaults.

`tuned/nvidia_h200.json` is what `scripts/tune_kernels.py` wrote on an NVIDIA H200:

    {"device": "NVIDIA H200", "jax": "0.11.2", "date": "...",
     "settings": {"experts.decode": {"E128 A8 F768 D2048": {"1": {"stages": 4}, "16": {"stages": 6}}}}}

The innermost keys are token counts: a call with 20 tokens takes the settings of 16, the nearest lower bucket.
"""

from __future__ import annotations

import functools
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

from pallas_kernels import dispatch

FOLDER = pathlib.Path(__file__).parent / "tuned"


def lookup(
    op: str, shape_key: str, tokens: int, *, tile: Callable[[int], int] = lambda tokens: 0
) -> dict[str, Any] | None:
    """The tuned settings of `op` for a shape, or None where nothing was tuned at or below this token count.

    `tile` says how many tokens a kernel makes room for: settings tuned for another tile may not fit into shared memory, and
    are passed over. Example: `lookup("experts.decode", "E128 A8 F768 D2048", 20)` is `{"stages": 6}` with the table above.
    """
    buckets = _table(table_path(dispatch.current_device().kind)).get(op, {}).get(shape_key, {})
    lower = [bucket for bucket in buckets if bucket <= tokens and tile(bucket) == tile(tokens)]
    return buckets[max(lower)] if lower else None


def table_path(device_kind: str) -> pathlib.Path:
    """`NVIDIA H200` -> `tuned/nvidia_h200.json`, which need not exist."""
    return FOLDER / (re.sub(r"[^a-z0-9]+", "_", device_kind.lower()).strip("_") + ".json")


@functools.cache
def _table(path: pathlib.Path) -> dict[str, dict[str, dict[int, dict[str, Any]]]]:
    return parse(path.read_text(), source=str(path)) if path.exists() else {}


def parse(text: str, *, source: str) -> dict[str, dict[str, dict[int, dict[str, Any]]]]:
    """A table's `settings`, with token counts as ints.

    Raises:
      ValueError: the text is not such a table; the message names `source` and the entry.
    """
    try:
        settings = json.loads(text)["settings"]
        return {
            op: {shape_key: _buckets(buckets, f"{op} {shape_key}") for shape_key, buckets in shapes.items()}
            for op, shapes in settings.items()
        }
    except (json.JSONDecodeError, KeyError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{source}: expected {{'settings': {{op: {{shape: {{tokens: {{name: value}}}}}}}}}}, got {error!r}. "
            "Write it anew with scripts/tune_kernels.py."
        ) from error


def _buckets(buckets: dict[str, Any], where: str) -> dict[int, dict[str, Any]]:
    for tokens, settings in buckets.items():
        if not tokens.isdecimal() or int(tokens) < 1:
            raise ValueError(f"{where}: expected a token count of at least 1, got {tokens!r}")
        if not isinstance(settings, dict) or not all(isinstance(value, int | str) for value in settings.values()):
            raise ValueError(f"{where}, {tokens} tokens: expected whole numbers or words by name, got {settings!r}")
    return {int(tokens): settings for tokens, settings in buckets.items()}
