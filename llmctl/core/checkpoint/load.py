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

from llmctl.core.checkpoint.adapter import NO_MERGING, Merger
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
from llmctl.core.families import Family, family_named
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
    adapter: Path | None = None
    """The adapter that is merged into the weights."""
    fingerprint: str | None = None
    """That of the weights in `path`, before an adapter, where it was asked for; see adapter.Fingerprint."""

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
    adapter: Path | None = None,
    identify: bool = False,
) -> LoadedModel:
    """Load a model directory or a `.gguf` file into a decoder in eval mode.

    `dtype` None keeps the number format of the embeddings (float32 for those of a quantised GGUF); all weights get the
    same. With `quant`, and from a quantised directory, the matrices are held quantised (quantweight.py), and
    `dtype` is what is computed in; None is float32 then. With `adapt`, an architecture that no family covers runs through
    transformers, for inference only, and `note` says so. `adapter`, a directory, is merged into the weights in float32
    before they are converted to anything. `identify` asks for the fingerprint. Raises NotFoundError when the files are not
    there, InputError when they are bad, unsafe or do not fit each other, as an adapter and a model that is not its base.
    """
    path = Path(path)
    if path.exists():
        check_kind(path)
    if path.suffix == ".gguf":
        return _load_gguf(path, dtype=dtype, device=device, quant=quant, adapter=adapter, identify=identify)
    unknown = unknown_architecture(path) if adapt else None
    if unknown is not None:
        if adapter is not None:
            raise UsageError(f"--adapter {adapter}: not for the architecture {unknown['model_type']!r}, which runs through transformers")
        return _load_adapted(path, unknown, dtype=dtype, device=device, quant=quant)
    config, family, raw = load_config(path)
    generation = read_generation(path) | ({} if adapter is None else read_generation(adapter))
    own = own_layout(raw, where=path / "config.json")
    merger = Merger.of(adapter, config, family, identify=identify)
    if own is not None:
        if adapter is not None:
            raise InputError(f"{path}: {NO_MERGING}")
        tensors = _quantised_tensors(path, config, dtype=dtype, own=own, quant=quant)
    elif quant is not None:
        dtype = torch.float32 if dtype is None else dtype
        importance = None
        if quant == "int4":
            stored = dict(_our_tensors(path, config, family, dtype=None, merger=merger))
            importance = input_importance(assemble(config, stored, device="cpu"))
        plain = _our_tensors(path, config, family, dtype=torch.float32, merger=merger)
        tensors = quantised(plain, quant, dtype=dtype, importance=importance)
        own = quant
    else:
        tensors = _our_tensors(path, config, family, dtype=dtype, merger=merger)
    held = dict(tensors)
    fingerprint = merger.checked(path)
    model = assemble(config, held, device=device)
    eos_ids = token_ids(generation.get("eos_token_id")) or token_ids(raw.get("eos_token_id"))
    return LoadedModel(model, config, family.name, model.dtype, path, eos_ids, generation, own, adapter=adapter, fingerprint=fingerprint)


def load_model_and_tokenizer(
    path: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    quant: Layout | None = None,
    adapt: bool = False,
    adapter: Path | None = None,
) -> tuple[LoadedModel, "Tokenizer"]:
    """Both, checked against each other before the weights are opened where the config tells enough. See `load_model`.

    The tokenizer is the adapter's where that has one.
    """
    tokenizer = load_tokenizer(path, adapter=adapter)
    if Path(path).suffix != ".gguf" and not (adapt and unknown_architecture(path) is not None):
        check_tokenizer(tokenizer, load_config(path)[0], where=path)
    loaded = load_model(path, dtype=dtype, device=device, quant=quant, adapt=adapt, adapter=adapter)
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


def _merged(merger: Merger, name: str, tensor: Tensor) -> Tensor:
    """`tensor` with what the adapter adds to it."""
    array = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    result = merger.added_to(name, array)
    return tensor if result is array else torch.from_numpy(result)


def _our_tensors(
    folder: Path, config: ModelConfig, family: Family, *, dtype: torch.dtype | None, merger: Merger
) -> Iterator[tuple[str, Tensor]]:
    """The decoder's tensors, one after the other, so that only one at a time needs room for a conversion."""
    tensors = stored_tensors(folder, config, family)
    target = _TORCH_DTYPES[tensors[0][1].entry.dtype] if dtype is None else dtype
    for binding, stored in tensors:
        source = _tensor(stored)
        ours = zip(binding.ours, binding.rule.to_ours(source, binding.our_shapes), strict=True)
        parts = [_merged(merger, name, part).to(target).contiguous() for name, part in ours]
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


def _load_gguf(
    path: Path,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str,
    quant: Layout | None,
    adapter: Path | None = None,
    identify: bool = False,
) -> LoadedModel:
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
    merger = Merger.of(adapter, config, family_named(found.record.family), identify=identify)
    tensors: dict[str, Tensor] = {}
    for binding in found.bindings:
        held = held_in_gguf(file, found.entry(binding), binding, quant) if quant is not None and adapter is None else None
        if held is not None:
            for name, part in zip(binding.ours, held, strict=True):
                rows = (lambda rows: halves_from_pairs(rows, config.head_dim)) if found.record.reorders(name) else np.asarray
                tensors[name] = QuantWeight.of(part.map_rows(rows), dtype=stored)
        else:
            arrays = {name: torch.from_numpy(merger.added_to(name, array)) for name, array in found.arrays(binding)}
            if quant is None:
                tensors |= {name: tensor.to(stored).contiguous() for name, tensor in arrays.items()}
            else:
                tensors |= quantised(
                    ((name, tensor.float()) for name, tensor in arrays.items()), quant, dtype=stored, importance=importance
                )
        file.forget(found.entry(binding))
    fingerprint = merger.checked(path)
    model = assemble(config, tensors, device=device)
    generation = {} if adapter is None else read_generation(adapter)
    eos_ids = token_ids(generation.get("eos_token_id")) or eos_ids_of(file.metadata)
    return LoadedModel(
        model, config, found.record.family, model.dtype, path, eos_ids, generation, quant, adapter=adapter, fingerprint=fingerprint
    )
