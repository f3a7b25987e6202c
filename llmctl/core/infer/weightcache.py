"""Packed weights kept in files, so that the next start maps them instead of packing anew. Knows packed models and files; no model.

A file is safetensors, each array at a multiple of 64 bytes, under a name that is a hash of what it was made from: path, inode,
size, time and header of each weight file, and how the weights are held. It appears whole or not at all, two processes that make
it at once make the same, and the files that were used longest ago go when all take more than the limit.

LLMCTL_CACHE_DIR says where (default: llmctl in $XDG_CACHE_HOME or ~/.cache), LLMCTL_CACHE_BYTES how much; 0 turns it off.
"""

import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmctl.core.config.model import ModelConfig
from llmctl.core.errors import InputError, LlmctlError, UsageError
from llmctl.core.files import TEMP_PREFIX, atomic_write, sha256_file
from llmctl.core.native.library import PackedMatrix
from llmctl.core.native.packed import PackedModel, check_packed
from llmctl.core.sharedlib import ABI
from llmctl.core.tensorfile import TensorFile

DIRECTORY_VARIABLE, BYTES_VARIABLE = "LLMCTL_CACHE_DIR", "LLMCTL_CACHE_BYTES"
DEFAULT_BYTES = 16 << 30
SMALLEST_BYTES = 48 << 20
"""Smaller models are packed in less time than a second file takes to find its way to the disk."""
_FORMAT = 1
_ALIGNMENT = 64
_DTYPES = {"float32": "F32", "uint16": "BF16", "uint8": "U8", "float16": "F16"}
_NUMPY = {theirs: np.dtype(ours) for ours, theirs in _DTYPES.items()}
_HASHED_HEADER_BYTES = 4 << 20
_STALE_S = 3600.0


@dataclass(frozen=True)
class CacheKey:
    """What a packed model was made from and how."""

    facts: dict[str, Any]

    @classmethod
    def of(cls, files: Sequence[Path], *, held: str, quant: str | None) -> "CacheKey":
        """The key of weights in these files, held so. Raises OSError."""
        return cls({"format": _FORMAT, "abi": ABI, "held": held, "quant": quant, "files": [_identity(path) for path in files]})

    @property
    def name(self) -> str:
        """File name in the cache."""
        return hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()[:40] + ".safetensors"


def _identity(path: Path) -> list[Any]:
    """What changes when a file does: hashing all of it would cost half a start."""
    resolved = path.resolve()
    status = resolved.stat()
    with resolved.open("rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        # a safetensors file says how long its header is; of another, GGUF, the first megabytes hold it
        file.seek(0)
        header = file.read(min(length + 8 if length < _HASHED_HEADER_BYTES else _HASHED_HEADER_BYTES, _HASHED_HEADER_BYTES))
    where = os.fsencode(resolved).decode("utf-8", "surrogateescape").encode("unicode_escape", "surrogatepass").decode()
    return [where, status.st_ino, status.st_size, status.st_mtime_ns, hashlib.sha256(header).hexdigest()]


def directory() -> Path | None:
    """Where packed weights are kept, or None when they are not."""
    if limit_bytes() == 0:
        return None
    given = os.environ.get(DIRECTORY_VARIABLE)
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    if base and os.path.isabs(base):
        return Path(base) / "llmctl"
    home = os.environ.get("HOME")
    return Path(home) / ".cache" / "llmctl" if home and os.path.isabs(home) else None


def limit_bytes() -> int:
    """How much all files may take. Raises UsageError for a value that is no whole number."""
    text = os.environ.get(BYTES_VARIABLE)
    if not text:
        return DEFAULT_BYTES
    if not text.isdecimal():
        raise UsageError(f"{BYTES_VARIABLE}={text}: a whole number of bytes is wanted, 0 to keep no packed weights")
    return int(text)


def load(key: CacheKey, config: ModelConfig) -> PackedModel | None:
    """The packed weights of a key, mapped; None when there are none, or none that can be used."""
    folder = directory()
    if folder is None:
        return None
    path = folder / key.name
    try:
        file = TensorFile(path)
        packed = _from_file(file)
        check_packed(config, packed)
        os.utime(path)
    except (LlmctlError, OSError, ValueError, KeyError, TypeError):
        return None
    return packed


def store(key: CacheKey, packed: PackedModel, *, sources: Sequence[Path]) -> str | None:
    """Keep packed weights, and let old files go. Gives why they are not kept, or None; a cache never fails a command."""
    folder = directory()
    if folder is None:
        return "the cache of packed weights is off"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_stale(folder)
        status = os.statvfs(folder)
        if packed.num_bytes > limit_bytes() or 2 * packed.num_bytes > status.f_bavail * status.f_frsize:
            return f"no room for {packed.num_bytes:,} bytes of packed weights in {folder}"
        path = folder / key.name
        if path.exists():
            return None
        arrays = dict(_arrays(packed))
        metadata = {
            "kinds": json.dumps({name: [m.kind, m.outputs, m.inputs] for name, m in packed.matrices.items()}),
            "sha256": _hash(arrays),
            "sources": json.dumps([[str(source), sha256_file(source)] for source in sources]),
            "key": json.dumps(key.facts, sort_keys=True),
        }
        with atomic_write(path) as file:
            for piece in _pieces(arrays, metadata):
                file.write(piece)
        _shrink(folder, keep=path)
    except (LlmctlError, OSError) as error:
        return f"packed weights are not kept: {error}"
    return None


def verify(key: CacheKey) -> str | None:
    """Check the file of a key against the hashes in it, of itself and of what it was made from; remove it when it is wrong.

    Gives its path, or None when there is none. Raises InputError that says what is wrong.
    """
    folder = directory()
    path = None if folder is None else folder / key.name
    if path is None or not path.is_file():
        return None
    try:
        file = TensorFile(path)
        metadata = _metadata(path)
        if _hash(dict(_arrays(_from_file(file)))) != metadata["sha256"]:
            raise InputError(f"{path}: sha256 mismatch: the packed weights are damaged")
        for source, wanted in json.loads(metadata["sources"]):
            if sha256_file(Path(source)) != wanted:
                raise InputError(f"{path}: {source} has changed since it was packed, though its size and time have not")
    except (KeyError, ValueError) as error:
        path.unlink(missing_ok=True)
        raise InputError(f"{path}: no file of packed weights ({error}); it was removed and is made anew at the next start") from error
    except InputError as error:
        path.unlink(missing_ok=True)
        raise InputError(f"{error}; it was removed and is made anew at the next start") from error
    return str(path)


def _arrays(packed: PackedModel) -> Iterator[tuple[str, NDArray[Any]]]:
    for name, matrix in packed.matrices.items():
        for part, array in matrix.arrays().items():
            yield f"matrix {name} {part}", array
    for name, vector in packed.vectors.items():
        yield f"vector {name}", vector


def _pieces(arrays: dict[str, NDArray[Any]], metadata: dict[str, str]) -> Iterator[Any]:
    """The file: its header, then the arrays, with fillers so that each begins at a multiple of 64 bytes."""
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    fillers: list[int] = []
    for name, array in arrays.items():
        header[name] = {"dtype": _DTYPES[str(array.dtype)], "shape": list(array.shape), "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
        fillers.append(-offset % _ALIGNMENT)
        if fillers[-1]:
            header[f"filler {name}"] = {"dtype": "U8", "shape": [fillers[-1]], "data_offsets": [offset, offset + fillers[-1]]}
            offset += fillers[-1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    yield len(text).to_bytes(8, "little") + text
    for array, filler in zip(arrays.values(), fillers, strict=True):
        yield np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        yield bytes(filler)


def _metadata(path: Path) -> dict[str, str]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        metadata = json.loads(file.read(min(length, 16 << 20)))["__metadata__"]
    return dict(metadata)


def _from_file(file: TensorFile) -> PackedModel:
    """Raises KeyError and ValueError for a file that holds something else."""
    kinds: dict[str, tuple[int, int, int]] = json.loads(_metadata(file.path)["kinds"])
    parts: dict[str, dict[str, NDArray[Any]]] = {name: {} for name in kinds}
    vectors: dict[str, NDArray[np.float32]] = {}
    for entry in file.entries.values():
        if entry.name.startswith("filler "):
            continue
        count = math.prod(entry.shape)
        array = np.frombuffer(file.buffer, _NUMPY[entry.dtype], count, entry.start).reshape(entry.shape)
        what, _, rest = entry.name.partition(" ")
        if what == "vector":
            vectors[rest] = array
        else:
            name, _, part = rest.rpartition(" ")
            parts[name][part] = array
    matrices = {}
    for name, arrays in parts.items():
        kind, outputs, inputs = kinds[name]
        matrices[name] = PackedMatrix(kind=kind, outputs=outputs, inputs=inputs, **arrays)
    return PackedModel(matrices, vectors)


def _hash(arrays: dict[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for name, array in arrays.items():
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _remove_stale(folder: Path) -> None:
    """What a killed process left half written."""
    for path in folder.glob(f"{TEMP_PREFIX}*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE_S:
                path.unlink()


def _shrink(folder: Path, *, keep: Path) -> None:
    """Remove files, the one used longest ago first, until all fit the limit. Who has one mapped keeps it until it ends."""
    found = []
    for path in folder.glob("*.safetensors"):
        with contextlib.suppress(OSError):
            status = path.stat()
            found.append((status.st_mtime_ns, status.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= limit_bytes():
            return
        if path != keep:
            with contextlib.suppress(OSError):
                path.unlink()
                total -= size
