"""Mixtures: exact parts, every sample of every source once an epoch, and nothing but the index that decides."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.core.config.mixture import MixturePart, parse_mixture
from llmctl.core.data.loader import EvalSource, PretrainSource, batch_at, prefetch
from llmctl.core.data.mixture import InterleavedSource, MixtureSource, whole_parts
from llmctl.core.data.shards import TokenDataset
from llmctl.core.errors import UsageError

from .packed import write_packed


def source(tmp_path: Path, name: str, first: int, num_tokens: int, seq_len: int = 4) -> PretrainSource:
    """A corpus whose ids tell which it is: first, first + 1, ..."""
    write_packed(tmp_path / name, [list(range(first, first + num_tokens))], vocab_size=5000)
    return PretrainSource(TokenDataset.open(tmp_path / name), seq_len, seed=3)


@pytest.fixture
def mixture(tmp_path: Path) -> MixtureSource:
    return MixtureSource(
        [source(tmp_path, "a", 0, 90), source(tmp_path, "b", 1000, 41), source(tmp_path, "c", 2000, 300)], (5, 2, 3), seed=3
    )


def test_the_parts_are_exact_in_every_block(mixture: MixtureSource) -> None:
    for block in range(40):
        found = Counter(mixture.place_of(block * 10 + place)[0] for place in range(10))
        assert found == {0: 5, 1: 2, 2: 3}
    orders = {tuple(mixture.place_of(block * 10 + place)[0] for place in range(10)) for block in range(40)}
    assert len(orders) > 20, "each block has its own order"


def test_each_source_gives_its_samples_in_its_own_epochs(mixture: MixtureSource) -> None:
    """Over as many blocks as you like: the numbers of a source are 0, 1, 2, ... each once."""
    numbers: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for index in range(500):
        which, number = mixture.place_of(index)
        numbers[which].append(number)
        sample = mixture.sample_at(index)
        assert {int(token) // 1000 for token in sample.tokens} == {which}, "the ids are of that source"
        assert np.array_equal(sample.tokens, mixture.sources[which].sample_at(number).tokens)
    for which, found in numbers.items():
        assert sorted(found) == list(range(len(found))), which


@pytest.mark.parametrize("num_samples", [0, 1, 7, 10, 123, 500])
def test_the_counts_are_those_of_counting(mixture: MixtureSource, num_samples: int) -> None:
    found = Counter(mixture.place_of(index)[0] for index in range(num_samples))
    assert mixture.counts(num_samples) == tuple(found[which] for which in range(3))
    uses = mixture.uses(num_samples)
    assert [use.num_tokens for use in uses] == [4 * found[which] for which in range(3)]
    assert [use.epochs for use in uses] == [found[which] / mixture.sources[which].samples_per_epoch for which in range(3)]
    assert [use.name for use in uses] == ["a", "b", "c"]


def test_ranks_and_restarts_see_the_same_samples(mixture: MixtureSource, tmp_path: Path) -> None:
    whole = batch_at(mixture, 0, 64).tokens
    again = MixtureSource(mixture.sources, (5, 2, 3), seed=3)
    assert batch_at(again, 37, 27).tokens.equal(whole[37:])
    with prefetch(again, first_index=3, num_rows=2, stride=8, count=5) as batches:
        for number, batch in enumerate(batches):
            assert batch.tokens.equal(whole[3 + 8 * number : 5 + 8 * number])
    assert not batch_at(MixtureSource(mixture.sources, (5, 2, 3), seed=4), 0, 64).tokens.equal(whole)


def test_the_identity_is_that_of_sources_and_parts(mixture: MixtureSource) -> None:
    others = [MixtureSource(mixture.sources, parts, seed=3).data_hash for parts in ((5, 3, 2), (1, 1, 1), (5, 2, 4))]
    assert len({mixture.data_hash, *others, MixtureSource(mixture.sources[::-1], (5, 2, 3), seed=3).data_hash}) == 5
    assert MixtureSource(mixture.sources, (5, 2, 3), seed=9).data_hash == mixture.data_hash


def test_parts_become_the_smallest_whole_numbers() -> None:
    assert whole_parts([0.7, 0.3]) == (7, 3)
    assert whole_parts([1, 2]) == (1, 2)
    assert whole_parts([0.25, 0.25, 0.5]) == (1, 1, 2)
    assert whole_parts([0.999, 0.001]) == (999, 1)
    assert whole_parts([1e9, 1]) == (10_000, 1), "what is there is never left out"


@settings(deadline=None, max_examples=200)
@given(weights=st.lists(st.floats(0.01, 1e6), min_size=2, max_size=6))
def test_parts_are_near_what_was_asked_for(weights: list[float]) -> None:
    parts = whole_parts(weights)
    for part, weight in zip(parts, weights, strict=True):
        assert abs(part / sum(parts) - weight / sum(weights)) < 0.001


def test_a_beginning_of_the_held_out_data_has_every_source_in_it(tmp_path: Path) -> None:
    write_packed(tmp_path / "a", [list(range(0, 200))], vocab_size=5000)
    write_packed(tmp_path / "b", [list(range(1000, 1100))], vocab_size=5000)
    sources = [EvalSource(TokenDataset.open(tmp_path / name), 4) for name in ("a", "b")]
    both = InterleavedSource(sources)
    rows = [both.sample_at(index).tokens.tolist() for index in range(both.samples_per_epoch)]
    wanted = [part.sample_at(index).tokens.tolist() for part in sources for index in range(part.samples_per_epoch)]
    assert sorted(rows) == sorted(wanted)
    for length in (9, 30, 60):
        assert abs(sum(row[0] >= 1000 for row in rows[:length]) - length / 3) < 1
    with pytest.raises(IndexError):
        both.sample_at(both.samples_per_epoch)


def test_what_data_says(tmp_path: Path) -> None:
    (tmp_path / "odd=0.5").mkdir()
    assert parse_mixture([Path("x=0.7"), Path("y=3e-1")]) == (MixturePart(Path("x"), 0.7), MixturePart(Path("y"), 0.3))
    assert parse_mixture([Path("x")]) == (MixturePart(Path("x"), None),)
    assert parse_mixture([tmp_path / "odd=0.5"]) == (MixturePart(tmp_path / "odd=0.5", None),)
    bad: list[tuple[list[Any], str]] = [
        (["x=0.7", "y"], "needs one too"),
        (["x=1", "x=2"], "named twice"),
        (["x=0"], "above 0"),
        (["x=-1"], "above 0"),
    ]
    for values, message in bad:
        with pytest.raises(UsageError, match=message):
            parse_mixture([Path(value) for value in values])
