"""Log-likelihoods against transformers in float64, one sequence at a time."""

import random
from pathlib import Path

import pytest
import torch

from llmctl.core.checkpoint import load_model
from llmctl.core.errors import NonFiniteError
from llmctl.core.evals.scoring import score_groups, score_sequences
from llmctl.core.evals.tokens import Group
from tests.core.evals.tiny import NUM_POSITIONS, load, oracle, write_gpt2, write_model

TOLERANCE = 2e-5
"""Nats per token: float32 against float64 on the tiny model."""


def _groups(seed: int, *, num_groups: int = 7, vocab_size: int = 250) -> list[Group]:
    draw = random.Random(seed)

    def ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw.randrange(vocab_size) for _ in range(draw.randint(low, high)))

    return [Group(ids(1, 30), tuple(ids(1, 9) for _ in range(draw.randint(1, 4)))) for _ in range(num_groups)]


def _reference(folder: Path, group: Group) -> list[tuple[float, bool]]:
    log_probabilities = oracle(folder)
    result = []
    for continuation in group.continuations:
        rows = log_probabilities(group.context + continuation[:-1])[len(group.context) - 1 :]
        wanted = torch.tensor(continuation)
        result.append((float(rows.gather(1, wanted[:, None]).sum()), bool((rows.argmax(1) == wanted).all())))
    return result


@pytest.mark.parametrize("seed", range(4))
def test_groups_with_shared_contexts_equal_transformers(model_dir: Path, seed: int) -> None:
    model, _ = load(model_dir)
    groups = _groups(seed)
    for group, scores in zip(groups, score_groups(model, groups), strict=True):
        for score, (log_likelihood, greedy), ids in zip(scores, _reference(model_dir, group), group.continuations, strict=True):
            assert score.log_likelihood == pytest.approx(log_likelihood, abs=TOLERANCE * len(ids))
            assert score.greedy == greedy


def test_learned_positions_are_shared_right_too(tmp_path: Path) -> None:
    folder = write_gpt2(tmp_path)
    groups = [*_groups(5), Group(tuple(range(60)), (tuple(range(5)), (1, 2)))]
    for group, scores in zip(groups, score_groups(load_model(folder).model, groups), strict=True):
        expected = [log_likelihood for log_likelihood, _ in _reference(folder, group)]
        assert [score.log_likelihood for score in scores] == pytest.approx(expected, abs=TOLERANCE * 9)


def test_the_likeliest_continuation_is_greedy(model_dir: Path) -> None:
    model, _ = load(model_dir)
    log_probabilities = oracle(model_dir)
    context = [5, 9, 77]
    best: list[int] = []
    for _ in range(3):
        best.append(int(log_probabilities(context + best)[-1].argmax()))
    other = [*best[:-1], (best[-1] + 1) % 250]
    ((right, wrong),) = score_groups(model, [Group(tuple(context), (tuple(best), tuple(other)))])
    assert right.greedy
    assert not wrong.greedy


def test_one_token_continuations_share_one_forward(model_dir: Path) -> None:
    model, _ = load(model_dir)
    group = Group((3, 4, 5), ((7,), (8,), (9,)))
    (scores,) = score_groups(model, [group])
    row = oracle(model_dir)((3, 4, 5))[-1]
    assert [score.log_likelihood for score in scores] == pytest.approx([float(row[i]) for i in (7, 8, 9)], abs=TOLERANCE)


def test_a_batch_may_fill_the_model_to_its_last_position(model_dir: Path) -> None:
    model, _ = load(model_dir)
    group = Group(tuple(range(60)), (tuple(range(5)), (1, 2)))
    assert group.longest == NUM_POSITIONS
    (scores,) = score_groups(model, [group])
    assert [score.log_likelihood for score in scores] == pytest.approx(
        [reference for reference, _ in _reference(model_dir, group)], abs=TOLERANCE * 5
    )


def test_neighbours_in_a_batch_change_nothing_but_rounding(model_dir: Path) -> None:
    model, _ = load(model_dir)
    groups = _groups(11)
    together = score_groups(model, groups)
    for group, scores in zip(groups, together, strict=True):
        (alone,) = score_groups(model, [group])
        for one, other in zip(scores, alone, strict=True):
            assert one.log_likelihood == pytest.approx(other.log_likelihood, abs=1e-4)
            assert one.greedy == other.greedy


def test_long_continuations_are_scored_in_pieces_of_rows(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = load(model_dir)
    sequences = [tuple(range(50)), tuple(range(40, 0, -1))]
    whole = [score.log_likelihood for score in score_sequences(model, sequences, [49, 20])]
    monkeypatch.setattr("llmctl.core.evals.scoring._LOGIT_ROWS", 7)
    pieces = [score.log_likelihood for score in score_sequences(model, sequences, [49, 20])]
    assert pieces == pytest.approx(whole, abs=1e-4)


def test_a_model_with_nan_is_an_error_and_no_score(tmp_path: Path) -> None:
    model, _ = load(write_model(tmp_path, poison=True))
    with pytest.raises(NonFiniteError, match="not finite"):
        score_sequences(model, [(1, 2, 3)], [2])
