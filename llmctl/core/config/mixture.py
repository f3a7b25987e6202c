"""What `--data DIR` and `--data DIR=PART` say. Stdlib only; knows no data."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmctl.core.errors import UsageError


@dataclass(frozen=True)
class MixturePart:
    """A packed folder and its part of the tokens; None where none was given."""

    path: Path
    weight: float | None


def parse_mixture(values: Sequence[Path]) -> tuple[MixturePart, ...]:
    """Each `DIR` or `DIR=PART`; a folder whose own name ends so is taken as it is. Raises UsageError."""
    parts = tuple(_parse(Path(value)) for value in values)
    weighted = sum(part.weight is not None for part in parts)
    if weighted not in (0, len(parts)):
        bare = next(part.path for part in parts if part.weight is None)
        raise UsageError(f"--data {bare}: others have a part (DIR=0.7), so this one needs one too")
    paths = [part.path for part in parts]
    if len(set(paths)) < len(paths):
        raise UsageError(f"--data {next(path for path in paths if paths.count(path) > 1)}: named twice; give it once, with its whole part")
    return parts


def _parse(value: Path) -> MixturePart:
    head, sign, tail = str(value).rpartition("=")
    if not sign or not head or value.is_dir():
        return MixturePart(value, None)
    try:
        weight = float(tail)
    except ValueError:
        return MixturePart(value, None)
    if not math.isfinite(weight) or weight <= 0:
        raise UsageError(f"--data {value}: a part is a number above 0, as in DIR=0.7")
    return MixturePart(Path(head), weight)
