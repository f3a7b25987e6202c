"""Packed weights kept in files (core/cachefiles.py), so that the next start maps them instead of packing anew. Knows packed models.

A file is made from path, inode, size, time and header of each weight file, and how the weights are held.
"""

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmctl.core.cachefiles import FILLER, NUMPY_DTYPES, Content, directory, identity, keep, name_of, sha256_of
from llmctl.core.config.model import ModelConfig
from llmctl.core.errors import InputError, LlmctlError
from llmctl.core.files import sha256_file
from llmctl.core.native.library import PackedMatrix
from llmctl.core.native.packed import PackedModel, check_packed
from llmctl.core.sharedlib import ABI
from llmctl.core.tensorfile import TensorFile

SMALLEST_BYTES = 48 << 20
"""Smaller models are packed in less time than a second file takes to find its way to the disk."""
_FORMAT = 1


@dataclass(frozen=True)
class CacheKey:
    """What a packed model was made from and how."""

    facts: dict[str, Any]

    @classmethod
    def of(cls, files: Sequence[Path], *, held: str, quant: str | None) -> "CacheKey":
        """The key of weights in these files, held so. Raises OSError."""
        return cls({"format": _FORMAT, "abi": ABI, "held": held, "quant": quant, "files": [identity(path) for path in files]})

    @property
    def name(self) -> str:
        """File name in the cache."""
        return name_of(self.facts)


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

    def content() -> Content:
        arrays = dict(_arrays(packed))
        return arrays, {
            "kinds": json.dumps({name: [m.kind, m.outputs, m.inputs] for name, m in packed.matrices.items()}),
            "sha256": sha256_of(arrays),
            "sources": json.dumps([[str(source), sha256_file(source)] for source in sources]),
            "key": json.dumps(key.facts, sort_keys=True),
        }

    return keep(key.name, content, num_bytes=packed.num_bytes, what="packed weights")


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
        metadata = file.metadata
        if sha256_of(dict(_arrays(_from_file(file)))) != metadata["sha256"]:
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


def _from_file(file: TensorFile) -> PackedModel:
    """Raises KeyError and ValueError for a file that holds something else."""
    kinds: dict[str, tuple[int, int, int]] = json.loads(file.metadata["kinds"])
    parts: dict[str, dict[str, NDArray[Any]]] = {name: {} for name in kinds}
    vectors: dict[str, NDArray[np.float32]] = {}
    for entry in file.entries.values():
        if entry.name.startswith(FILLER):
            continue
        count = math.prod(entry.shape)
        array = np.frombuffer(file.buffer, NUMPY_DTYPES[entry.dtype], count, entry.start).reshape(entry.shape)
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
