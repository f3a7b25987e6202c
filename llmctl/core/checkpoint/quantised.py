"""Quantised models in and out: quantised while they are loaded, held as a GGUF file has them, or in directories of our own.

Such a directory is a Hugging Face directory but for its weights: config.json has a `quantization_config` of method "llmctl",
and for a matrix `layers.0.attn.q.weight` (the decoder's names) the weight files hold `.codes`, `.scales` and, in 4 bits,
`.minimums`, laid out as core/quant.py tells. Other tensors are there under their own names.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmctl.core.checkpoint.folder import QUANT_FORMAT, QUANT_METHOD, and_more
from llmctl.core.checkpoint.quantweight import QuantWeight
from llmctl.core.checkpoint.save import MAX_SHARD_BYTES, write_around, write_weights
from llmctl.core.config.model import ModelConfig
from llmctl.core.errors import InputError
from llmctl.core.families import family_named
from llmctl.core.families.base import Binding
from llmctl.core.gguf import GgufFile, GgufTensor
from llmctl.core.model.facts import tensor_shapes
from llmctl.core.quant import BITS, GGUF_LAYOUTS, GROUP, Layout, QuantMatrix, from_gguf, layout_for, quantise, shapes_of

if TYPE_CHECKING:
    from llmctl.core.tokenizer import Tokenizer

_PARTS = ("codes", "scales", "minimums")


def quantised(
    tensors: Iterable[tuple[str, Tensor]],
    wanted: Layout,
    *,
    dtype: torch.dtype,
    importance: Mapping[str, NDArray[np.float32]] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """The decoder's tensors with those that `layout_for` names quantised, one after the other, and the rest in `dtype`.

    `importance` is that of each matrix's inputs, by name, where it is known. Raises InputError that names a tensor that
    cannot be quantised.
    """
    for name, tensor in tensors:
        layout = None if isinstance(tensor, QuantWeight) else layout_for(name, tuple(tensor.shape), wanted)
        if layout is None:
            yield name, tensor.to(dtype)
            continue
        try:
            numbers = tensor.detach().float().cpu().numpy()
            yield name, QuantWeight.of(quantise(numbers, layout, importance=(importance or {}).get(name)), dtype=dtype)
        except InputError as error:
            raise InputError(f"tensor {name!r}: {error}") from error


def held_as_it_is(file: GgufFile, tensor: GgufTensor, binding: Binding, wanted: Layout) -> list[QuantMatrix] | None:
    """The matrices of ours that a tensor of a GGUF file holds, without loss; None where the numbers must be quantised anew.

    Fewer bits than wanted are kept, since nothing is gained from more; more bits are not.
    """
    held = GGUF_LAYOUTS.get(tensor.kind)
    if held is None or binding.rule.transposed or any(len(shape) != 2 for shape in binding.our_shapes):
        return None
    layouts = [layout_for(name, shape, wanted) for name, shape in zip(binding.ours, binding.our_shapes, strict=True)]
    if any(layout is None or BITS[layout] < BITS[held] for layout in layouts):
        return None
    whole = from_gguf(file.raw(tensor), tensor.kind, tensor.shape[-1])
    parts, start = [], 0
    for rows, _ in binding.our_shapes:
        parts.append(whole.map_rows(lambda array, first=start, last=start + rows: array[first:last]))  # type: ignore[misc]
        start += rows
    return parts


def join(found: Mapping[str, Tensor], config: ModelConfig, *, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The decoder's tensors from those of a quantised directory. Raises InputError that names what does not fit."""
    left = dict(found)
    for name, shape in tensor_shapes(config).items():
        if name in left:
            tensor = left.pop(name)
            if tuple(tensor.shape) != shape or not tensor.is_floating_point():
                raise InputError(f"tensor {name!r} is {list(tensor.shape)} of {tensor.dtype}, numbers of shape {list(shape)} are wanted")
            yield name, tensor.to(dtype)
            continue
        parts = {part: left.pop(f"{name}.{part}") for part in _PARTS if f"{name}.{part}" in left}
        if "codes" not in parts or len(shape) != 2:
            raise InputError(f"tensor {name!r} is missing, and so are its codes")
        layout: Layout = "int8" if parts["codes"].dtype == torch.int8 else "int4"
        wanted = shapes_of(layout, (shape[0], shape[1]))
        kinds = {"codes": torch.int8 if layout == "int8" else torch.uint8, "scales": torch.float16, "minimums": torch.float16}
        for part in wanted.keys() | parts.keys():
            if part not in parts or part not in wanted or tuple(parts[part].shape) != wanted[part] or parts[part].dtype != kinds[part]:
                shown = f"{list(parts[part].shape)} of {parts[part].dtype}" if part in parts else "missing"
                asked = f"{list(wanted[part])} of {kinds[part]}" if part in wanted else "none"
                raise InputError(f"tensor {f'{name}.{part}'!r} is {shown}, {asked} is wanted")
        yield name, QuantWeight(parts["codes"], parts["scales"], parts.get("minimums"), shape[1], dtype)
    if left:
        raise InputError(f"tensor {min(left)!r} has no place in this quantised model{and_more(sorted(left))}")


def save_quantised(
    directory: Path,
    *,
    config: ModelConfig,
    family: str,
    tensors: Mapping[str, Tensor],
    layout: Layout,
    tokenizer: "Tokenizer | None" = None,
    generation: Mapping[str, Any] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a quantised directory, into one that exists: see the head of this file, and `save_model`.

    `tensors` have the decoder's names; those that are QuantWeights are written as they are held, the rest in float32.
    """
    record = family_named(family)
    table = {"quant_method": QUANT_METHOD, "format": QUANT_FORMAT, "layout": layout, "group_size": GROUP}
    write_around(
        directory,
        family=record,
        config=config,
        dtype=torch.float32,
        tokenizer=tokenizer,
        generation=generation,
        extra={"quantization_config": table},
    )
    parts: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, QuantWeight):
            held = {"codes": tensor.codes, "scales": tensor.scales, "minimums": tensor.minimums}
            parts |= {f"{name}.{part}": value.cpu().contiguous() for part, value in held.items() if value is not None}
        else:
            parts[name] = tensor.detach().to(device="cpu", dtype=torch.float32).contiguous()
    write_weights(directory, parts, max_shard_bytes)
