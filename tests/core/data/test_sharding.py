"""A corpus packed in parts and joined beside the same corpus packed at once."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.core.data.merge import Merged, merge
from llmctl.core.data.sharding import part_of
from llmctl.core.data.shards import TokenDataset
from llmctl.core.data.sources import OpenSource, Source
from llmctl.core.data.verify import DamageFound, verify
from llmctl.core.errors import InputError, UsageError

from .test_pack import run, some_documents, stream_of, write_jsonl

LINES = [b"\n", b"a\n", b"bcd\n", b"x" * 30 + b"\n", b"\r\n", b"last"]


@settings(deadline=None, max_examples=150)
@given(
    files=st.lists(
        st.lists(st.sampled_from([b"\n", b"a\n", b"bcd\n", b"x" * 30 + b"\n", b"\r\n", b"last"]), max_size=12), min_size=1, max_size=4
    ),
    count=st.integers(1, 7),
)
def test_the_parts_of_lines_joined_are_the_files(tmp_path_factory: pytest.TempPathFactory, files: list[list[bytes]], count: int) -> None:
    folder = tmp_path_factory.mktemp("parts")
    sources = []
    for number, lines in enumerate(files):
        path = folder / f"{number}.txt"
        path.write_bytes(b"".join(lines))
        sources.append(Source(path.name, path, "lines", path.stat().st_size))
    found: dict[str, bytes] = {source.name: b"" for source in sources}
    for index in range(count):
        for part in part_of(sources, index, count):
            with OpenSource(part) as opened:
                assert part.start is not None
                assert opened.offset == part.start == len(found[part.name])
                data = b"".join(iter(lambda opened=opened: opened.read(7), b""))
            assert len(data) == part.num_bytes
            whole = found[part.name]
            assert not whole or whole.endswith(b"\n"), "a part begins with a line"
            found[part.name] = whole + data
    assert found == {source.name: b"".join(lines) for source, lines in zip(sources, files, strict=True)}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """A large file of JSON, a text, a compressed file, a small file of JSON."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "b.txt").write_text("a text that is one document\n" * 200)
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "packed away"}\n' * 50))
    return (
        write_jsonl(folder / "a.jsonl", some_documents(150, seed=2)),
        folder / "b.txt",
        folder / "c.jsonl.gz",
        write_jsonl(folder / "d.jsonl", some_documents(20, seed=3)),
    )


@pytest.mark.parametrize("count", [2, 5])
def test_parts_joined_are_what_one_machine_packs(tmp_path: Path, corpus: tuple[Path, ...], tokenizer_dir: Path, count: int) -> None:
    settings: dict[str, Any] = {"val_fraction": 0.2, "shard_tokens": 4000}
    run(corpus, tmp_path / "whole", tokenizer_dir, **settings)
    parts = [tmp_path / f"part{index}" for index in range(1, count + 1)]
    for index, part in enumerate(parts, 1):
        run(corpus, part, tokenizer_dir, shard=f"{index}/{count}", **settings)
    (*_, done) = merge(parts[::-1], tmp_path / "merged")
    assert isinstance(done, Merged)
    for split in ("train", "val"):
        assert stream_of(tmp_path / "merged", split) == stream_of(tmp_path / "whole", split)
        one, other = TokenDataset.open(tmp_path / "merged", split), TokenDataset.open(tmp_path / "whole", split)
        assert (one.num_documents, one.num_bytes, one.num_tokens) == (other.num_documents, other.num_bytes, other.num_tokens)
    assert not [event for event in verify(tmp_path / "merged") if isinstance(event, DamageFound)]
    with pytest.raises(UsageError, match=f"{count}/{count} is missing"):
        list(merge(parts[:-1], tmp_path / "few"))
    assert not (tmp_path / "few").exists()


def test_errors_keep_the_line_of_the_file_and_are_joined(tmp_path: Path, tokenizer_dir: Path) -> None:
    lines = ['{"text": "good"}'] * 40
    lines[3] = lines[31] = "[]"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    parts = [tmp_path / "p1", tmp_path / "p2"]
    for index, part in enumerate(parts, 1):
        run(tmp_path / "a.jsonl", part, tokenizer_dir, shard=f"{index}/2", on_error="skip", val_fraction=0)
    (*_, done) = merge(parts, tmp_path / "merged")
    assert done.num_errors == 2
    assert [json.loads(line)["line"] for line in (tmp_path / "merged" / "errors.jsonl").read_text().splitlines()] == [4, 32]
    with pytest.raises(InputError, match=r"a\.jsonl: line 32: a JSON object"):
        run(tmp_path / "a.jsonl", tmp_path / "stop", tokenizer_dir, shard="2/2")


def test_what_cannot_be_joined_or_divided_is_refused(tmp_path: Path, corpus: tuple[Path, ...], tokenizer_dir: Path) -> None:
    run(corpus[3], tmp_path / "a", tokenizer_dir, val_fraction=0)
    run(corpus[1], tmp_path / "b", tokenizer_dir, val_fraction=0)
    with pytest.raises(UsageError, match="named twice"):
        list(merge([tmp_path / "a", tmp_path / "a"], tmp_path / "out"))
    with pytest.raises(UsageError, match="there already"):
        list(merge([tmp_path / "a"], tmp_path / "b"))
    for shard in ("0/2", "3/2", "1", "a/b", "1/0"):
        with pytest.raises(UsageError, match="I/N is wanted"):
            run(corpus[3], tmp_path / "c", tokenizer_dir, shard=shard)
    with pytest.raises(UsageError, match="no length"):
        run("-", tmp_path / "c", tokenizer_dir, shard="1/2", stdin=b"text")
    with pytest.raises(InputError, match="fewer"):
        run(corpus[1], tmp_path / "c", tokenizer_dir, shard="2/2")
    path = tmp_path / "b" / "train-00000.tokens"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"train-00000\.tokens: sha256 mismatch"):
        list(merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".tmp-*"))
