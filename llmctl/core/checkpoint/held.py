"""Matrices that files hold quantised, as they are: of GGUF files, and of quantised directories of our own. Numpy; no torch.

Such a directory is a Hugging Face directory but for its weights: config.json has a `quantization_config` of method "llmctl",
and for a matrix `layers.0.attn.q.weight` (the decoder's names) the weight files hold `.codes`, `.scales` and, in 4 bits,
`.minimums`, laid out as core/quant.py tells. Other tensors are there under their own names.
"""

from collections.abc import Iterator, Mapping

from llmctl.core.checkpoint.folder import and_more
from llmctl.core.checkpoint.stored import WEIGHT_DTYPES, Stored
from llmctl.core.config.model import ModelConfig
from llmctl.core.errors import InputError
from llmctl.core.families.base import Binding
from llmctl.core.gguf import GgufFile, GgufTensor
from llmctl.core.model.facts import tensor_shapes
from llmctl.core.quant import BITS, GGUF_LAYOUTS, Layout, QuantMatrix, from_gguf, layout_for, shapes_of

PARTS = ("codes", "scales", "minimums")


def held_in_gguf(file: GgufFile, tensor: GgufTensor, binding: Binding, wanted: Layout) -> list[QuantMatrix] | None:
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


def held_in_directory(found: Mapping[str, Stored], config: ModelConfig) -> Iterator[tuple[str, Stored | QuantMatrix]]:
    """The decoder's tensors of a quantised directory, mapped. Raises InputError that names what does not fit."""
    left = dict(found)
    for name, shape in tensor_shapes(config).items():
        if name in left:
            stored = left.pop(name)
            if stored.entry.shape != shape or stored.entry.dtype not in WEIGHT_DTYPES:
                wanted = f"numbers of shape {list(shape)} are wanted"
                raise InputError(f"tensor {name!r} is {list(stored.entry.shape)} of {stored.entry.dtype}, {wanted}")
            yield name, stored
            continue
        parts = {part: left.pop(f"{name}.{part}") for part in PARTS if f"{name}.{part}" in left}
        if "codes" not in parts or len(shape) != 2:
            raise InputError(f"tensor {name!r} is missing, and so are its codes")
        yield name, _matrix(name, (shape[0], shape[1]), parts)
    if left:
        raise InputError(f"tensor {min(left)!r} has no place in this quantised model{and_more(sorted(left))}")


def _matrix(name: str, shape: tuple[int, int], parts: Mapping[str, Stored]) -> QuantMatrix:
    layout: Layout = "int8" if parts["codes"].entry.dtype == "I8" else "int4"
    wanted = shapes_of(layout, shape)
    dtypes = {"codes": "I8" if layout == "int8" else "U8", "scales": "F16", "minimums": "F16"}
    for part in sorted(wanted.keys() | parts.keys()):
        entry = parts[part].entry if part in parts else None
        if entry is None or part not in wanted or entry.shape != wanted[part] or entry.dtype != dtypes[part]:
            shown = "missing" if entry is None else f"{list(entry.shape)} of {entry.dtype}"
            asked = f"{list(wanted[part])} of {dtypes[part]}" if part in wanted else "none"
            raise InputError(f"tensor {f'{name}.{part}'!r} is {shown}, {asked} is wanted")
    arrays = {part: stored.array() for part, stored in parts.items()}
    return QuantMatrix(layout, arrays["codes"], arrays["scales"], arrays.get("minimums"), shape[1])
