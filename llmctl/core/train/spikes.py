"""When a loss is a spike. Knows numbers; knows no loop and no model."""

import math
import statistics
from collections.abc import Sequence

WINDOW = 50
"""Losses that one is compared with."""
_FEWEST = 20
_DEVIATIONS = 8.0
_LEAST_RISE = 0.1
_NORMAL = 1.4826
"""The median absolute deviation of a normal distribution, times this, is its standard deviation."""


class Spikes:
    """Remembers the last losses; its `recent` is all its state, plain numbers that a checkpoint keeps."""

    def __init__(self, recent: Sequence[float] = ()) -> None:
        self.recent = list(recent)[-WINDOW:]

    def limit(self) -> float:
        """The largest loss that is no spike: the median of the last ones and 8 of their robust deviations, at least a tenth above.

        Medians, because a spike must not make the next one look usual. Infinite while fewer than 20 are known.
        """
        if len(self.recent) < _FEWEST:
            return math.inf
        median = statistics.median(self.recent)
        deviation = _NORMAL * statistics.median(abs(loss - median) for loss in self.recent)
        return median + max(_DEVIATIONS * deviation, _LEAST_RISE * abs(median))

    def is_one(self, loss: float) -> bool:
        """Whether `loss` is a spike; one that is not is remembered."""
        if loss > self.limit():
            return True
        self.recent = [*self.recent, loss][-WINDOW:]
        return False
