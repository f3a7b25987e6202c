"""Files, folders, patterns, compression and stdin: what is found, in which order, and what is refused by name."""

import gzip
import io
import os
from pathlib import Path
from typing import Any

import pytest
import zstandard

from llmctl.core.data.sources import OpenSource, Source, find_sources
from llmctl.core.errors import InputError, NotFoundError, UsageError

TEXT = ("".join(f"line {i} of a text that compresses\n" for i in range(4000)) + "國王").encode()


def read_all(path: Path | None, stdin: Any = None) -> bytes:
    with OpenSource(Source("the file", path, "text", None), stdin) as opened:
        blocks = list(iter(lambda: opened.read(1000), b""))
    return b"".join(blocks)


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


def streamed_zstd(data: bytes) -> bytes:
    """Without the size of the content in the frame's header, as `zstd < pipe` writes it."""
    frame = zstandard.ZstdCompressor(write_content_size=False, write_checksum=True).compressobj()
    return frame.compress(data) + frame.flush()


@pytest.mark.parametrize(
    "data",
    [
        TEXT,
        gzip.compress(TEXT),
        gzip.compress(TEXT[:500]) + gzip.compress(TEXT[500:]),
        zstd(TEXT),
        streamed_zstd(TEXT),
        zstd(TEXT[:9]) + streamed_zstd(TEXT[9:700]) + zstd(b"") + zstd(TEXT[700:]),
    ],
    ids=["plain", "gzip", "two gzip members", "zstd", "streamed zstd", "many zstd frames"],
)
def test_content_decides_about_compression(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "any.name").write_bytes(data)
    assert read_all(tmp_path / "any.name") == TEXT
    assert read_all(None, io.BytesIO(data)) == TEXT


@pytest.mark.parametrize(("compress", "suffix"), [(gzip.compress, ".gz"), (zstd, ".zst"), (streamed_zstd, ".zst")])
def test_a_truncated_or_damaged_file_is_an_error_wherever_it_is_cut(tmp_path: Path, compress: Any, suffix: str) -> None:
    data = compress(TEXT)
    path = tmp_path / f"x{suffix}"
    for cut in (0, 1, 3, 5, 9, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(InputError, match="the file"):
            read_all(path)
    middle = len(data) // 2
    path.write_bytes(data[:middle] + bytes(b ^ 0xFF for b in data[middle : middle + 40]) + data[middle + 40 :])
    with pytest.raises(InputError, match=r"the file: (damaged compressed data|the compressed data ends too early)"):
        read_all(path)


def test_a_byte_order_mark_is_dropped_and_other_encodings_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfabc")
    assert read_all(path) == b"abc"
    path.write_bytes(gzip.compress(b"\xef\xbb\xbfabc"))
    assert read_all(path) == b"abc"
    for encoding in ("utf-16", "utf-16-be", "utf-32"):
        mark = b"\xfe\xff" if encoding == "utf-16-be" else b""
        path.write_bytes(mark + "text".encode(encoding))
        with pytest.raises(InputError, match=r"the file: this is UTF-(16|32).*iconv"):
            read_all(path)
    path.write_bytes(b"")
    assert read_all(path) == b""


def test_folders_are_searched_in_an_order_of_names(tmp_path: Path) -> None:
    names = [
        "b.txt",
        "a.jsonl.gz",
        "sub/z.md",
        "sub/.hidden.txt",
        ".git/x.txt",
        "c.json",
        "d.bin",
        "B.TXT",
        "out/errors.jsonl",
        "e.ndjson.zst",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = find_sources([str(tmp_path)], exclude=tmp_path / "out")
    relative = [(str(s.path.relative_to(tmp_path)), s.format) for s in found if s.path]
    assert relative == [("B.TXT", "text"), ("a.jsonl.gz", "jsonl"), ("b.txt", "text"), ("e.ndjson.zst", "jsonl"), ("sub/z.md", "text")]
    assert [s.path for s in find_sources([f"{tmp_path}/**/*.md", f"{tmp_path}/b.*"])] == [tmp_path / "sub/z.md", tmp_path / "b.txt"]
    assert [s.format for s in find_sources([str(tmp_path / "c.json"), "-"], format="lines")] == ["lines", "lines"]


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for given in (tmp_path / "no.txt", tmp_path / "*.txt", tmp_path / "empty"):
        with pytest.raises(NotFoundError, match=str(given).replace("*", r"\*")):
            find_sources([str(given)])
    with pytest.raises(UsageError, match="twice"):
        find_sources(["-", "-"])
    with pytest.raises(UsageError, match="stdin is closed"):
        read_all(None, None)


def test_odd_names(tmp_path: Path) -> None:
    names = [b"with space.txt", b"new\nline.txt", b"\xff\xfe.txt", b"-dash.txt", b"x" * 251 + b".txt", b"[a].txt"]
    for name in names:
        Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name))).write_bytes(b"abc")
    found = find_sources([str(tmp_path)])
    assert len(found) == len(names)
    for source in found:
        assert read_all(source.path) == b"abc"
        source.name.encode()  # printable: no surrogates
    assert len(find_sources([str(tmp_path / "[a].txt")])) == 1, "a file of that very name wins over the pattern"


def test_stdin_stays_open(tmp_path: Path) -> None:
    stream = io.BytesIO(TEXT)
    assert read_all(None, stream) == TEXT
    assert not stream.closed
