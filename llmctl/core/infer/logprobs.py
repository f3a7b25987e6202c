"""Log-probabilities of chosen tokens and of those that might have been chosen. Knows logits; knows no text under way."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmctl.core.infer.sampler import FloatArray, log_softmax

MAX_LOGPROBS = 1000
"""More of them for each token is a dump of the model, not something to look at."""


@dataclass(frozen=True)
class TokenLogprob:
    """Natural logarithms of a chosen token's probability and of the most likely ones', most likely first.

    They are the model's own, before penalties, temperature and filters.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log-probability), ties by id."""


def token_logprob(logits: FloatArray, token: int, num_top: int) -> TokenLogprob:
    """The log-probability of `token` under `logits` (V,), and the `num_top` largest, ties by id. In float64."""
    values = log_softmax(logits.astype(np.float64))
    num_top = min(num_top, values.shape[0])
    top: tuple[tuple[int, float], ...] = ()
    if num_top:
        threshold = np.partition(values, values.shape[0] - num_top)[values.shape[0] - num_top]
        found = np.flatnonzero(values >= threshold)
        order = found[np.argsort(-values[found], kind="stable")][:num_top]
        top = tuple((int(id), _finite(values[id])) for id in order)
    return TokenLogprob(_finite(values[token]), top)


def _finite(value: Any) -> float:
    """A log-probability that JSON can hold: a token that cannot be chosen has -9999, as in the OpenAI API."""
    return max(float(value), -9999.0)


def logprob_rows(tokens: Iterable[int], logprobs: Iterable[TokenLogprob], token_text: Callable[[int], str]) -> list[dict[str, Any]]:
    """What result rows say of each token: its id, text and log-probability, and the same of the most likely ones."""
    return [
        {
            "id": token,
            "token": token_text(token),
            "logprob": item.logprob,
            "top": [{"id": id, "token": token_text(id), "logprob": value} for id, value in item.top],
        }
        for token, item in zip(tokens, logprobs, strict=True)
    ]
