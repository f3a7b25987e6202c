"""Token sampling: pure functions of logits, parameters and one uniform number. Knows no model, cache or tokenizer.

Legend: V vocabulary size, K tokens that the filters keep.

The order is that of `transformers`: penalties, temperature, top-k, top-p, min-p, each seeing what the one before left.
The token is found by inverting the cumulative distribution in the order of token ids, with a uniform number that comes
from a counter-based generator: a sampled token is a function of (logits, parameters, seed, item, token index) and of
nothing else. Arithmetic is float64 throughout, so that the same logits give the same token on every machine.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmctl.core.errors import NonFiniteError, UsageError
from llmctl.core.infer.penalties import History, penalise

FloatArray = NDArray[np.floating[Any]]
IntArray = NDArray[np.int64]

_FIRST_SORTED = 256
"""Top-p sorts this many candidates first, and more only when they do not hold the mass: a full sort of 150,000 costs 10 ms."""
_WORD = (1 << 64) - 1


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose the next token. The defaults are neutral: they sample from the model's own distribution.

    temperature: divides the logits; 0 takes the most likely token (ties: the lowest id) and ignores the filters.
    top_k: keep the k most likely tokens, and those tied with the last of them; None keeps all.
    top_p: keep the fewest most likely tokens whose probabilities reach p together (Holtzman et al. 2020).
    min_p: drop tokens less likely than min_p times the most likely one (Nguyen et al. 2024).
    repetition_penalty, presence_penalty, frequency_penalty: see `penalties`.

    Raises UsageError that names the parameter that is out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value)):
                raise UsageError(f"{name}: {value!r} is not a finite number")
        if self.top_k is not None and (isinstance(self.top_k, bool) or not isinstance(self.top_k, int)):
            raise UsageError(f"top_k: {self.top_k!r} is not a whole number")
        rules = (
            (self.temperature >= 0, "temperature", "at least 0"),
            (self.top_k is None or self.top_k >= 1, "top_k", "at least 1"),
            (self.top_p is None or 0 < self.top_p <= 1, "top_p", "above 0 and at most 1"),
            (self.min_p is None or 0 <= self.min_p <= 1, "min_p", "from 0 to 1"),
            (self.repetition_penalty > 0, "repetition_penalty", "above 0"),
        )
        for kept, name, rule in rules:
            if not kept:
                raise UsageError(f"{name}: {getattr(self, name)} is out of range; it must be {rule}")

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken, so that no randomness and no seed enter."""
        return self.temperature == 0

    @property
    def has_penalties(self) -> bool:
        """Whether the tokens so far change the logits."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


def sample(logits: FloatArray, params: SamplingParams, uniform: float, *, history: History | None = None) -> int:
    """The next token for `logits` (V,) and one `uniform` number in [0, 1).

    `history` holds the tokens so far, for the penalties. Raises NonFiniteError when the logits hold NaN or +inf, or
    nothing but -inf; a single -inf (a masked token) is a token that is never chosen.
    """
    check_finite(logits)
    if history is not None:
        logits = penalise(logits, params.repetition_penalty, params.presence_penalty, params.frequency_penalty, history)
    if params.is_greedy:
        return int(np.argmax(logits))
    ids, weights = _kept(logits, params)
    return int(ids[_invert(weights, uniform)])


def probabilities(logits: FloatArray, params: SamplingParams, *, history: History | None = None) -> NDArray[np.float64]:
    """The distribution that `sample` draws from, (V,) float64, summing to 1; for temperature 0 a single 1."""
    check_finite(logits)
    if history is not None:
        logits = penalise(logits, params.repetition_penalty, params.presence_penalty, params.frequency_penalty, history)
    result = np.zeros(logits.shape[0], dtype=np.float64)
    if params.is_greedy:
        result[int(np.argmax(logits))] = 1.0
        return result
    ids, weights = _kept(logits, params)
    result[ids] = weights / weights.sum()
    return result


def check_finite(logits: FloatArray) -> None:
    """Raise NonFiniteError unless the largest logit is a finite number (a NaN anywhere makes it NaN)."""
    largest = float(logits.max())
    if not math.isfinite(largest):
        raise NonFiniteError(f"the model's logits are not finite (largest: {largest})")


def log_softmax(logits: FloatArray) -> FloatArray:
    """Natural logarithms of the probabilities over the last axis, in the precision of `logits`."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def _kept(logits: FloatArray, params: SamplingParams) -> tuple[IntArray, NDArray[np.float64]]:
    """Ids that survive the filters, ascending (K,), and their unnormalised probabilities (K,), the largest being 1."""
    vocab_size = logits.shape[0]
    if params.top_k is not None and params.top_k < vocab_size:
        threshold = np.partition(logits, vocab_size - params.top_k)[vocab_size - params.top_k]
        ids = np.flatnonzero(logits >= threshold)
        weights = logits[ids].astype(np.float64)
    else:
        ids = np.arange(vocab_size)
        weights = logits.astype(np.float64)
    # in place, since a vocabulary of 150,000 is worth it; shifted before it is divided, since a temperature of 1e-300
    # must give 0 and -inf, not inf - inf
    weights -= weights.max()
    if params.temperature != 1:
        with np.errstate(over="ignore"):
            weights /= params.temperature
    np.exp(weights, out=weights)
    if params.top_p is not None and params.top_p < 1:
        chosen = _nucleus(weights, params.top_p)
        ids, weights = ids[chosen], weights[chosen]
    if params.min_p is not None and params.min_p > 0:
        chosen = np.flatnonzero(weights >= params.min_p)  # the largest weight is exactly 1
        ids, weights = ids[chosen], weights[chosen]
    return ids, weights


def _nucleus(weights: NDArray[np.float64], top_p: float) -> IntArray:
    """Indices, ascending, of the fewest largest weights that hold `top_p` of their sum; ties go to the lower index."""
    target = top_p * float(weights.sum())
    num_candidates = _FIRST_SORTED
    candidates = np.arange(weights.shape[0])
    while num_candidates < weights.shape[0]:
        threshold = np.partition(weights, weights.shape[0] - num_candidates)[weights.shape[0] - num_candidates]
        found = np.flatnonzero(weights >= threshold)
        if float(weights[found].sum()) >= target:
            candidates = found
            break
        num_candidates *= 8
    order = candidates[np.argsort(-weights[candidates], kind="stable")]
    mass = np.cumsum(weights[order])
    # a token stays when those before it fall short of the target, so at least one stays
    num_kept = min(int(np.searchsorted(mass, target, side="left")) + 1, order.shape[0])
    return np.sort(order[:num_kept])


def _invert(weights: NDArray[np.float64], uniform: float) -> int:
    """The index i with cdf[i-1] <= uniform * total < cdf[i]; never one whose weight is 0."""
    cumulative = np.cumsum(weights)
    index = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    if index < weights.shape[0]:
        return index
    return int(np.flatnonzero(weights)[-1])  # uniform * total was rounded up to the total


def stream_key(item_id: int | str, sample_index: int = 0) -> int:
    """The 64-bit number that stands for sample `sample_index` of item `item_id` among the random streams of a seed."""
    name = json.dumps([item_id, sample_index], ensure_ascii=True).encode()
    return int.from_bytes(hashlib.sha256(name).digest()[:8], "big")


def uniform_at(seed: int, key: int, token_index: int) -> float:
    """The uniform number in [0, 1) for token `token_index` of the stream (`seed`, `key`), each below 2**64.

    Philox 4x64-10 (Salmon et al. 2011) with the key (seed, key) and the counter (token_index, 0, 0, 0), as numpy
    numbers its blocks, which counts up first; the upper 53 bits of the first word. In whole numbers of Python this takes
    a third of the time of a numpy.random.Philox made for one draw, and a start does without the import of numpy.random.
    """
    first, second, third, fourth = token_index + 1 & _WORD, token_index + 1 >> 64, 0, 0
    for _ in range(10):
        left, right = first * 0xD2E7470EE14C6C93, third * 0xCA5A826395121157
        first, second, third, fourth = right >> 64 ^ second ^ seed, right & _WORD, left >> 64 ^ fourth ^ key, left & _WORD
        seed, key = seed + 0x9E3779B97F4A7C15 & _WORD, key + 0xBB67AE8584CAA73B & _WORD
    return (first >> 11) * 2.0**-53
