"""Penalties on tokens that a text has used already. Knows logits and token ids; knows no model.

Definitions:
repetition (Keskar et al. 2019, as in `transformers`): for every token of the prompt or the answer, a negative logit is
multiplied by the penalty, any other divided by it; 1 is neutral.
presence and frequency (the OpenAI API): logit - presence * (used at all) - frequency * (times used), counted over the
answer alone, so that a word of the question may be said; 0 is neutral.
The repetition penalty comes first.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray


class History:
    """The tokens of one text, counted. `add` takes constant time; the arrays are made when they are asked for."""

    def __init__(self, prompt: Iterable[int]) -> None:
        self._seen = dict.fromkeys(prompt)
        self._counts: dict[int, int] = {}

    def add(self, token: int) -> None:
        """Count a generated token."""
        self._seen.setdefault(token)
        self._counts[token] = self._counts.get(token, 0) + 1

    def followed_by(self, tokens: Iterable[int]) -> "History":
        """A copy with more generated tokens."""
        copy = History(())
        copy._seen, copy._counts = dict(self._seen), dict(self._counts)
        for token in tokens:
            copy.add(token)
        return copy

    def seen(self) -> NDArray[np.int64]:
        """Distinct ids of prompt and answer."""
        return np.fromiter(self._seen, dtype=np.int64, count=len(self._seen))

    def generated(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Distinct ids of the answer, and how often each occurs."""
        count = len(self._counts)
        return np.fromiter(self._counts, dtype=np.int64, count=count), np.fromiter(self._counts.values(), dtype=np.int64, count=count)


def penalise(logits: NDArray[Any], repetition: float, presence: float, frequency: float, history: History) -> NDArray[Any]:
    """Logits (V,) with the penalties applied, in the precision of `logits`; the same array when all are neutral."""
    if repetition == 1 and presence == 0 and frequency == 0:
        return logits
    logits = logits.copy()
    if repetition != 1:
        ids = history.seen()
        scores = logits[ids]
        logits[ids] = np.where(scores < 0, scores * repetition, scores / repetition)
    if presence != 0 or frequency != 0:
        ids, counts = history.generated()
        logits[ids] -= (presence + frequency * counts).astype(logits.dtype)
    return logits
