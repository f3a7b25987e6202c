"""Checks a packed folder to the last byte: hashes, headers, ids, document ends, totals. Knows shards; changes nothing."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmctl.core.data.shards import SHARD_SUFFIX, TOKENIZER_DIR, TokenShard, check_header, read_pack_manifest
from llmctl.core.errors import Interrupted, LlmctlError
from llmctl.core.files import MANIFEST_NAME, safe_relative

_BLOCK_BYTES = 1 << 22
_BLOCK_IDS = 1 << 22


@dataclass(frozen=True)
class VerifyProgress:
    """Bytes of the folder's files read so far."""

    num_bytes_done: int
    num_bytes: int


@dataclass(frozen=True)
class FileChecked:
    """A file is what the manifest says."""

    name: str
    num_bytes: int


@dataclass(frozen=True)
class DamageFound:
    """Something is wrong; `message` names the file, what was found and what was wanted."""

    name: str
    message: str


@dataclass(frozen=True)
class Verified:
    """The end: the folder is sound if `num_damaged` is 0."""

    directory: str
    num_files: int
    num_bytes: int
    num_tokens: int
    num_documents: int
    num_damaged: int


VerifyEvent = VerifyProgress | FileChecked | DamageFound | Verified


def verify(directory: Path, *, stop: Callable[[], int | None] = lambda: None) -> Iterator[VerifyEvent]:
    """Check every file of a packed folder, as events that end with Verified.

    Raises NotFoundError when there is none, InputError when its manifest cannot be read, Interrupted when `stop` gives a signal.
    """
    manifest = read_pack_manifest(directory, check_sizes=False)
    total = sum(entry["num_bytes"] for entry in manifest["files"].values())
    done = 0
    damaged: set[str] = set()
    for name, entry in manifest["files"].items():
        path = directory / safe_relative(name, where=str(directory / MANIFEST_NAME))
        digest, read = hashlib.sha256(), 0
        try:
            with open(path, "rb") as file:
                while block := file.read(_BLOCK_BYTES):
                    digest.update(block)
                    read += len(block)
                    yield VerifyProgress(done + read, total)
                    if (number := stop()) is not None:
                        raise Interrupted("stopped; nothing was changed", signal_number=number)
            message = _file_damage(path, read, digest.hexdigest(), entry)
        except FileNotFoundError:
            message = f"{path} is missing, but {MANIFEST_NAME} lists it"
        except OSError as error:
            message = f"cannot read {path}: {error.strerror}"
        done += entry["num_bytes"]
        if message is None and path.name.endswith(SHARD_SUFFIX):
            message = _shard_damage(path, manifest)
        if message is None:
            yield FileChecked(name, read)
        else:
            damaged.add(name)
            yield DamageFound(name, message)
    for name, message in _folder_damage(directory, manifest, damaged):
        damaged.add(name)
        yield DamageFound(name, message)
    yield Verified(
        directory=str(directory),
        num_files=len(manifest["files"]),
        num_bytes=total,
        num_tokens=sum(entry["num_tokens"] for entry in manifest["splits"].values()),
        num_documents=sum(entry["num_documents"] for entry in manifest["splits"].values()),
        num_damaged=len(damaged),
    )


def _file_damage(path: Path, num_bytes: int, sha256: str, entry: dict[str, Any]) -> str | None:
    if num_bytes != entry["num_bytes"]:
        return f"{path} has {num_bytes:,} bytes, {MANIFEST_NAME} says {entry['num_bytes']:,}: it was cut or changed"
    if sha256 != entry["sha256"]:
        return f"{path}: sha256 mismatch with {MANIFEST_NAME}: the content was changed"
    return None


def _shard_damage(path: Path, manifest: dict[str, Any]) -> str | None:
    """What is wrong inside a shard whose hash is right: a packer's fault, or a manifest made for it."""
    try:
        shard = TokenShard.open(path)
        check_header(shard, manifest)
    except LlmctlError as error:
        return str(error)
    highest = max((int(shard.tokens[i : i + _BLOCK_IDS].max()) for i in range(0, len(shard.tokens), _BLOCK_IDS)), default=0)
    if highest >= shard.header.vocab_size:
        return f"{path}: the id {highest} is outside the vocabulary of {shard.header.vocab_size:,}"
    ends = shard.document_ends
    if len(ends) and (ends[0] == 0 or ends[-1] > len(shard.tokens) or not bool(np.all(ends[1:] > ends[:-1]))):
        return f"{path}: the document ends are not in order, or outside the shard"
    eos_id = manifest.get("eos_id")
    if isinstance(eos_id, int) and not bool(np.all(shard.tokens[ends.astype(np.int64) - 1] == eos_id)):
        return f"{path}: a document does not end with the end-of-text id {eos_id}"
    return None


def _folder_damage(directory: Path, manifest: dict[str, Any], damaged: set[str]) -> Iterator[tuple[str, str]]:
    """What no single file shows: totals, the tokenizer's identity, shards that are not listed."""
    for split, entry in manifest["splits"].items():
        if damaged.isdisjoint(entry["shards"]):
            shards = [TokenShard.open(directory / name) for name in entry["shards"]]
            found = (sum(s.header.num_tokens for s in shards), sum(s.header.num_documents for s in shards))
            if found != (entry["num_tokens"], entry["num_documents"]):
                message = (
                    f"{directory / MANIFEST_NAME}: the shards of {split} hold {found[0]:,} ids in {found[1]:,} documents, not what it says"
                )
                yield MANIFEST_NAME, message
    if not any(name.startswith(f"{TOKENIZER_DIR}/") for name in damaged):
        from llmctl.core.tokenizer import Tokenizer

        try:
            fingerprint = Tokenizer.load(directory / TOKENIZER_DIR).fingerprint
        except LlmctlError as error:
            yield TOKENIZER_DIR, str(error)
        else:
            if fingerprint != manifest["tokenizer_fingerprint"]:
                wanted = manifest["tokenizer_fingerprint"]
                yield TOKENIZER_DIR, f"{directory / TOKENIZER_DIR}: its fingerprint is {fingerprint}, the shards were made with {wanted}"
    for path in sorted(directory.glob(f"*{SHARD_SUFFIX}")):
        if path.name not in manifest["files"] and not path.name.startswith("."):
            yield path.name, f"{path}: a token shard that {MANIFEST_NAME} does not list"
