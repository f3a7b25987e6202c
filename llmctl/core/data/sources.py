"""Where a corpus lies: finds the files behind paths, folders, globs and stdin, and reads them decompressed.

Knows names, compression and byte-order marks; knows no document, no JSON and no tokenizer.
"""

import glob
import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, Protocol

from llmctl.core.errors import InputError, NotFoundError, UsageError

Format = Literal["text", "lines", "paragraphs", "jsonl"]
FORMATS: tuple[Format, ...] = ("text", "lines", "paragraphs", "jsonl")
STDIN = "-"

_TEXT_SUFFIXES = {".txt", ".text", ".md"}
_JSON_LINES_SUFFIXES = {".jsonl", ".ndjson"}
_COMPRESSED_SUFFIXES = {".gz", ".zst"}
_GZIP_MAGIC, _ZSTD_MAGIC = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_ZSTD_BLOCK_BYTES = 4096
"""Compressed bytes fed at a time: a hostile file can make 128 MB of that, not more."""
_ENCODING_MARKS = (
    (b"\xff\xfe\x00\x00", "UTF-32"),
    (b"\x00\x00\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)
_UTF8_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Source:
    """One file of a corpus, or `num_bytes` of it from `start` on, or stdin (`path` is None). `num_bytes` as it lies on the
    disk, None for a pipe."""

    name: str
    path: Path | None
    format: Format
    num_bytes: int | None
    start: int | None = None
    """None for the whole file."""


def is_compressed(path: Path) -> bool:
    """Whether the content of a file says that it is compressed, or its name."""
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
    except OSError:
        magic = b""  # whoever reads it says what is wrong
    return path.suffix.lower() in _COMPRESSED_SUFFIXES or magic.startswith(_GZIP_MAGIC) or magic == _ZSTD_MAGIC


def find_sources(inputs: Sequence[str], *, format: Format | None = None, exclude: Path | None = None) -> list[Source]:
    """The files behind `inputs`, in an order that depends on names alone.

    An input is a file, a folder (searched to any depth for .txt, .text, .md, .jsonl and .ndjson, also with .gz or .zst;
    names that begin with a dot and links to folders are passed over), a glob pattern, or `-` for stdin. `format` None
    means by name: JSON lines for .jsonl and .ndjson, else one file, one document. Files below `exclude` are left out.

    Raises NotFoundError for an input that is not there or matches nothing, UsageError for stdin given twice.
    """
    if list(inputs).count(STDIN) > 1:
        raise UsageError("stdin (`-`) is named twice as an input; it can be read once")
    sources: list[Source] = []
    for given in inputs:
        if given == STDIN:
            sources.append(Source("stdin", None, format or "text", None))
            continue
        for path in _expand(given, exclude):
            sources.append(Source(readable_name(path), path, format or _format_of(path), _num_bytes(path)))
    return sources


def readable_name(path: Path) -> str:
    """A path as text for messages and manifests; bytes that are no UTF-8 become \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _expand(given: str, exclude: Path | None) -> list[Path]:
    path = Path(given)
    if path.is_dir():
        found = sorted(_walk(path, exclude), key=os.fsencode)
        if not found:
            raise NotFoundError(
                f"{readable_name(path)}: no .txt, .text, .md, .jsonl or .ndjson file in this folder (nor .gz or .zst of one)"
            )
        return found
    if path.exists():
        return [path]
    if not glob.has_magic(given):
        raise NotFoundError(f"{readable_name(path)}: no such file or folder")
    matches = [Path(match) for match in sorted(glob.glob(given, recursive=True), key=os.fsencode)]
    found = [match for match in matches if match.is_file() and not _is_below(match, exclude)]
    if not found:
        raise NotFoundError(f"{readable_name(path)}: no file matches this pattern")
    return found


def _walk(folder: Path, exclude: Path | None) -> Iterator[Path]:
    for base, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and not _is_below(Path(base, name), exclude)]
        for name in names:
            path = Path(base, name)
            if not name.startswith(".") and _inner_suffix(path) in _TEXT_SUFFIXES | _JSON_LINES_SUFFIXES and path.is_file():
                yield path


def _is_below(path: Path, exclude: Path | None) -> bool:
    return exclude is not None and path.resolve().is_relative_to(exclude.resolve())


def _inner_suffix(path: Path) -> str:
    """`.jsonl` of a.jsonl and of a.jsonl.gz."""
    return Path(path.stem if path.suffix.lower() in _COMPRESSED_SUFFIXES else path.name).suffix.lower()


def _format_of(path: Path) -> Format:
    return "jsonl" if _inner_suffix(path) in _JSON_LINES_SUFFIXES else "text"


def _num_bytes(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


class ByteStream(Protocol):
    """Decompressed content: `read(n)` gives at least one byte and about n at most, b"" at the end."""

    def read(self, num_bytes: int, /) -> bytes: ...


class OpenSource:
    """A source being read. Raises InputError that names it for damage, a truncated end, or another encoding than UTF-8.

    `offset` is how many decompressed bytes were given out, a byte-order mark included; `num_bytes_taken` how many
    bytes of the file that took, for a progress bar.
    """

    def __init__(self, source: Source, stdin: IO[bytes] | None = None) -> None:
        self.source = source
        self.offset = 0
        if source.path is not None:
            self._file = self._open_file(source.path)
        elif stdin is not None:
            self._file = stdin
        else:
            raise UsageError("stdin is closed, but `-` names it as an input; pipe something in or name a file")
        try:
            if source.start:
                self._file.seek(source.start)
                self.offset = source.start
            self._raw = _CountingReader(self._file, None if source.start is None else source.num_bytes)
            # A part from the middle of a file begins with a line: neither a mark nor compressed data.
            self._stream = _Plain(io.BufferedReader(self._raw, 1 << 18)) if source.start else self._decompressing()
            self._pending = b"" if source.start else self._skip_mark()
        except BaseException:
            self.close()
            raise

    @property
    def num_bytes_taken(self) -> int:
        """Bytes of the file read so far."""
        return self._raw.num_bytes

    def num_text_bytes(self) -> int | None:
        """Decompressed size without a byte-order mark, before anything was read; None for a pipe.

        A compressed file is read through for it, since gzip's own note of the size is modulo 2^32 and of one member.
        """
        if self.source.num_bytes is None:
            return None
        if isinstance(self._stream, _Plain):
            return os.fstat(self._file.fileno()).st_size - self.offset
        with OpenSource(self.source) as first_pass:
            return sum(len(block) for block in iter(lambda: first_pass.read(1 << 20), b""))

    def read(self, num_bytes: int) -> bytes:
        """The next bytes, b"" at the end."""
        if self._pending:
            block, self._pending = self._pending, b""
        else:
            block = self._read(num_bytes)
        self.offset += len(block)
        return block

    def close(self) -> None:
        """Close the file; stdin stays open."""
        if self.source.path is not None:
            self._file.close()

    def __enter__(self) -> "OpenSource":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_file(self, path: Path) -> IO[bytes]:
        try:
            return open(path, "rb")
        except FileNotFoundError as error:
            raise NotFoundError(f"{self.source.name}: no such file; it went away") from error
        except OSError as error:
            raise InputError(f"cannot read {self.source.name}: {error.strerror}") from error

    def _decompressing(self) -> ByteStream:
        buffered: io.BufferedReader[Any] = io.BufferedReader(self._raw, 1 << 18)
        magic = self._raw.head
        suffix = self.source.path.suffix.lower() if self.source.path is not None else ""
        # The content decides: a .txt that is gzip could be nothing else, for its first bytes are no UTF-8.
        if magic.startswith(_GZIP_MAGIC):
            return gzip.GzipFile(fileobj=buffered, mode="rb")
        if magic == _ZSTD_MAGIC:
            return _ZstdStream(buffered)
        if suffix in _COMPRESSED_SUFFIXES and magic:
            raise InputError(f"{self.source.name}: not {'gzip' if suffix == '.gz' else 'zstandard'} data, though its name ends in {suffix}")
        if suffix in _COMPRESSED_SUFFIXES:
            raise InputError(f"{self.source.name}: the compressed file is empty (0 bytes): it was cut")
        return _Plain(buffered)

    def _skip_mark(self) -> bytes:
        head = b""
        while len(head) < 4 and (block := self._read(1 << 18)):
            head += block
        for mark, encoding in _ENCODING_MARKS:
            if head.startswith(mark):
                raise InputError(f"{self.source.name}: this is {encoding}; convert it first, for instance: iconv -f {encoding} -t UTF-8")
        if head.startswith(_UTF8_MARK):
            self.offset = len(_UTF8_MARK)
            head = head[len(_UTF8_MARK) :]
        return head

    def _read(self, num_bytes: int) -> bytes:
        name = self.source.name
        try:
            return self._stream.read(num_bytes)
        except EOFError as error:
            raise InputError(f"{name}: the compressed data ends too early: the file was truncated; fetch it again") from error
        except (gzip.BadGzipFile, zlib.error, _ZstdDamage) as error:
            raise InputError(f"{name}: damaged compressed data ({error}); fetch it again") from error
        except OSError as error:
            raise InputError(f"cannot read {name}: {error.strerror or error}") from error


class _Plain:
    def __init__(self, raw: "io.BufferedReader[Any]") -> None:
        self._raw = raw

    def read(self, num_bytes: int, /) -> bytes:
        return self._raw.read1(num_bytes)


class _CountingReader(io.RawIOBase):
    """A raw reader over a binary file that counts what was taken. Closing it leaves the file open: stdin is not ours to close."""

    def __init__(self, file: IO[bytes], limit_bytes: int | None) -> None:
        self._file = file
        self._left = limit_bytes
        self._read = getattr(file, "read1", file.read)  # as much as a pipe has, without waiting for more
        self.num_bytes = 0
        self.head = b""
        """The first 4 bytes, read ahead to tell the compression; given out again."""
        while len(self.head) < 4 and (block := self._limited(4 - len(self.head), file.read)):
            self.head += block
        self._unread = self.head

    def _limited(self, num_bytes: int, read: Callable[[int], bytes]) -> bytes:
        if self._left is None:
            return read(num_bytes)
        block = read(min(num_bytes, self._left))
        self._left -= len(block)
        return block

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        block = self._unread[: len(buffer)] or self._limited(len(buffer), self._read)
        self._unread = self._unread[len(block) :]
        buffer[: len(block)] = block
        self.num_bytes += len(block)
        return len(block)


class _ZstdDamage(Exception):
    """Data that is not what a zstandard frame may hold."""


class _ZstdStream:
    """Frames of zstandard one after another. An own loop, because zstandard's stream_reader takes a cut file for a whole one."""

    def __init__(self, raw: "io.BufferedReader[Any]") -> None:
        import zstandard

        self._raw = raw
        self._decompressor = zstandard.ZstdDecompressor()
        self._error = zstandard.ZstdError
        self._frame = self._decompressor.decompressobj()
        self._fresh = True  # nothing of the current frame was read yet

    def read(self, num_bytes: int, /) -> bytes:
        while True:
            data = (self._frame.unused_data if self._frame.eof else b"") or self._raw.read1(_ZSTD_BLOCK_BYTES)
            if self._frame.eof:
                self._frame, self._fresh = self._decompressor.decompressobj(), True
            if not data:
                if not self._fresh:
                    raise EOFError
                return b""
            try:
                block = bytes(self._frame.decompress(data))
            except self._error as error:
                raise _ZstdDamage(str(error)) from error
            self._fresh = False
            if block:
                return block
