"""Scores of items and their means, with standard errors. Knows numbers; knows no task, model or file.

The definitions are lm-evaluation-harness's (`lm_eval/api/metrics.py`, `lm_eval/api/task.py`), so that numbers compare.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A mean over items. `stderr` is its standard error (None where one item does not give any)."""

    name: str
    value: float
    stderr: float | None
    higher_is_better: bool


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and the sample standard deviation (n - 1) over sqrt(n). `values` must not be empty."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def average(name: str, values: Sequence[float]) -> Metric:
    """The mean of one number an item (1.0 right, 0.0 wrong)."""
    mean, stderr = mean_and_stderr(values)
    return Metric(name, mean, stderr, higher_is_better=True)


def perplexity(name: str, log_likelihoods: Sequence[float]) -> Metric:
    """exp(-mean log-likelihood), natural logarithm. Its standard error is the mean's times the slope (delta method).

    lm-evaluation-harness bootstraps that error; the delta method agrees to first order and has no randomness.
    """
    mean, stderr = mean_and_stderr(log_likelihoods)
    value = exp_or_inf(-mean)
    return Metric(name, value, None if stderr is None else value * stderr, higher_is_better=False)


def exp_or_inf(power: float) -> float:
    """e ** power, infinite beyond what a float holds."""
    return math.exp(power) if power < 709.0 else math.inf


def best_index(values: Sequence[float]) -> int:
    """The index of the largest value; the first of equals, as numpy's argmax."""
    return max(range(len(values)), key=lambda index: (values[index], -index))


def is_best(log_likelihoods: Sequence[float], gold: int) -> float:
    """acc: 1.0 if the gold choice has the highest log-likelihood."""
    return float(best_index(log_likelihoods) == gold)


def is_best_by_length(log_likelihoods: Sequence[float], gold: int, lengths: Sequence[int]) -> float:
    """acc_norm (lengths in characters) and acc_bytes (in UTF-8 bytes): 1.0 if gold is best per unit of length.

    The length is that of the choice's text alone, without the delimiter before it.
    """
    return float(best_index([value / length for value, length in zip(log_likelihoods, lengths, strict=True)]) == gold)


@dataclass(frozen=True)
class ItemScore:
    """What a model gave for one item: a log-likelihood (nats) and greedy match for each of its continuations."""

    log_likelihoods: tuple[float, ...]
    greedy: tuple[bool, ...]
    texts: tuple[str, ...]
    """The continuations' texts without delimiter."""
    gold: int
    """Index of the right continuation; 0 where there is one only."""


_PER_ITEM: dict[str, Callable[[ItemScore], float]] = {
    "acc": lambda s: is_best(s.log_likelihoods, s.gold),
    "acc_norm": lambda s: is_best_by_length(s.log_likelihoods, s.gold, [len(text) for text in s.texts]),
    "acc_bytes": lambda s: is_best_by_length(s.log_likelihoods, s.gold, [len(text.encode()) for text in s.texts]),
    "exact": lambda s: float(s.greedy[s.gold]),
    "log_likelihood": lambda s: s.log_likelihoods[s.gold],
}

# Name in a task file -> (number of an item, mean over items).
_Aggregate = Callable[[str, Sequence[float]], Metric]
METRICS: dict[str, dict[str, tuple[Callable[[ItemScore], float], _Aggregate]]] = {
    "multiple_choice": {name: (_PER_ITEM[name], average) for name in ("acc", "acc_norm", "acc_bytes")},
    "continuation": {"acc": (_PER_ITEM["exact"], average), "perplexity": (_PER_ITEM["log_likelihood"], perplexity)},
}


def item_values(kind: str, names: Sequence[str], score: ItemScore) -> dict[str, float]:
    """Metric name -> this item's number (for "perplexity", its log-likelihood)."""
    return {name: METRICS[kind][name][0](score) for name in names}


def aggregate(kind: str, names: Sequence[str], values: Sequence[dict[str, float]]) -> tuple[Metric, ...]:
    """The metrics over all items, in the order of `names`. `values` must not be empty."""
    return tuple(METRICS[kind][name][1](name, [value[name] for value in values]) for name in names)


TEXT_METRICS = ("perplexity", "bits_per_byte", "nats_per_token")
"""What a text is scored by; see perplexity.py."""
