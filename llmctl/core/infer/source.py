"""What a path holds for the native executor: the model's facts and its weights, opened but not read. Knows files; no torch.

Only measuring how much each input matters, for matrices that are made 4-bit here, runs the model in torch, once.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmctl.core.checkpoint.folder import ADAPTER_CONFIG, load_config, own_layout, read_generation, token_ids
from llmctl.core.checkpoint.stored import CODE_DTYPES, WEIGHT_DTYPES, Stored, open_tensors, stored_arrays, stored_tensors
from llmctl.core.config.model import ModelConfig
from llmctl.core.errors import InputError
from llmctl.core.families import Family, family_named
from llmctl.core.families.base import Binding
from llmctl.core.native.library import Int4Matrix, Int8Matrix, from_bf16
from llmctl.core.quant import GGUF_LAYOUTS, Layout, QuantMatrix, layout_for, quantise
from llmctl.core.tensorfile import weight_files

if TYPE_CHECKING:  # what follows is imported where it is needed: packed weights that are in the cache need none of it
    from llmctl.core.checkpoint.gguf import GgufModel


@dataclass(frozen=True)
class Source:
    """A model's files, checked against its facts."""

    path: Path
    config: ModelConfig
    family: str
    eos_ids: tuple[int, ...]
    generation: dict[str, Any]
    """generation_config.json, or {}."""
    stored: str
    """Number format of the embeddings: "F32", "BF16", "Q4_1", ..."""
    own: Layout | None
    """The layout that a quantised directory holds."""
    weight_files: tuple[Path, ...]
    _hf_family: Family | None
    _gguf: "GgufModel | None"
    adapter: Path | None = None
    """The directory of an adapter to merge into the weights."""

    @property
    def config_files(self) -> tuple[Path, ...]:
        """The files beside the weights that say what the weights mean."""
        own = () if self._gguf is not None else (self.path / "config.json",)
        if self.adapter is None:
            return own
        from llmctl.core.checkpoint.adapter import WEIGHTS_NAME

        return (*own, self.adapter / ADAPTER_CONFIG, self.adapter / WEIGHTS_NAME)

    def tensors(self, quant: Layout | None) -> Iterator[tuple[str, Any]]:
        """The decoder's tensors: float32, bf16 as uint16, or quantised matrices as they are held, or as `quant` asks for.

        Their codes and scales are those of the torch path. Raises InputError.
        """
        if self._gguf is not None:
            return self._from_gguf(self._gguf, quant)
        if self.own is not None:
            if self.adapter is not None:
                from llmctl.core.checkpoint.adapter import NO_MERGING

                raise InputError(f"{self.path}: {NO_MERGING}")
            return self._from_quantised(self.own, quant)
        return self._from_directory(quant)

    def _from_directory(self, quant: Layout | None) -> Iterator[tuple[str, Any]]:
        from llmctl.core.checkpoint.adapter import Merger

        assert self._hf_family is not None
        tensors = stored_tensors(self.path, self.config, self._hf_family)
        importance = self._importance() if quant == "int4" else {}
        merger = Merger.of(self.adapter, self.config, self._hf_family)
        # pages that were read go back at once, so that the file and what is made of it are not in memory side by side
        for _, layer in itertools.groupby(sorted(tensors, key=lambda pair: _layer(pair[0])), key=lambda pair: _layer(pair[0])):
            together = list(layer)
            for binding, stored in together:
                for name, stored_array in stored_arrays([(binding, stored)]):
                    array = merger.added_to(name, stored_array)
                    yield name, array if quant is None else _quantised(name, array, quant, importance)
                stored.forget()
            for _, stored in together:  # queries and keys were read once more, with the values
                stored.forget()
        merger.checked(self.path)

    def _from_quantised(self, own: Layout, quant: Layout | None) -> Iterator[tuple[str, Any]]:
        from llmctl.core.checkpoint.held import held_in_directory

        if quant is not None and quant != own:
            raise InputError(f"{self.path}: the weights are quantised already, as {own}; quantise the model that they were made from")
        try:
            for name, held in held_in_directory(_quantised_files(self.path), self.config):
                yield name, _as_floats(held.array()) if isinstance(held, Stored) else _for_library(held)
        except InputError as error:
            raise InputError(f"{self.path}: {error}") from error

    def _from_gguf(self, model: "GgufModel", quant: Layout | None) -> Iterator[tuple[str, Any]]:
        from llmctl.core.checkpoint.adapter import Merger
        from llmctl.core.checkpoint.held import held_in_gguf

        anew = [b for b in model.bindings if quant is not None and layout_for(b.ours[0], b.our_shapes[0], quant) == "int4"]
        needs_importance = any(GGUF_LAYOUTS.get(model.entry(binding).kind) != "int4" for binding in anew)
        importance = self._importance() if needs_importance else {}
        merger = Merger.of(self.adapter, self.config, family_named(self.family))
        for binding in sorted(model.bindings, key=_layer):
            as_it_is = quant is not None and self.adapter is None
            held = held_in_gguf(model.file, model.entry(binding), binding, quant) if quant is not None and as_it_is else None
            if held is not None:
                for name, matrix in zip(binding.ours, held, strict=True):
                    yield name, _for_library(matrix.map_rows(self._rows_of(model, name)))
            else:
                for name, array in model.arrays(binding):
                    numbers = _as_floats(merger.added_to(name, array))
                    yield name, numbers if quant is None else _quantised(name, numbers, quant, importance)
            model.file.forget(model.entry(binding))
        merger.checked(self.path)

    def _rows_of(self, model: "GgufModel", name: str) -> Any:
        """Puts the rows of a matrix into the decoder's order."""
        from llmctl.core.families.gguf import halves_from_pairs

        return (lambda rows: halves_from_pairs(rows, self.config.head_dim)) if model.record.reorders(name) else np.asarray

    def _importance(self) -> Mapping[str, NDArray[np.float32]]:
        import torch

        from llmctl.core.checkpoint.calibrate import input_importance
        from llmctl.core.checkpoint.load import load_model

        dtype = torch.float32 if self._gguf is not None else None
        return input_importance(load_model(self.path, dtype=dtype, adapter=self.adapter).model)


def open_source(path: Path, *, adapter: Path | None = None) -> Source:
    """Open a model directory or a `.gguf` file, with an adapter to merge into it.

    Raises NotFoundError, and InputError for what is bad, unsafe or does not fit.
    """
    adapted = {} if adapter is None else read_generation(adapter)
    if path.suffix == ".gguf":
        from llmctl.core.checkpoint.gguf import open_gguf
        from llmctl.core.families.gguf_tokenizer import eos_ids_of

        model = open_gguf(path)
        eos_ids = token_ids(adapted.get("eos_token_id")) or eos_ids_of(model.file.metadata)
        return Source(path, model.config, model.record.family, eos_ids, adapted, model.stored, None, (path,), None, model, adapter)
    config, family, raw = load_config(path)
    generation = read_generation(path) | adapted
    own = own_layout(raw, where=path / "config.json")
    if own is None:
        stored = stored_tensors(path, config, family)[0][1].entry.dtype
    else:
        stored = "F32"
    files = tuple(sorted(weight_files(path)))
    eos_ids = token_ids(generation.get("eos_token_id")) or token_ids(raw.get("eos_token_id"))
    return Source(path, config, family.name, eos_ids, generation, stored, own, files, family, None, adapter)


def _layer(binding: Binding) -> int:
    """The layer of a tensor, -1 outside of layers: what is packed together comes together."""
    where = binding.ours[0].split(".")
    return int(where[1]) if where[0] == "layers" else -1


def _quantised_files(folder: Path) -> dict[str, Stored]:
    return open_tensors(folder, dtypes=(*WEIGHT_DTYPES, *CODE_DTYPES))


def _as_floats(array: NDArray[Any]) -> NDArray[Any]:
    """float32, or bf16 as uint16."""
    return array if array.dtype in (np.float32, np.uint16) else array.astype(np.float32)


def _quantised(name: str, array: NDArray[Any], quant: Layout, importance: Mapping[str, NDArray[np.float32]]) -> Any:
    """A tensor as a model that is quantised to `quant` holds it: quantised, or in float32."""
    numbers = from_bf16(array) if array.dtype == np.uint16 else array
    layout = layout_for(name, numbers.shape, quant)
    if layout is None:
        return numbers
    try:
        return _for_library(quantise(numbers, layout, importance=importance.get(name)))
    except InputError as error:
        raise InputError(f"tensor {name!r}: {error}") from error


def _for_library(matrix: QuantMatrix) -> Int8Matrix | Int4Matrix:
    if matrix.minimums is None:
        return Int8Matrix(matrix.codes, matrix.scales, matrix.num_columns)
    return Int4Matrix(matrix.codes, matrix.scales, matrix.minimums, matrix.num_columns)
