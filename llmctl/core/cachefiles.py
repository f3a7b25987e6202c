"""Files that are made from others and kept, so that the next start maps them. Knows arrays, names and room; knows no model.

A file is safetensors, each array at a multiple of 64 bytes, under a name that is a hash of what it was made from. It appears
whole or not at all, two processes that make it at once make the same, and the files that were used longest ago go when all
take more than the limit.

LLMCTL_CACHE_DIR says where (default: llmctl in $XDG_CACHE_HOME or ~/.cache), LLMCTL_CACHE_BYTES how much; 0 turns it off.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmctl.core.errors import LlmctlError, UsageError
from llmctl.core.files import TEMP_PREFIX, atomic_write

DIRECTORY_VARIABLE, BYTES_VARIABLE = "LLMCTL_CACHE_DIR", "LLMCTL_CACHE_BYTES"
DEFAULT_BYTES = 16 << 30
_ALIGNMENT = 64
_DTYPES = {"float32": "F32", "uint16": "BF16", "uint8": "U8", "float16": "F16"}
NUMPY_DTYPES = {theirs: np.dtype(ours) for ours, theirs in _DTYPES.items()}
FILLER = "filler "
"""What the names of arrays begin with that hold nothing."""
_HASHED_HEADER_BYTES = 4 << 20
_STALE_S = 3600.0

Content = tuple[dict[str, NDArray[Any]], dict[str, str]]
"""Arrays and metadata."""


def identity(path: Path) -> list[Any]:
    """What changes when a file does: hashing all of a large one would cost half a start. Raises OSError."""
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


def name_of(facts: Mapping[str, Any]) -> str:
    """The name of the file that is made from what `facts` say."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:40] + ".safetensors"


def directory() -> Path | None:
    """Where files are kept, or None when they are not."""
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


def keep(name: str, content: Callable[[], Content], *, num_bytes: int, what: str) -> str | None:
    """Keep what `content` gives, if there is room for `num_bytes`, and let old files go. Gives why it is not kept, or None.

    `what` names it in messages. A cache never fails a command.
    """
    folder = directory()
    if folder is None:
        return f"the cache of {what} is off"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_stale(folder)
        status = os.statvfs(folder)
        if num_bytes > limit_bytes() or 2 * num_bytes > status.f_bavail * status.f_frsize:
            return f"no room for {num_bytes:,} bytes of {what} in {folder}"
        path = folder / name
        if path.exists():
            return None
        arrays, metadata = content()
        with atomic_write(path) as file:
            for piece in _pieces(arrays, metadata):
                file.write(piece)
        _shrink(folder, keep=path)
    except (LlmctlError, OSError) as error:
        return f"{what} are not kept: {error}"
    return None


def sha256_of(arrays: Mapping[str, NDArray[Any]]) -> str:
    """64 hex digits of names and contents."""
    digest = hashlib.sha256()
    for name, array in arrays.items():
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _pieces(arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> Iterator[Any]:
    """The file: its header, then the arrays, with fillers so that each begins at a multiple of 64 bytes."""
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    fillers: list[int] = []
    for name, array in arrays.items():
        header[name] = {"dtype": _DTYPES[str(array.dtype)], "shape": list(array.shape), "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
        fillers.append(-offset % _ALIGNMENT)
        if fillers[-1]:
            header[f"{FILLER}{name}"] = {"dtype": "U8", "shape": [fillers[-1]], "data_offsets": [offset, offset + fillers[-1]]}
            offset += fillers[-1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    yield len(text).to_bytes(8, "little") + text
    for array, filler in zip(arrays.values(), fillers, strict=True):
        yield np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        yield bytes(filler)


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
