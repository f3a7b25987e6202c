"""Quantised models: quantised while they are loaded, and written as directories of our own (held.py tells what lies in them)."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmctl.core.checkpoint.folder import QUANT_FORMAT, QUANT_METHOD
from llmctl.core.checkpoint.quantweight import QuantWeight
from llmctl.core.checkpoint.save import MAX_SHARD_BYTES, write_around, write_weights
from llmctl.core.config.model import ModelConfig
from llmctl.core.errors import InputError
from llmctl.core.families import family_named
from llmctl.core.quant import GROUP, Layout, layout_for, quantise

if TYPE_CHECKING:
    from llmctl.core.tokenizer import Tokenizer


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
