"""A GGUF file matched with the decoder's tensors: its facts, and its numbers under our names. Numpy; no torch."""

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmctl.core.checkpoint.folder import check_names
from llmctl.core.config.model import ModelConfig
from llmctl.core.errors import InputError
from llmctl.core.families.base import Binding, bind
from llmctl.core.families.gguf import GgufFamily, gguf_family, halves_from_pairs
from llmctl.core.families.gguf_metadata import Metadata
from llmctl.core.families.gguf_names import HEAD
from llmctl.core.families.gguf_rope import ROPE_TENSORS, with_rope_tensors
from llmctl.core.gguf import GgufFile, GgufTensor
from llmctl.core.model.facts import tensor_shapes

_EMBEDDINGS = "token_embd.weight"


@dataclass(frozen=True)
class GgufModel:
    """A file whose tensors are those that its metadata asks for. `bindings` say which of ours each of its tensors holds."""

    file: GgufFile
    record: GgufFamily
    config: ModelConfig
    bindings: tuple[Binding, ...]

    def entry(self, binding: Binding) -> GgufTensor:
        """Where the tensor of a binding lies."""
        return self.file.tensors[binding.theirs]

    @property
    def stored(self) -> str:
        """The type of the embeddings, which stands for the number format of the model: "F32", "BF16", "Q4_1", ..."""
        return self.file.tensors[_EMBEDDINGS].kind

    def arrays(self, binding: Binding) -> Iterator[tuple[str, NDArray[Any]]]:
        """Our names and numbers of one tensor of the file, float32, or float16 as stored; views of the map where they can be."""
        for name, array in zip(binding.ours, self._parts(binding), strict=True):
            if self.record.reorders(name):
                array = halves_from_pairs(array, self.config.head_dim)
            shift = self.record.norm_shift(name)
            yield name, array - np.float32(shift) if shift else array

    def _parts(self, binding: Binding) -> Iterable[NDArray[Any]]:
        entry = self.entry(binding)
        if not binding.rule.stacks:
            return binding.rule.to_ours(self.file.array(entry), binding.our_shapes)
        # one expert after the other: the numbers of all of them can take several times the memory of the file
        size = entry.num_bytes // len(binding.ours)
        places = (entry.start + expert * size for expert in range(len(binding.ours)))
        return (self.file.array(dataclasses.replace(entry, shape=entry.shape[1:], start=start, num_bytes=size)) for start in places)


def open_gguf(path: Path) -> GgufModel:
    """Open a `.gguf` file as a model. Raises NotFoundError, and InputError for a bad file or one that does not fit itself."""
    file = GgufFile(path)
    try:
        meta = Metadata(file.metadata)
        record = gguf_family(meta)
        if _EMBEDDINGS not in file.tensors:
            raise InputError(f"tensor {_EMBEDDINGS!r} is missing")
        shapes = {name: tensor.shape for name, tensor in file.tensors.items() if name not in ROPE_TENSORS}
        if _head_is_a_copy(file):
            del shapes[HEAD]
        config = record.config(meta, shapes, shapes[_EMBEDDINGS][0])
        divisors = {name: file.array(file.tensors[name]) for name in ROPE_TENSORS if name in file.tensors}
        config = with_rope_tensors(config, divisors, meta)
        bindings = tuple(bind(record.rules, config.num_layers, tensor_shapes(config)))
        check_names(shapes, bindings, what=f"{record.family} model")
    except (InputError, LookupError) as error:
        raise InputError(f"{path}: {error.args[0]}") from error
    return GgufModel(file, record, config, bindings)


def _head_is_a_copy(file: GgufFile) -> bool:
    """Whether the head is the embeddings once more: some architectures of llama.cpp have no other way to say that it is tied."""
    head, embeddings = file.tensors.get(HEAD), file.tensors[_EMBEDDINGS]
    if head is None or dataclasses.replace(head, name="", start=0) != dataclasses.replace(embeddings, name="", start=0):
        return False
    rows, copy = file.raw(embeddings), file.raw(head)
    return np.array_equal(rows[:16], copy[:16]) and np.array_equal(rows, copy)
