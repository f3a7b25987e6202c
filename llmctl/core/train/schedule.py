"""Learning-rate schedules as pure functions of the step. Knows no optimizer."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A linear warm-up, then a fall to `final_fraction` of the peak by the last of `num_steps` steps."""

    num_steps: int
    warmup_steps: int = 0
    kind: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    decay_fraction: float = 0.2
    """wsd: the part of `num_steps` over which the rate falls, on a line (Hu et al. 2024, MiniCPM; Hägele et al. 2024)."""
    final_fraction: float = 0.0


def lr_scale(step: int, schedule: Schedule) -> float:
    """What the peak learning rate is multiplied by at `step`, counted from 0.

    The warm-up rises to 1 at its last step; a fall ends one step after the last, so that no step is wasted at rate 0.
    """
    s = schedule
    if step < s.warmup_steps:
        return (step + 1) / s.warmup_steps
    if s.kind == "constant":
        return 1.0
    start = s.warmup_steps
    if s.kind == "wsd":
        start = max(start, s.num_steps - max(1, round(s.decay_fraction * s.num_steps)))
    if step < start:
        return 1.0
    progress = min(1.0, (step - start) / max(1, s.num_steps - start))
    shape = 0.5 * (1.0 + math.cos(math.pi * progress)) if s.kind == "cosine" else 1.0 - progress
    return s.final_fraction + (1.0 - s.final_fraction) * shape
