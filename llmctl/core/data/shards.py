"""Token shards: memory-mapped files of token ids behind a checked header, and the folder that holds them.

Knows files, numpy and ids; knows no text, no sample order and no torch. Layout of one shard, little-endian:

    256 bytes            header: magic, version, bytes per id, num_tokens, num_documents, vocab_size, tokenizer
                         fingerprint, zeros, and the sha256 of all that
    num_tokens ids       uint16 or uint32, then zeros up to the next multiple of 8
    num_documents ends   uint64: where each document ends (exclusive, counted within the shard)

A document may run from one shard into the next; only the shard that holds its last id lists its end.
"""

import bisect
import contextlib
import hashlib
import mmap
import os
import struct
import typing
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from llmctl.core.errors import InputError, NotFoundError, is_write_failure, write_error
from llmctl.core.files import MANIFEST_NAME, TEMP_PREFIX, check_manifest, fsync_dir, read_manifest, sha256_file

if typing.TYPE_CHECKING:
    from llmctl.core.tokenizer import Tokenizer

Ids = npt.NDArray[np.int64]
Split = Literal["train", "val"]

SHARD_SUFFIX = ".tokens"
STATE_NAME = "pack-state.json"
"""Stands in a folder whose packing is under way or was interrupted; gone once manifest.json is there."""
TOKENIZER_DIR = "tokenizer"
MANIFEST_KIND = "llmctl-token-shards"

_MAGIC = b"LLMCTLTS"
_VERSION = 1
_FIELDS = struct.Struct("<8sIIQQQ32s")
_CHECKSUM_BYTES = 32
HEADER_BYTES = 256
_MAX_COUNT = 1 << 48
"""More ids than any shard holds; keeps the arithmetic on a hostile header within what a file can be."""


def id_dtype(vocab_size: int) -> "np.dtype[Any]":
    """The narrowest of uint16 and uint32 (little-endian) that holds every id below `vocab_size`."""
    if not 1 <= vocab_size <= 1 << 32:
        raise InputError(f"a vocabulary of {vocab_size:,} ids does not fit a token shard; from 1 to 2^32 are possible")
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def shard_name(split: str, index: int) -> str:
    """File name of shard `index` of a split: `train-00003.tokens`."""
    return f"{split}-{index:05d}{SHARD_SUFFIX}"


@dataclass(frozen=True, kw_only=True)
class ShardHeader:
    """What the first 256 bytes of a shard say. `fingerprint` is the tokenizer's, 64 hex digits."""

    dtype: "np.dtype[Any]"
    num_tokens: int
    num_documents: int
    vocab_size: int
    fingerprint: str

    def to_bytes(self) -> bytes:
        """The 256 bytes."""
        fields = _FIELDS.pack(
            _MAGIC, _VERSION, self.dtype.itemsize, self.num_tokens, self.num_documents, self.vocab_size, bytes.fromhex(self.fingerprint)
        ).ljust(HEADER_BYTES - _CHECKSUM_BYTES, b"\0")
        return fields + hashlib.sha256(fields).digest()

    @classmethod
    def from_bytes(cls, data: bytes, *, where: str) -> "ShardHeader":
        """Parse and check. Raises InputError that begins with `where`."""
        if len(data) < HEADER_BYTES:
            raise InputError(f"{where}: {len(data)} bytes are too few for a token shard; it was cut, pack the data again")
        fields, checksum = data[: HEADER_BYTES - _CHECKSUM_BYTES], data[HEADER_BYTES - _CHECKSUM_BYTES : HEADER_BYTES]
        magic, version, itemsize, num_tokens, num_documents, vocab_size, fingerprint = _FIELDS.unpack_from(fields)
        if magic != _MAGIC:
            raise InputError(f"{where}: not a token shard (it begins with {magic!r}); make one with `llmctl tokenize pack`")
        if hashlib.sha256(fields).digest() != checksum:
            raise InputError(f"{where}: the header does not match its checksum; it was damaged, pack the data again")
        if version != _VERSION:
            raise InputError(f"{where}: token shard version {version}, this llmctl reads version {_VERSION}; pack the data again")
        if itemsize not in (2, 4) or max(num_tokens, num_documents) > _MAX_COUNT:
            raise InputError(f"{where}: impossible header ({itemsize} bytes per id, {num_tokens} ids, {num_documents} documents)")
        dtype = np.dtype(f"<u{itemsize}")
        if not 1 <= vocab_size <= 1 << (8 * itemsize):
            raise InputError(f"{where}: a vocabulary of {vocab_size:,} ids does not fit {dtype.name}; pack the data again")
        return cls(dtype=dtype, num_tokens=num_tokens, num_documents=num_documents, vocab_size=vocab_size, fingerprint=fingerprint.hex())

    @property
    def ends_offset(self) -> int:
        """Where the document ends begin, in bytes from the start of the file."""
        return HEADER_BYTES + -(-self.num_tokens * self.dtype.itemsize // 8) * 8

    @property
    def file_bytes(self) -> int:
        """The exact size of the file."""
        return self.ends_offset + 8 * self.num_documents


class TokenShard:
    """One mapped shard: `tokens` (num_tokens,) uint16 or uint32 and `document_ends` (num_documents,) uint64."""

    def __init__(self, path: Path, header: ShardHeader, mapping: mmap.mmap) -> None:
        self.path = path
        self.header = header
        self._mapping = mapping
        self.tokens: npt.NDArray[Any] = np.frombuffer(mapping, header.dtype, header.num_tokens, HEADER_BYTES)
        self.document_ends: npt.NDArray[np.uint64] = np.frombuffer(mapping, "<u8", header.num_documents, header.ends_offset)

    @classmethod
    def open(cls, path: Path) -> "TokenShard":
        """Map a shard after checking header and size. Raises NotFoundError or InputError that names the file."""
        path = Path(path)
        try:
            with open(path, "rb") as file:
                header = ShardHeader.from_bytes(file.read(HEADER_BYTES), where=str(path))
                num_bytes = os.fstat(file.fileno()).st_size
                if num_bytes != header.file_bytes:
                    raise InputError(
                        f"{path} has {num_bytes:,} bytes, its header says {header.file_bytes:,}: it was cut or changed; pack the data again"
                    )
                mapping = mmap.mmap(file.fileno(), num_bytes, access=mmap.ACCESS_READ)
        except FileNotFoundError as error:
            raise NotFoundError(f"{path}: no such token shard") from error
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror or error}") from error
        return cls(path, header, mapping)

    def check_size(self) -> None:
        """Raise InputError if the file, the mapped one or the one now at its path, has lost or changed its size.

        Touching a mapped page beyond the end of its file is SIGBUS, which no Python code survives: look first. A cut
        between this look and the read that follows can still end that way.
        """
        try:
            sizes = (self._mapping.size(), os.stat(self.path).st_size)
        except OSError as error:
            raise InputError(f"{self.path} went away while it was in use ({error.strerror}); put it back, then resume") from error
        for num_bytes in sizes:
            if num_bytes != self.header.file_bytes:
                raise InputError(
                    f"{self.path} has {num_bytes:,} bytes, {self.header.file_bytes:,} when it was opened: it was changed while in use;"
                    " put it back or pack the data again, then resume"
                )


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """A finished shard, as the manifest lists it."""

    name: str
    num_bytes: int
    sha256: str
    num_tokens: int
    num_documents: int


class ShardWriter:
    """Writes one shard through a temporary file; memory holds only the document ends (8 bytes each)."""

    def __init__(self, path: Path, *, vocab_size: int, fingerprint: str) -> None:
        self.path = Path(path)
        self.num_tokens = 0
        self._dtype = id_dtype(vocab_size)
        self._vocab_size = vocab_size
        self._fingerprint = fingerprint
        self._ends = array("Q")
        self._temp = self.path.with_name(TEMP_PREFIX + self.path.name)
        with self._telling_path():
            self._file = open(self._temp, "wb", buffering=1 << 20)  # noqa: SIM115 (closed by finish or abort)
            self._file.write(bytes(HEADER_BYTES))

    def write(self, ids: npt.NDArray[Any]) -> None:
        """Append ids (n,) of any integer type. Raises InputError for an id outside the vocabulary, WriteError for a full disk."""
        if not len(ids):
            return
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self._vocab_size:
            raise InputError(
                f"the tokenizer gave the id {low if low < 0 else high}, outside its vocabulary of {self._vocab_size:,}; it is damaged"
            )
        with self._telling_path():
            self._file.write(np.ascontiguousarray(ids, dtype=self._dtype).data)
        self.num_tokens += len(ids)

    def end_documents(self, ends: npt.NDArray[Any]) -> None:
        """Note that documents end with the ids before the places `ends` (n,), counted from the start of the shard."""
        self._ends.frombytes(ends.astype(np.uint64).tobytes())

    def end_document(self) -> None:
        """Note that a document ends with the last id written."""
        self._ends.append(self.num_tokens)

    def finish(self) -> ShardInfo:
        """Make the shard appear under its name, whole and durable."""
        header = ShardHeader(
            dtype=self._dtype,
            num_tokens=self.num_tokens,
            num_documents=len(self._ends),
            vocab_size=self._vocab_size,
            fingerprint=self._fingerprint,
        )
        with self._telling_path():
            self._file.write(bytes(header.ends_offset - HEADER_BYTES - self.num_tokens * self._dtype.itemsize))
            self._file.write(np.asarray(self._ends, dtype="<u8").tobytes())
            self._file.seek(0)
            self._file.write(header.to_bytes())
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            sha256 = sha256_file(self._temp)  # read back, so the hash is of what the disk took
            os.replace(self._temp, self.path)
            fsync_dir(self.path.parent)
        return ShardInfo(
            name=self.path.name,
            num_bytes=header.file_bytes,
            sha256=sha256,
            num_tokens=self.num_tokens,
            num_documents=len(self._ends),
        )

    def abort(self) -> None:
        """Remove the unfinished file. Safe to call at any time, also after `finish`."""
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            os.unlink(self._temp)

    @contextlib.contextmanager
    def _telling_path(self) -> typing.Iterator[None]:
        try:
            yield
        except OSError as error:
            if is_write_failure(error):
                raise write_error(error, path=self.path) from error
            raise


class TokenDataset:
    """One split of a packed folder, read as a single stream of ids across its shards.

    `num_bytes` is the UTF-8 size of the text behind the ids. `data_hash` (64 hex) is a hash of the shards' sha256 as the
    manifest lists them, so it costs no reading of the data, and changes whenever an id or a document end does.
    """

    def __init__(self, directory: Path, split: Split, manifest: dict[str, Any], shards: list[TokenShard]) -> None:
        entry = manifest["splits"][split]
        self.directory = directory
        self.split = split
        self.shards = shards
        self.tokenizer_fingerprint: str = manifest["tokenizer_fingerprint"]
        self.vocab_size: int = manifest["vocab_size"]
        self.num_documents: int = entry["num_documents"]
        self.num_bytes: int = entry["num_bytes"]
        self._starts = [0]
        for shard in shards:
            self._starts.append(self._starts[-1] + shard.header.num_tokens)
        self.num_tokens = self._starts[-1]
        self.data_hash = data_hash(split, [manifest["files"][shard.path.name]["sha256"] for shard in shards], self.tokenizer_fingerprint)

    @classmethod
    def open(cls, directory: Path, split: Split = "train") -> "TokenDataset":
        """Open a split after checking the manifest, the sizes of all files and the headers of the split's shards.

        Raises NotFoundError when the folder or the split is not there, InputError when something does not match.
        """
        directory = Path(directory)
        manifest = read_pack_manifest(directory)
        names = manifest["splits"].get(split, {}).get("shards", [])
        if not names:
            raise NotFoundError(f"{directory} holds no {split} split; pack again with --val-fraction above 0, or name other data")
        shards = [TokenShard.open(directory / name) for name in names]
        for shard in shards:
            check_header(shard, manifest)
        dataset = cls(directory, split, manifest, shards)
        if dataset.num_tokens != manifest["splits"][split]["num_tokens"]:
            raise InputError(f"{directory / MANIFEST_NAME}: the shards of {split} hold {dataset.num_tokens:,} ids, not what it says")
        return dataset

    def tokens_at(self, start: int, count: int) -> Ids:
        """A copy of the ids [start, start + count), (count,) int64. Raises InputError if a shard was changed while in use."""
        if start < 0 or count < 0 or start + count > self.num_tokens:
            raise IndexError(f"ids {start} to {start + count} of {self.num_tokens}")
        result = np.empty(count, dtype=np.int64)
        filled = 0
        for shard, first, last in self._parts(start, count):
            shard.check_size()
            result[filled : filled + last - first] = shard.tokens[first:last]
            filled += last - first
        return result

    def document_lengths_at(self, start: int, count: int) -> tuple[int, ...]:
        """How the ids [start, start + count) fall into documents: lengths that sum to `count`, the first and last maybe parts."""
        ends: list[int] = []
        position = start
        for shard, first, last in self._parts(start, count):
            shard.check_size()
            # uint64 on both sides: numpy would turn the whole array into floats to compare it with plain ints
            low, high = np.searchsorted(shard.document_ends, np.array((first, last), dtype=np.uint64), side="right")
            ends += [int(end) - first + position - start for end in shard.document_ends[low:high]]
            position += last - first
        if count and (not ends or ends[-1] != count):
            ends.append(count)
        return tuple(b - a for a, b in zip([0, *ends], ends, strict=False))

    def tokenizer(self) -> "Tokenizer":
        """The tokenizer that made the ids, from the copy kept in the folder. Raises InputError if it is another one."""
        from llmctl.core.tokenizer import Tokenizer

        tokenizer = Tokenizer.load(self.directory / TOKENIZER_DIR)
        if tokenizer.fingerprint != self.tokenizer_fingerprint:
            raise InputError(
                f"{self.directory / TOKENIZER_DIR}: its fingerprint is {tokenizer.fingerprint},"
                f" the shards were made with {self.tokenizer_fingerprint}; pack the data again"
            )
        return tokenizer

    def _parts(self, start: int, count: int) -> typing.Iterator[tuple[TokenShard, int, int]]:
        """The shards under [start, start + count), each with its local range."""
        stop = start + count
        index = bisect.bisect_right(self._starts, start) - 1
        while start < stop:
            base = self._starts[index]
            last = min(stop, self._starts[index + 1])
            if last > start:
                yield self.shards[index], start - base, last - base
            start, index = last, index + 1


def check_header(shard: TokenShard, manifest: dict[str, Any]) -> None:
    """Raise InputError where a shard's header and the manifest of its folder disagree."""
    found = (shard.header.dtype.name, shard.header.vocab_size, shard.header.fingerprint)
    wanted = (manifest["dtype"], manifest["vocab_size"], manifest["tokenizer_fingerprint"])
    for what, a, b in zip(("dtype", "vocabulary size", "tokenizer fingerprint"), found, wanted, strict=True):
        if a != b:
            raise InputError(f"{shard.path}: {what} is {a} in its header, {b} in {MANIFEST_NAME}; pack the data again")


def data_hash(split: str, shard_sha256: list[str], fingerprint: str) -> str:
    """Identity of a split: sha256 over its name, the tokenizer's fingerprint and the shards' hashes in order."""
    return hashlib.sha256("\n".join([split, fingerprint, *shard_sha256]).encode()).hexdigest()


def read_pack_manifest(directory: Path, *, check_sizes: bool = True) -> dict[str, Any]:
    """The manifest of a packed folder, fields checked for their types, and the sizes of all its files if `check_sizes`.

    Raises NotFoundError when the folder is not there, InputError when it is unfinished, damaged or not ours.
    """
    if not directory.is_dir():
        raise NotFoundError(f"{directory}: no such folder; make it with `llmctl tokenize pack`")
    if not (directory / MANIFEST_NAME).exists():
        if (directory / STATE_NAME).exists():
            raise InputError(f"{directory}: its packing was not finished; run the same `llmctl tokenize pack` command again")
        raise NotFoundError(f"{directory} holds no packed data (no {MANIFEST_NAME}); make it with `llmctl tokenize pack`")
    manifest = check_manifest(directory, hashes=False) if check_sizes else read_manifest(directory)
    where = directory / MANIFEST_NAME
    kinds = {"kind": str, "dtype": str, "vocab_size": int, "tokenizer_fingerprint": str, "splits": dict}
    if manifest.get("kind") != MANIFEST_KIND or any(not isinstance(manifest.get(key), kind) for key, kind in kinds.items()):
        raise InputError(f"{where}: not the manifest of packed data; make it with `llmctl tokenize pack`")
    for split, entry in manifest["splits"].items():
        numbers = isinstance(entry, dict) and all(isinstance(entry.get(k), int) for k in ("num_tokens", "num_documents", "num_bytes"))
        names = entry.get("shards") if isinstance(entry, dict) else None
        if not numbers or not isinstance(names, list) or not all(isinstance(n, str) and n in manifest["files"] for n in names):
            raise InputError(f"{where}: the entry of the split {split!r} is malformed; pack the data again")
    return manifest
