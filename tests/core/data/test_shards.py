"""Token shards: what is written is what is read, and what is damaged is refused by name."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.core.data.shards import HEADER_BYTES, ShardHeader, ShardWriter, TokenDataset, TokenShard, id_dtype
from llmctl.core.errors import InputError, NotFoundError, WriteError

from .packed import FINGERPRINT, write_packed

DOCUMENTS = [list(range(10, 10 + n)) for n in (5, 1, 100, 1, 1, 70, 64, 30)]


@settings(deadline=None, max_examples=60)
@given(vocab_size=st.sampled_from([1, 256, 65536, 65537, 70_000, 1 << 32]), data=st.data())
def test_ids_and_document_ends_survive_a_round_trip(tmp_path_factory: pytest.TempPathFactory, vocab_size: int, data: st.DataObject) -> None:
    top = vocab_size - 1
    documents = data.draw(st.lists(st.lists(st.one_of(st.integers(0, top), st.just(top)), min_size=1, max_size=9), max_size=9))
    path = tmp_path_factory.mktemp("shard") / "train-00000.tokens"
    writer = ShardWriter(path, vocab_size=vocab_size, fingerprint=FINGERPRINT)
    for document in documents:
        writer.write(np.array(document))
        writer.end_document()
    info = writer.finish()
    shard = TokenShard.open(path)
    assert shard.tokens.tolist() == [i for d in documents for i in d]
    assert shard.document_ends.tolist() == np.cumsum([len(d) for d in documents]).tolist()
    assert shard.tokens.dtype == (np.uint16 if vocab_size <= 65536 else np.uint32)
    assert (info.num_tokens, info.num_documents, info.num_bytes) == (len(shard.tokens), len(documents), path.stat().st_size)
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("bad", [-1, 300, 65536 + 5])
def test_an_id_outside_the_vocabulary_is_an_error_never_a_wrapped_id(tmp_path: Path, bad: int) -> None:
    writer = ShardWriter(tmp_path / "train-00000.tokens", vocab_size=300, fingerprint=FINGERPRINT)
    with pytest.raises(InputError, match=str(bad)):
        writer.write(np.array([1, bad]))
    writer.abort()
    assert os.listdir(tmp_path) == []


def test_dtype_follows_the_vocabulary() -> None:
    assert [id_dtype(n).name for n in (1, 65536, 65537, 1 << 32)] == ["uint16", "uint16", "uint32", "uint32"]
    with pytest.raises(InputError):
        id_dtype((1 << 32) + 1)


def test_a_full_disk_is_a_write_error_that_names_the_shard(tmp_path: Path) -> None:
    (tmp_path / ".tmp-train-00000.tokens").symlink_to("/dev/full")
    writer = ShardWriter(tmp_path / "train-00000.tokens", vocab_size=300, fingerprint=FINGERPRINT)
    with pytest.raises(WriteError, match=r"train-00000\.tokens: no space left"):
        writer.write(np.zeros(1 << 20, dtype=np.int64))
    writer.abort()
    assert os.listdir(tmp_path) == []


def test_every_flipped_bit_of_the_header_is_noticed(tmp_path: Path) -> None:
    write_packed(tmp_path / "d", DOCUMENTS)
    path = tmp_path / "d" / "train-00000.tokens"
    good = path.read_bytes()
    for position in range(HEADER_BYTES):
        path.write_bytes(good[:position] + bytes([good[position] ^ 0x10]) + good[position + 1 :])
        with pytest.raises(InputError, match="train-00000"):
            TokenShard.open(path)


@pytest.mark.parametrize("cut", [0, 10, HEADER_BYTES, -8, -1])
def test_a_cut_or_longer_shard_is_refused(tmp_path: Path, cut: int) -> None:
    write_packed(tmp_path / "d", DOCUMENTS)
    path = tmp_path / "d" / "train-00000.tokens"
    good = path.read_bytes()
    for bad in (good[:cut], good + b"x"):
        path.write_bytes(bad)
        with pytest.raises(InputError, match="train-00000"):
            TokenShard.open(path)
        with pytest.raises(InputError, match="train-00000"):
            TokenDataset.open(tmp_path / "d")


def test_a_dataset_reads_across_shards_like_one_array(tmp_path: Path) -> None:
    stream = write_packed(tmp_path / "d", DOCUMENTS, shard_tokens=17)
    dataset = TokenDataset.open(tmp_path / "d")
    assert len(dataset.shards) == -(-len(stream) // 17)
    labels = [number for number, d in enumerate(DOCUMENTS) for _ in d]
    for start in range(0, len(stream), 7):
        for count in (0, 1, 16, 17, 18, 60, len(stream) - start):
            if start + count > len(stream):
                continue
            assert dataset.tokens_at(start, count).tolist() == stream[start : start + count]
            window = labels[start : start + count]
            assert list(dataset.document_lengths_at(start, count)) == [window.count(label) for label in sorted(set(window))]
    with pytest.raises(IndexError):
        dataset.tokens_at(len(stream) - 3, 4)


def test_a_header_that_disagrees_with_the_manifest_is_refused(tmp_path: Path) -> None:
    write_packed(tmp_path / "d", DOCUMENTS)
    manifest_path = tmp_path / "d" / "manifest.json"
    good = json.loads(manifest_path.read_text())
    for key, value in (("dtype", "uint32"), ("vocab_size", 70_000), ("tokenizer_fingerprint", "cd" * 32)):
        manifest_path.write_text(json.dumps({**good, key: value}))
        with pytest.raises(InputError, match=r"train-00000.*header"):
            TokenDataset.open(tmp_path / "d")


def test_missing_and_unfinished_folders_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="tokenize pack"):
        TokenDataset.open(tmp_path / "nowhere")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "pack-state.json").write_text("{}")
    with pytest.raises(InputError, match="not finished"):
        TokenDataset.open(tmp_path / "half")
    write_packed(tmp_path / "d", DOCUMENTS)
    with pytest.raises(NotFoundError, match="no val split"):
        TokenDataset.open(tmp_path / "d", "val")
    (tmp_path / "d" / "train-00001.tokens").unlink()
    with pytest.raises(InputError, match="train-00001"):
        TokenDataset.open(tmp_path / "d")


def test_a_shard_cut_while_mapped_is_noticed_before_it_is_read(tmp_path: Path) -> None:
    stream = write_packed(tmp_path / "d", DOCUMENTS)
    dataset = TokenDataset.open(tmp_path / "d")
    path = tmp_path / "d" / "train-00001.tokens"
    good = path.read_bytes()
    os.truncate(path, len(good) // 2)
    assert dataset.tokens_at(0, 64).tolist() == stream[:64], "an untouched shard still reads"
    with pytest.raises(InputError, match=r"train-00001.*changed while in use"):
        dataset.tokens_at(60, 10)
    path.write_bytes(good)
    assert dataset.tokens_at(60, 10).tolist() == stream[60:70], "and goes on after the repair"
    path.unlink()
    with pytest.raises(InputError, match=r"train-00001.*went away"):
        dataset.tokens_at(60, 10)


def test_the_data_hash_follows_content_and_not_place(tmp_path: Path) -> None:
    write_packed(tmp_path / "a", DOCUMENTS)
    write_packed(tmp_path / "b", DOCUMENTS)
    write_packed(tmp_path / "c", [*DOCUMENTS[:-1], [9] * 30])
    write_packed(tmp_path / "e", [*DOCUMENTS[:-2], DOCUMENTS[-2] + DOCUMENTS[-1]])
    hashes = [TokenDataset.open(tmp_path / name).data_hash for name in "abce"]
    assert hashes[0] == hashes[1]
    assert len({*hashes}) == 3, "another id, or another document end, is other data"


def test_header_of_absurd_counts_is_refused_without_allocating(tmp_path: Path) -> None:
    header = ShardHeader(dtype=np.dtype("<u2"), num_tokens=1 << 63, num_documents=1, vocab_size=10, fingerprint=FINGERPRINT)
    (tmp_path / "x.tokens").write_bytes(header.to_bytes())
    with pytest.raises(InputError, match="impossible header"):
        TokenShard.open(tmp_path / "x.tokens")
