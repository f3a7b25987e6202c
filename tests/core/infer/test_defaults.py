"""What is done when nothing was said: sampling as generation_config.json asks, as transformers reads it."""

from typing import Any

import pytest

from llmctl.core.errors import InputError, UsageError
from llmctl.core.infer.defaults import TEMPERATURE, TOP_P, merged, recommended
from llmctl.core.infer.sampler import SamplingParams

OURS = SamplingParams(temperature=TEMPERATURE, top_p=TOP_P)


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({}, OURS),
        ({"eos_token_id": 2, "temperature": None}, OURS),
        ({"repetition_penalty": 1.1}, SamplingParams(temperature=TEMPERATURE, top_p=TOP_P, repetition_penalty=1.1)),
        ({"do_sample": True}, SamplingParams()),
        ({"temperature": 0.6, "top_p": 0.9}, SamplingParams(temperature=0.6, top_p=0.9)),
        ({"do_sample": True, "top_k": 20, "min_p": 0.1}, SamplingParams(top_k=20, min_p=0.1)),
        ({"top_k": 0, "temperature": 1}, SamplingParams()),
        ({"do_sample": False, "temperature": 0.6}, SamplingParams(temperature=0)),
    ],
)
def test_the_models_own_advice_counts(generation: dict[str, Any], expected: SamplingParams) -> None:
    assert recommended(generation) == expected


@pytest.mark.parametrize("wrong", [{"temperature": "hot"}, {"top_p": 7}, {"top_k": 2.5}])
def test_nonsense_in_the_file_names_the_file(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"generation_config\.json"):
        recommended(wrong)


def test_what_is_given_wins_and_the_rest_stays() -> None:
    base = SamplingParams(temperature=0.6, top_k=20, repetition_penalty=1.1)
    assert merged(base, {"top_k": 5}) == SamplingParams(temperature=0.6, top_k=5, repetition_penalty=1.1)
    with pytest.raises(UsageError, match="top_k"):
        merged(base, {"top_k": -5})
