"""Weights into a decoder: safetensors directories and GGUF files, mapped rather than read. Knows families and tensors.

A tensor that is stored as the model wants it stays in the page cache until it is used; one that must be converted is
converted alone, and its pages are given back.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from llmctl.core.checkpoint.calibrate import input_importance
from llmctl.core.checkpoint.folder import (
    check_tokenizer,
    load_config,
    load_tokenizer,
    own_layout,
    read_generation,
    token_ids,
    unknown_architecture,
)
from llmctl.core.checkpoint.held import held_in_directory, held_in_gguf
from llmctl.core.checkpoint.quantised import quantised
from llmctl.core.checkpoint.quantweight import QuantWeight
from llmctl.core.checkpoint.resolve import check_kind
from llmctl.core.checkpoint.stored import CODE_DTYPES, WEIGHT_DTYPES, Stored, open_tensors, stored_tensors
from llmctl.core.config.model import ModelConfig
from llmctl.core.errors import InputError, UsageError
from llmctl.core.families import Family
from llmctl.core.model.decoder import Decoder
from llmctl.core.quant import GGUF_LAYOUTS, Layout, layout_for

if TYPE_CHECKING:
    from llmctl.core.tokenizer import Tokenizer

_GGUF_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, in eval mode, and what its files say of it."""

    model: Decoder
    config: ModelConfig
    family: str
    dtype: torch.dtype
    path: Path
    eos_ids: tuple[int, ...]
    """The ids that end a text: generation_config.json's, else config.json's."""
    generation: dict[str, Any]
    """generation_config.json, or {}."""
    quant: Layout | None = None
    """The layout that the matrices are held in, if they are quantised."""
    note: str | None = None
    """What the user should know of how it runs."""

    @property
    def number_format(self) -> str:
        """ "bfloat16", or "int4 in float32": what is held, and what is computed in."""
        computed = str(self.dtype).removeprefix("torch.")
        return computed if self.quant is None else f"{self.quant} in {computed}"


def load_model(
    path: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    quant: Layout | None = None,
    adapt: bool = False,
) -> LoadedModel:
    """Load a model directory or a `.gguf` file into a decoder in eval mode.

    `dtype` None keeps the number format of the embeddings (float32 for those of a quantised GGUF); all weights get the
    same. With `quant`, and from a quantised directory, the matrices are held quantised (quantweight.py), and
    `dtype` is what is computed in; None is float32 then. With `adapt`, an architecture that no family covers runs through
    transformers, for inference only, and `note` says so. Raises NotFoundError when the files are not there, InputError
    when they are bad, unsafe or do not fit each other.
    """
    path = Path(path)
    if path.exists():
        check_kind(path)
    if path.suffix == ".gguf":
        return _load_gguf(path, dtype=dtype, device=device, quant=quant)
    unknown = unknown_architecture(path) if adapt else None
    if unknown is not None:
        return _load_adapted(path, unknown, dtype=dtype, device=device, quant=quant)
    config, family, raw = load_config(path)
    generation = read_generation(path)
    own = own_layout(raw, where=path / "config.json")
    if own is not None:
        tensors = _quantised_tensors(path, config, dtype=dtype, own=own, quant=quant)
    elif quant is not None:
        dtype = torch.float32 if dtype is None else dtype
        importance = None
        if quant == "int4":
            importance = input_importance(assemble(config, dict(_our_tensors(path, config, family, dtype=None)), device="cpu"))
        tensors = quantised(_our_tensors(path, config, family, dtype=torch.float32), quant, dtype=dtype, importance=importance)
        own = quant
    else:
        tensors = _our_tensors(path, config, family, dtype=dtype)
    model = assemble(config, dict(tensors), device=device)
    eos_ids = token_ids(generation.get("eos_token_id")) or token_ids(raw.get("eos_token_id"))
    return LoadedModel(model, config, family.name, model.dtype, path, eos_ids, generation, own)


def load_model_and_tokenizer(
    path: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    quant: Layout | None = None,
    adapt: bool = False,
) -> tuple[LoadedModel, "Tokenizer"]:
    """Both, checked against each other before the weights are opened where the config tells enough. See `load_model`."""
    tokenizer = load_tokenizer(path)
    if Path(path).suffix != ".gguf" and not (adapt and unknown_architecture(path) is not None):
        check_tokenizer(tokenizer, load_config(path)[0], where=path)
    loaded = load_model(path, dtype=dtype, device=device, quant=quant, adapt=adapt)
    check_tokenizer(tokenizer, loaded.config, where=path)
    return loaded, tokenizer


def _load_adapted(
    path: Path, raw: dict[str, Any], *, dtype: torch.dtype | None, device: torch.device | str, quant: Layout | None
) -> LoadedModel:
    from llmctl.core.checkpoint.adapt import load_adapted, note_of

    if quant is not None:
        raise UsageError(f"--quant {quant}: not for the architecture {raw.get('model_type')!r}, which runs through transformers")
    generation = read_generation(path)
    model, config = load_adapted(path, raw, dtype=dtype, device=device)
    eos_ids = token_ids(generation.get("eos_token_id")) or token_ids(raw.get("eos_token_id"))
    return LoadedModel(model, config, f"transformers {raw['model_type']}", model.dtype, path, eos_ids, generation, note=note_of(raw))


def assemble(config: ModelConfig, tensors: dict[str, Tensor], *, device: torch.device | str) -> Decoder:
    """A decoder in eval mode around `tensors` (the decoder's names, all of them), without a copy where none is needed."""
    with torch.device("meta"):
        model = Decoder(config)
    target = torch.device(device)
    model.load_state_dict({name: tensor.to(target) for name, tensor in tensors.items()}, assign=True)
    return model.eval()


def _our_tensors(folder: Path, config: ModelConfig, family: Family, *, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """The decoder's tensors, one after the other, so that only one at a time needs room for a conversion."""
    tensors = stored_tensors(folder, config, family)
    target = _TORCH_DTYPES[tensors[0][1].entry.dtype] if dtype is None else dtype
    for binding, stored in tensors:
        source = _tensor(stored)
        parts = [part.to(target).contiguous() for part in binding.rule.to_ours(source, binding.our_shapes)]
        yield from zip(binding.ours, parts, strict=True)
        if all(part.untyped_storage().data_ptr() != source.untyped_storage().data_ptr() for part in parts):
            del source
            stored.forget()


def _tensor(stored: Stored) -> Tensor:
    """The tensor, mapped where its alignment allows it."""
    tensor = torch.from_numpy(stored.array())
    return tensor.view(torch.bfloat16) if stored.entry.dtype == "BF16" else tensor


def _quantised_tensors(
    folder: Path, config: ModelConfig, *, dtype: torch.dtype | None, own: Layout, quant: Layout | None
) -> Iterator[tuple[str, Tensor]]:
    """The decoder's tensors of a quantised directory, mapped."""
    if quant is not None and quant != own:
        raise InputError(f"{folder}: the weights are quantised already, as {own}; quantise the model that they were made from")
    target = torch.float32 if dtype is None else dtype
    found = open_tensors(folder, dtypes=(*WEIGHT_DTYPES, *CODE_DTYPES))
    try:
        for name, held in held_in_directory(found, config):
            yield name, _tensor(held).to(target) if isinstance(held, Stored) else QuantWeight.of(held, dtype=target)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from error


def _load_gguf(path: Path, *, dtype: torch.dtype | None, device: torch.device | str, quant: Layout | None) -> LoadedModel:
    """A model from a GGUF file: weights dequantised, or held quantised; rows of q and k put back into Hugging Face's order."""
    from llmctl.core.checkpoint.gguf import open_gguf
    from llmctl.core.families.gguf import halves_from_pairs
    from llmctl.core.families.gguf_tokenizer import eos_ids_of

    found = open_gguf(path)
    file, config = found.file, found.config
    stored = _GGUF_DTYPES.get(found.stored, torch.float32) if dtype is None else dtype
    if quant is not None and dtype is None:
        stored = torch.float32
    importance = None
    matrices = [b for b in found.bindings if quant is not None and layout_for(b.ours[0], b.our_shapes[0], quant) == "int4"]
    if any(GGUF_LAYOUTS.get(found.entry(binding).kind) != "int4" for binding in matrices):
        importance = input_importance(_load_gguf(path, dtype=torch.float32, device="cpu", quant=None).model)
    tensors: dict[str, Tensor] = {}
    for binding in found.bindings:
        held = held_in_gguf(file, found.entry(binding), binding, quant) if quant is not None else None
        if held is not None:
            for name, part in zip(binding.ours, held, strict=True):
                rows = (lambda rows: halves_from_pairs(rows, config.head_dim)) if found.record.reorders(name) else np.asarray
                tensors[name] = QuantWeight.of(part.map_rows(rows), dtype=stored)
        else:
            arrays = {name: torch.from_numpy(array) for name, array in found.arrays(binding)}
            if quant is None:
                tensors |= {name: tensor.to(stored).contiguous() for name, tensor in arrays.items()}
            else:
                tensors |= quantised(
                    ((name, tensor.float()) for name, tensor in arrays.items()), quant, dtype=stored, importance=importance
                )
        file.forget(found.entry(binding))
    model = assemble(config, tensors, device=device)
    return LoadedModel(model, config, found.record.family, model.dtype, path, eos_ids_of(file.metadata), {}, quant)
