"""Types of the measuring scripts' flags: what is wrong ends a script before it measures, not after minutes.

parser.add_argument("--tokens", nargs="+", type=count)
"""

from __future__ import annotations

import argparse
import math
import pathlib


def count(text: str, least: int = 1) -> int:
    """A whole number of at least `least`."""
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
    return int(text)


def two_or_more(text: str) -> int:
    """New tokens: the time per token is a difference."""
    return count(text, least=2)


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected seconds above 0, got {text!r}")
    return value


def shape(text: str) -> tuple[int, int]:
    """Batch and length, such as 8x2048."""
    batch, _, length = text.partition("x")
    return count(batch), count(length)


def require_writable(path: pathlib.Path) -> None:
    """Ends the script if records cannot be appended to the file.

    Raises:
      SystemExit: with what was expected.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise SystemExit(f"expected a file that can be written for the records, got {path}: {error}") from None
