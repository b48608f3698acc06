"""What is wrong with a checkpoint, all of it at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

SHOWN = 20


class CheckpointError(ValueError):
    """A checkpoint cannot be used. `problems` has all that is wrong, the message twenty of each kind and the count."""

    def __init__(self, headline: str, problems: Mapping[str, Sequence[str]] | None = None):
        kinds = problems or {}
        self.problems = tuple(f"{kind}: {each}" for kind, found in kinds.items() for each in found) or (headline,)
        lines = [headline]
        for kind, found in kinds.items():
            lines += [f"  {kind}: {each}" for each in found[:SHOWN]]
            if len(found) > SHOWN:
                lines.append(
                    f"  {kind}: {len(found) - SHOWN} more, {len(found)} in all (this error's `problems` has them)"
                )
        super().__init__("\n".join(lines))
