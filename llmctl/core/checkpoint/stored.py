"""The tensors of a model directory, mapped rather than read, and matched with a family's names. Numpy; no torch.

bf16 numbers come as uint16, since numpy has no bf16.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmctl.core.checkpoint.folder import bindings_of, check_names
from llmctl.core.config.model import ModelConfig
from llmctl.core.errors import InputError
from llmctl.core.families import Family
from llmctl.core.families.base import Binding
from llmctl.core.tensorfile import INDEX_NAME, TensorEntry, TensorFile, weight_files

WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16")
CODE_DTYPES = ("I8", "U8")
"""Of the codes of quantised weights."""
_NUMPY_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I8": np.int8, "U8": np.uint8}


@dataclass(frozen=True)
class Stored:
    """A tensor of a weight file, not touched yet."""

    file: TensorFile
    entry: TensorEntry

    def array(self) -> NDArray[Any]:
        """The tensor, mapped where its alignment allows it; bf16 as uint16."""
        entry, dtype = self.entry, np.dtype(_NUMPY_DTYPES[self.entry.dtype])
        if entry.num_bytes == 0:
            return np.empty(entry.shape, dtype=dtype)
        if entry.start % dtype.itemsize:  # the format does not promise alignment, vector loads need it
            raw = bytearray(self.file.buffer[entry.start : entry.start + entry.num_bytes])
            return np.frombuffer(raw, dtype=dtype).reshape(entry.shape)
        return np.frombuffer(self.file.buffer, dtype=dtype, count=math.prod(entry.shape), offset=entry.start).reshape(entry.shape)

    def forget(self) -> None:
        """Give the memory of its pages back."""
        self.file.forget(self.entry)


def stored_tensors(folder: Path, config: ModelConfig, family: Family) -> list[tuple[Binding, Stored]]:
    """Every tensor that the model wants, in order, with what it stands for; the embeddings come first.

    Raises NotFoundError when there are no weights, InputError when they are bad, unsafe or do not fit the config.
    """
    bindings = bindings_of(family, config)
    wanted = {binding.theirs for binding in bindings}
    found = _with_prefix(open_tensors(folder), family, wanted)
    for name in sorted(found.keys() - wanted):
        tied = config.tie_embeddings and name in family.head_names
        if name.endswith(family.ignored) or (tied and _is_copy(found, name, bindings[0].theirs)):
            del found[name]
    try:
        check_names({name: stored.entry.shape for name, stored in found.items()}, bindings, what=f"{family.name} model")
    except InputError as error:
        raise InputError(f"{folder}: {error}") from error
    return [(binding, found[binding.theirs]) for binding in bindings]


def stored_arrays(tensors: list[tuple[Binding, Stored]]) -> Iterator[tuple[str, NDArray[Any]]]:
    """The decoder's names and arrays: float32, or bf16 as uint16. Views of the files, except of float16 and float64 numbers."""
    for binding, stored in tensors:
        source = stored.array()
        if source.dtype not in (np.float32, np.uint16):
            source = source.astype(np.float32)
        yield from zip(binding.ours, binding.rule.to_ours(source, binding.our_shapes), strict=True)


def _with_prefix(found: dict[str, Stored], family: Family, wanted: set[str]) -> dict[str, Stored]:
    """A checkpoint of the bare trunk (GPT-2 on the hub) leaves the prefix off; put it back."""
    if any(name.startswith(family.trunk_prefix) for name in found):
        return found
    return {name if name in wanted else family.trunk_prefix + name: stored for name, stored in found.items()}


def _is_copy(found: dict[str, Stored], name: str, original: str) -> bool:
    if original not in found or found[name].entry.dtype != found[original].entry.dtype:
        return False
    return np.array_equal(found[name].array(), found[original].array())


def open_tensors(folder: Path, *, dtypes: Sequence[str] = WEIGHT_DTYPES) -> dict[str, Stored]:
    """Every tensor of the weight files of `folder`, mapped. Raises InputError for a tensor that is there twice."""
    found: dict[str, Stored] = {}
    for path, listed in weight_files(folder).items():
        file = TensorFile(path)
        if listed is not None and listed != file.entries.keys():
            odd = sorted(listed ^ file.entries.keys())[0]
            says = "lists a tensor that is not in it" if odd in listed else "does not list its tensor"
            raise InputError(f"{path}: {INDEX_NAME} {says}: {odd!r}")
        for name, entry in file.entries.items():
            if name in found:
                raise InputError(f"{path}: tensor {name!r} is in another file too")
            if entry.dtype not in dtypes:
                raise InputError(f"{path}: tensor {name!r} has the dtype {entry.dtype}, weights are {', '.join(dtypes)}")
            found[name] = Stored(file, entry)
    return found
