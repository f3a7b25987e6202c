"""Metrics against numpy and hand-made cases."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmctl.core.evals.metrics import METRICS, ItemScore, aggregate, average, best_index, item_values, mean_and_stderr, perplexity

_FINITE = st.floats(-1e3, 1e3)


@given(st.lists(_FINITE, min_size=2, max_size=30))
def test_mean_and_standard_error_are_numpys(values: list[float]) -> None:
    mean, stderr = mean_and_stderr(values)
    assert mean == pytest.approx(np.mean(values), abs=1e-9)
    assert stderr == pytest.approx(np.std(values, ddof=1) / math.sqrt(len(values)), abs=1e-9)


def test_one_item_has_no_standard_error() -> None:
    assert average("acc", [1.0]).stderr is None
    assert perplexity("perplexity", [-2.0]).stderr is None


@given(st.lists(_FINITE, min_size=1, max_size=9))
def test_the_first_of_equals_wins_as_in_numpy(values: list[float]) -> None:
    assert best_index(values) == int(np.argmax(values))
    assert best_index([1.0, 2.0, 2.0]) == 1


def test_perplexity_and_its_error_agree_with_a_bootstrap() -> None:
    draw = np.random.default_rng(0)
    values = draw.normal(-3.0, 1.0, size=400)
    metric = perplexity("perplexity", values.tolist())
    samples = np.exp(-draw.choice(values, size=(4000, 400)).mean(axis=1))
    assert metric.value == pytest.approx(math.exp(-values.mean()))
    assert metric.stderr == pytest.approx(samples.std(), rel=0.1)
    assert not metric.higher_is_better


def test_a_hopeless_model_has_infinite_perplexity_rather_than_an_error() -> None:
    assert perplexity("perplexity", [-800.0, -900.0]).value == math.inf


def test_the_three_accuracies_divide_by_nothing_characters_and_bytes() -> None:
    # log-likelihoods -4, -6, -6.6: best as they are 0; per character (1, 2, 3) 2; per byte (1, 6, 3) 1.
    score = ItemScore((-4.0, -6.0, -6.6), (False, False, False), ("a", "狐狸", "fox"), gold=0)
    names = ("acc", "acc_norm", "acc_bytes")
    assert item_values("multiple_choice", names, score) == {"acc": 1.0, "acc_norm": 0.0, "acc_bytes": 0.0}
    for gold, expected in ((2, (0.0, 1.0, 0.0)), (1, (0.0, 0.0, 1.0))):
        moved = ItemScore(score.log_likelihoods, score.greedy, score.texts, gold)
        assert tuple(item_values("multiple_choice", names, moved).values()) == expected


def test_last_word_accuracy_is_greedy_agreement() -> None:
    items = [ItemScore((-1.0,), (True,), ("a",), 0), ItemScore((-3.0,), (False,), ("b",), 0)]
    values = [item_values("continuation", ("acc", "perplexity"), item) for item in items]
    acc, ppl = aggregate("continuation", ("acc", "perplexity"), values)
    assert acc.value == 0.5
    assert ppl.value == pytest.approx(math.exp(2.0))


def test_every_kind_names_its_metrics() -> None:
    assert set(METRICS) == {"multiple_choice", "continuation"}
