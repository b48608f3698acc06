"""Writes the tables of README.md that come from code, between their markers.

Example: python scripts/make_tables.py
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import plot_generate

from moe_jax import description

README = Path(__file__).parents[1] / "README.md"
MEASURED = README.parent / "docs" / "benchmarks" / "h200"


def with_table(text: str, name: str, table: str) -> str:
    """The text with what stands between `<!-- name -->` and `<!-- end name -->` replaced.

    Raises:
      ValueError: the markers are not there.
    """
    marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
    if not marked.search(text):
        raise ValueError(f"expected the markers <!-- {name} --> and <!-- end {name} --> in {README.name}, got none")
    return marked.sub(lambda match: match[1] + table + match[2], text)


def tables() -> dict[str, str]:
    """Every table of README.md, by name."""
    return {
        "families": description.as_markdown(description.families()),
        "speed": "\n".join(plot_generate.summary_table(MEASURED)) + "\n",
    }


def main() -> None:
    for name, table in tables().items():
        README.write_text(with_table(README.read_text(), name, table))
    print(f"wrote the tables of {README}")


if __name__ == "__main__":
    main()
