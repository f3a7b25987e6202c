"""Beam search equals transformers' generate(num_beams=k, do_sample=False), token for token and score for score."""

import pytest
import torch

from llmctl.core.errors import NonFiniteError
from llmctl.core.infer.beam import Beam, BeamParams, BeamStep, beam_search
from llmctl.core.infer.torch_executor import TorchExecutor
from tests.core.infer.tiny import pair

PROMPT = (5, 9, 200, 31, 7)
PAD = 255  # not 0: transformers takes 0 for "none given" and pads with an end token


def ours(family: str, params: BeamParams, eos: tuple[int, ...], max_new_tokens: int) -> tuple[Beam, ...]:
    executor = TorchExecutor(pair(family)[1].model)
    *steps, beams = beam_search(executor, PROMPT, params, max_new_tokens=max_new_tokens, eos_ids=frozenset(eos), chunk_tokens=3)
    assert all(isinstance(step, BeamStep) for step in steps)
    assert not isinstance(beams, BeamStep)
    return beams


def theirs(family: str, params: BeamParams, eos: tuple[int, ...], max_new_tokens: int) -> tuple[list[tuple[int, ...]], list[float]]:
    ids = torch.tensor([PROMPT])
    early: bool | str = {"true": True, "false": False}.get(params.early_stopping, "never")
    result = pair(family)[0].generate(
        ids,
        attention_mask=torch.ones_like(ids),
        num_beams=params.num_beams,
        num_return_sequences=params.num_beams,
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(eos) or None,
        pad_token_id=PAD,
        length_penalty=params.length_penalty,
        early_stopping=early,
        repetition_penalty=params.repetition_penalty,
        return_dict_in_generate=True,
        output_scores=True,
    )
    return [tuple(row) for row in result.sequences[:, len(PROMPT) :].tolist()], result.sequences_scores.tolist()


def likely_ends(family: str) -> tuple[int, ...]:
    """Ids that the model is apt to choose, so that beams end at different lengths."""
    beams = ours(family, BeamParams(num_beams=4), (), 8)
    return tuple(dict.fromkeys([beams[0].tokens[3], beams[1].tokens[5], beams[3].tokens[-1]]))


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("early_stopping", ["true", "false", "never"])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0, -1.0])
@pytest.mark.parametrize("num_beams", [2, 3, 5])
@pytest.mark.parametrize("with_ends", [True, False])
def test_equal_to_transformers(family: str, early_stopping: str, length_penalty: float, num_beams: int, with_ends: bool) -> None:
    params = BeamParams(num_beams=num_beams, length_penalty=length_penalty, early_stopping=early_stopping)  # type: ignore[arg-type]
    eos = likely_ends(family) if with_ends else ()
    found = ours(family, params, eos, 14)
    rows, scores = theirs(family, params, eos, 14)
    for beam, row, score in zip(found, rows, scores, strict=True):
        assert beam.tokens == row[: len(beam.tokens)]
        assert set(row[len(beam.tokens) :]) <= {PAD}, "the rest is padding"
        assert beam.score == pytest.approx(score, abs=2e-5, rel=1e-6)


def test_repetition_penalty_equals_transformers() -> None:
    params = BeamParams(num_beams=3, repetition_penalty=1.5)
    rows, _ = theirs("llama", params, (), 12)
    assert [beam.tokens for beam in ours("llama", params, (), 12)] == rows


def test_a_signal_gives_the_best_open_text() -> None:
    executor = TorchExecutor(pair("llama")[1].model)
    asked = iter(range(100))
    *steps, beams = beam_search(executor, PROMPT, BeamParams(num_beams=2), max_new_tokens=50, stop=lambda: 2 if next(asked) == 5 else None)
    assert len(steps) == 6
    assert isinstance(beams, tuple)
    assert isinstance(steps[-1], BeamStep)
    assert [beam.tokens for beam in beams] == [steps[-1].best]


def test_nan_is_refused() -> None:
    class Broken(TorchExecutor):
        def step(self, *args, **options):  # type: ignore[no-untyped-def]
            return super().step(*args, **options) * float("nan")

    with pytest.raises(NonFiniteError, match="token 0"):
        list(beam_search(Broken(pair("llama")[1].model), PROMPT, BeamParams(num_beams=2), max_new_tokens=5))
