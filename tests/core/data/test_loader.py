"""Samples as a pure function of an index: coverage, order, phases, documents, and reading ahead."""

import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.core.data.loader import IGNORE, Batch, EvalSource, Permutation, PretrainSource, Sample, batch_at, prefetch
from llmctl.core.data.shards import TokenDataset
from llmctl.core.errors import InputError

from .packed import write_packed

PINNED_10 = [3, 7, 9, 0, 1, 2, 8, 5, 6, 4]
PINNED_1E9 = [952567079, 615655351, 615309305, 458942443]


def dataset_of(tmp_path: Path, num_tokens: int, *, document_len: int = 13) -> tuple[TokenDataset, list[int]]:
    ids = list(range(num_tokens))
    documents = [ids[i : i + document_len] for i in range(0, num_tokens, document_len)]
    stream = write_packed(tmp_path / f"d{num_tokens}", documents, vocab_size=70_000, shard_tokens=50)
    return TokenDataset.open(tmp_path / f"d{num_tokens}"), stream


@settings(deadline=None)
@given(length=st.integers(1, 3000), key=st.binary(max_size=20))
def test_the_permutation_is_a_bijection(length: int, key: bytes) -> None:
    permutation = Permutation(length, key)
    assert sorted(map(permutation, range(length))) == list(range(length))


def test_the_permutation_stays_inside_a_huge_range() -> None:
    length = 10**12 + 7
    permutation = Permutation(length, b"k")
    images = [permutation(i) for i in range(0, length, length // 1000)]
    assert all(0 <= i < length for i in images)
    assert len(set(images)) == len(images)
    with pytest.raises(IndexError):
        permutation(length)


def test_the_permutation_is_pinned() -> None:
    """A change here would give resumed runs another order: these numbers may never change."""
    assert [Permutation(10, b"0 0")(i) for i in range(10)] == PINNED_10
    assert [Permutation(10**9, b"7 3")(i) for i in range(4)] == PINNED_1E9


def test_the_permutation_looks_random() -> None:
    """Pairs (i, image) over many keys fall evenly: chi-squared with 24 * 24 cells, mean 575, deviation about 33."""
    length, rounds = 24, 4000
    counts = np.zeros((length, length))
    for key in range(rounds):
        permutation = Permutation(length, str(key).encode())
        for i in range(length):
            counts[i, permutation(i)] += 1
    expected = rounds / length
    assert ((counts - expected) ** 2 / expected).sum() < 575 + 6 * 34
    neighbours = Permutation(100_000, b"x")
    gaps = [abs(neighbours(i + 1) - neighbours(i)) for i in range(20_000)]
    assert 0.97 < np.mean(gaps) / (100_000 / 3) < 1.03, "neighbours land a third of the range apart on average"


@pytest.mark.parametrize(
    ("num_tokens", "seq_len"), [(1000, 16), (999, 16), (17, 16), (32, 16), (33, 16), (34, 16), (48, 16), (50, 1), (2, 1)]
)
def test_an_epoch_predicts_each_id_at_most_once_and_leaves_out_less_than_two_windows(tmp_path: Path, num_tokens: int, seq_len: int) -> None:
    dataset, stream = dataset_of(tmp_path, num_tokens)
    source = PretrainSource(dataset, seq_len, seed=5)
    for epoch in range(4):
        samples = [source.sample_at(epoch * source.samples_per_epoch + i) for i in range(source.samples_per_epoch)]
        targets = Counter(i for s in samples for i in s.targets.tolist())
        assert set(targets.values()) == {1}
        assert num_tokens - 1 - len(targets) < 2 * seq_len
        for sample in samples:
            start = int(sample.tokens[0])
            assert sample.tokens.tolist() == stream[start : start + seq_len]
            assert sample.targets.tolist() == stream[start + 1 : start + seq_len + 1]


def test_epochs_differ_in_order_and_phase_and_seeds_differ(tmp_path: Path) -> None:
    dataset, _ = dataset_of(tmp_path, 2000)
    source = PretrainSource(dataset, 16, seed=1)
    epochs = [[source.start_of(e * source.samples_per_epoch + i) for i in range(source.samples_per_epoch)] for e in range(20)]
    assert len({tuple(e) for e in epochs}) == 20
    assert len({e[0] % 16 for e in epochs}) > 8, "phases vary"
    assert all(len({start % 16 for start in e}) == 1 for e in epochs), "one phase an epoch"
    assert epochs[0] != sorted(epochs[0])
    other = PretrainSource(dataset, 16, seed=2)
    assert [other.start_of(i) for i in range(other.samples_per_epoch)] != epochs[0]


def test_a_sample_depends_on_its_index_alone(tmp_path: Path) -> None:
    dataset, _ = dataset_of(tmp_path, 1000)
    source = PretrainSource(dataset, 8, seed=3)
    forward = [source.sample_at(i).tokens.tolist() for i in range(400)]
    again = PretrainSource(dataset, 8, seed=3)
    backward = [again.sample_at(i).tokens.tolist() for i in reversed(range(400))]
    assert forward == backward[::-1]


def test_documents_of_a_window(tmp_path: Path) -> None:
    dataset, _ = dataset_of(tmp_path, 1000, document_len=13)
    source = PretrainSource(dataset, 40, seed=3, with_documents=True)
    for index in range(30):
        sample = source.sample_at(index)
        labels = [int(i) // 13 for i in sample.tokens]  # ids count up, so they tell their document
        assert sample.document_lengths == tuple(labels.count(label) for label in sorted(set(labels)))
    batch = batch_at(source, 4, 3)
    assert batch.document_lengths == tuple(source.sample_at(i).document_lengths for i in (4, 5, 6))


@pytest.mark.parametrize(("num_tokens", "seq_len"), [(100, 16), (97, 16), (96, 16), (2, 16), (17, 16), (18, 16)])
def test_evaluation_predicts_every_id_but_the_first_once_in_order(tmp_path: Path, num_tokens: int, seq_len: int) -> None:
    dataset, stream = dataset_of(tmp_path, num_tokens)
    source = EvalSource(dataset, seq_len)
    samples = [source.sample_at(i) for i in range(source.samples_per_epoch)]
    assert [t for s in samples for t in s.targets.tolist() if t != IGNORE] == stream[1:]
    assert source.num_targets == num_tokens - 1
    for sample in samples:
        kept = sample.targets != IGNORE
        assert (sample.tokens[kept] + 1 == sample.targets[kept]).all()
        assert len(sample.tokens) == seq_len
    with pytest.raises(IndexError):
        source.sample_at(source.samples_per_epoch)


def test_data_shorter_than_one_sequence_is_an_error(tmp_path: Path) -> None:
    dataset, _ = dataset_of(tmp_path, 16)
    with pytest.raises(InputError, match=r"16 ids, one sequence needs 17.*--seq-len"):
        PretrainSource(dataset, 16, seed=0)
    dataset, _ = dataset_of(tmp_path, 1)
    with pytest.raises(InputError, match="1 ids"):
        EvalSource(dataset, 4)


def equal(a: Batch, b: Batch) -> bool:
    return bool((a.tokens == b.tokens).all() and (a.targets == b.targets).all()) and a.document_lengths == b.document_lengths


def test_reading_ahead_changes_nothing(tmp_path: Path) -> None:
    dataset, _ = dataset_of(tmp_path, 1000)
    source = PretrainSource(dataset, 8, seed=3, with_documents=True)
    with prefetch(source, first_index=5, num_rows=3, stride=7, count=20, ahead=4) as batches:
        found = list(batches)
    assert len(found) == 20
    assert all(equal(batch, batch_at(source, 5 + 7 * k, 3)) for k, batch in enumerate(found))


def test_an_endless_stream_is_closed_at_once(tmp_path: Path) -> None:
    dataset, _ = dataset_of(tmp_path, 1000)
    before = set(threading.enumerate())
    stream = prefetch(PretrainSource(dataset, 8, seed=3), first_index=0, num_rows=2)
    next(stream)
    stream.close()
    stream.close()
    assert set(threading.enumerate()) <= before
    assert list(stream) == []


class Failing:
    seq_len, data_hash, samples_per_epoch = 4, "", None

    def sample_at(self, index: int) -> Sample:
        if index >= 6:
            raise InputError("the shard was cut")
        return Sample(np.full(4, index), np.full(4, index))


def test_an_error_comes_after_the_good_batches_and_stays() -> None:
    with prefetch(Failing(), first_index=0, num_rows=2, ahead=3) as stream:
        for k in range(3):
            assert next(stream).tokens[:, 0].tolist() == [2 * k, 2 * k + 1]
        for _ in range(2):
            with pytest.raises(InputError, match="was cut"):
                next(stream)
