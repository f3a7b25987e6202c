"""Packing: every row once an epoch, nothing over the length, and every sequence a pure function of its index."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.core.data.loader import IGNORE, batch_at
from llmctl.core.data.packing import EncodedRows, PackedSource, pack_decreasing


def encoded(rows: list[tuple[list[int], list[bool]]]) -> EncodedRows:
    return EncodedRows(
        ids=np.array([i for ids, _ in rows for i in ids], dtype=np.int32),
        learn=np.array([m for _, learn in rows for m in learn], dtype=np.bool_),
        ends=np.cumsum([len(ids) for ids, _ in rows]).astype(np.int64),
    )


def some_rows(count: int, *, longest: int, seed: int = 0) -> EncodedRows:
    """Rows whose first id is 1000 + their number, so that a row can be told wherever it lands."""
    draw = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        length = int(draw.integers(2, longest + 1))
        rows.append(([1000 + number, *draw.integers(0, 1000, length - 1).tolist()], [False, *(draw.random(length - 1) < 0.5).tolist()]))
    return encoded(rows)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=200), st.integers(50, 90))
def test_bins_hold_each_item_once_within_the_capacity(sizes: list[int], capacity: int) -> None:
    falling = sorted(sizes, reverse=True)
    bins = pack_decreasing(falling, capacity=capacity)
    assert sorted(place for items in bins for place in items) == list(range(len(sizes)))
    assert max(sum(falling[place] for place in items) for items in bins) <= capacity
    fewest = -(-sum(sizes) // capacity)
    assert len(bins) <= 11 / 9 * max(fewest, sum(size > capacity / 2 for size in sizes)) + 1 or len(bins) <= 1.5 * fewest + 1


def test_bins_are_those_of_a_plain_search() -> None:
    sizes = sorted(np.random.default_rng(3).integers(1, 40, 300).tolist(), reverse=True)
    rooms: list[int] = []
    for size in sizes:  # best fit: the least room that is enough
        fitting = [room for room in rooms if room >= size]
        if fitting:
            rooms[rooms.index(min(fitting))] -= size
        else:
            rooms.append(64 - size)
    bins = pack_decreasing(sizes, capacity=64)
    assert sorted(64 - sum(sizes[i] for i in items) for items in bins) == sorted(rooms)


def test_an_epoch_holds_each_row_once_whole_and_shifted_by_one() -> None:
    rows = some_rows(57, longest=30)
    source = PackedSource(rows, seq_len=32, seed=7, data_hash="x", pad_id=5)
    for epoch in range(3):
        seen = []
        for index in range(epoch * source.samples_per_epoch, (epoch + 1) * source.samples_per_epoch):
            sample = source.sample_at(index)
            assert sum(sample.document_lengths or ()) == 32
            start = 0
            for length in sample.document_lengths or ():
                number = int(sample.tokens[start]) - 1000
                part = slice(start, start + length)
                start += length
                if number < 0:  # what is left over
                    assert (sample.tokens[part] == 5).all()
                    assert (sample.targets[part] == IGNORE).all()
                    continue
                seen.append(number)
                ids, learn = rows.row(number)
                wanted = [int(i) if m else IGNORE for i, m in zip(ids[1:], learn[1:], strict=True)]
                assert sample.tokens[part].tolist() == ids[:-1].tolist()
                assert sample.targets[part].tolist() == wanted
        assert sorted(seen) == list(range(57))


def test_a_sequence_depends_on_rows_seed_and_index_alone() -> None:
    rows = some_rows(40, longest=20)

    def tokens(seed: int, indices: list[int]) -> list[list[int]]:
        source = PackedSource(rows, seq_len=24, seed=seed, data_hash="x")
        return [source.sample_at(index).tokens.tolist() for index in indices]

    forward = tokens(1, list(range(60)))
    assert tokens(1, list(range(59, -1, -1)))[::-1] == forward
    assert tokens(1, [47]) == [forward[47]]
    assert tokens(2, list(range(60))) != forward
    per_epoch = PackedSource(rows, seq_len=24, seed=1, data_hash="x").samples_per_epoch
    assert forward[:per_epoch] != forward[per_epoch : 2 * per_epoch]


def test_the_order_is_pinned() -> None:
    """A resumed run must see the order of the run before, also after an update of numpy or of this file."""
    source = PackedSource(some_rows(12, longest=9, seed=5), seq_len=16, seed=3, data_hash="x")
    assert [source.rows_at(index) for index in range(2 * source.samples_per_epoch)] == [
        [3, 0, 6],
        [9, 11, 1],
        [4, 8, 2, 7, 10, 5],
        [9, 3, 4],
        [1, 7, 8, 10, 2, 5],
        [0, 11, 6],
    ]


def test_evaluation_goes_once_through_the_rows_and_ends() -> None:
    rows = some_rows(20, longest=12)
    source = PackedSource(rows, seq_len=16, seed=0, data_hash="x", shuffle=False)
    assert sorted(row for index in range(source.samples_per_epoch) for row in source.rows_at(index)) == list(range(20))
    with pytest.raises(IndexError):
        source.sample_at(source.samples_per_epoch)


def test_a_batch_carries_the_lengths_of_every_row() -> None:
    source = PackedSource(some_rows(20, longest=12), seq_len=16, seed=0, data_hash="x")
    batch = batch_at(source, 2, 3)
    assert batch.tokens.shape == batch.targets.shape == (3, 16)
    assert batch.document_lengths == tuple(source.sample_at(2 + row).document_lengths for row in range(3))


@settings(max_examples=30)
@given(st.integers(1, 60), st.integers(2, 40), st.integers(0, 2**63))
def test_every_seed_and_size_gives_whole_epochs(count: int, longest: int, seed: int) -> None:
    source = PackedSource(some_rows(count, longest=longest), seq_len=longest, seed=seed, data_hash="x")
    for epoch in (0, 1, 5):
        start = epoch * source.samples_per_epoch
        assert sorted(row for index in range(source.samples_per_epoch) for row in source.rows_at(start + index)) == list(range(count))
