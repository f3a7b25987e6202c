"""Models as GGUF files, for llama.cpp and what builds on it: metadata and weights. Knows GGUF's terms; opens no model.

The keys and the handling of each are those of llama.cpp's convert_hf_to_gguf.py; the bytes are written by its gguf package.
Nothing is written that our own reader would not read as the same model: a fact that GGUF has no key for is refused.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmctl.core.config.model import ModelConfig, RopeScaling
from llmctl.core.errors import InputError, MissingExtraError, write_error
from llmctl.core.families.base import bind
from llmctl.core.families.gguf import GgufFamily, pairs_from_halves
from llmctl.core.families.gguf_metadata import Metadata
from llmctl.core.families.gguf_names import HEAD
from llmctl.core.families.gguf_rope import rope_tensors, with_rope_tensors
from llmctl.core.model.facts import tensor_shapes
from llmctl.core.quant import GROUP, layout_for

_NOT_IN_GGUF = ("initializer_range", "scale_residual_init")
"""Facts that matter for training only."""


def need_package() -> Any:
    """The gguf package. Raises MissingExtraError when it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError("--format gguf", extra="gguf") from error
    return gguf


def metadata(config: ModelConfig, record: GgufFamily) -> dict[str, Any]:
    """The keys of the architecture: what `record.config` reads `record.as_held(config)` back from.

    Raises InputError when they do not come back as the same facts, naming one that differs.
    """
    held = record.as_held(config)
    keys = record.keys(held)
    meta = Metadata(keys)
    shapes = {theirs: shape for theirs, shape, _ in _placed(held, record)}
    try:
        again = with_rope_tensors(record.config(meta, shapes, held.vocab_size), rope_tensors(held), meta)
    except InputError as error:
        raise InputError(f"this model cannot be written as GGUF: {error}") from error
    for field in dataclasses.fields(held):
        wanted, found = getattr(held, field.name), getattr(again, field.name)
        if field.name not in _NOT_IN_GGUF and not _same(wanted, found):
            raise InputError(
                f"GGUF's {record.architecture} cannot hold this model: {field.name} is {wanted!r}, and would be read as {found!r}"
            )
    return keys


def _same(one: Any, other: Any) -> bool:
    """Whether two facts are equal, numbers to the precision of GGUF's, which is float32."""
    if isinstance(one, RopeScaling) and isinstance(other, RopeScaling):
        return one.kind == other.kind and _same(one.parameters, other.parameters)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, float) or isinstance(other, float):
        return one is not None and other is not None and abs(one - other) <= 1e-6 * abs(one)
    return bool(one == other)


def _placed(config: ModelConfig, record: GgufFamily) -> Iterator[tuple[str, tuple[int, ...], Any]]:
    """(name in GGUF, shape there, binding) of every tensor. Raises InputError when the family's rules do not cover the model."""
    try:
        bindings = list(bind(record.rules, config.num_layers, tensor_shapes(config)))
    except LookupError as error:
        raise InputError(f"GGUF's {record.architecture} cannot hold this model: {error.args[0]}") from error
    for binding in bindings:
        yield binding.theirs, binding.their_shape, binding


def kind_of(name: str, shape: tuple[int, ...], wanted: str) -> str:
    """The type of our tensor `name`: `wanted` for matrices, with embeddings and head in Q8_0 where that is Q4_0; F32 for the rest.

    Rows that are no multiple of 32 cannot be quantised and become F16, as llama.cpp has it.
    """
    layout = layout_for(name, shape, "int4")
    if layout is None:
        return "F32"
    if wanted in ("Q8_0", "Q4_0"):
        if shape[-1] % GROUP:
            return "F16"
        return "Q8_0" if layout == "int8" else wanted
    return wanted


def encode(numbers: NDArray[np.float32], kind: str) -> NDArray[Any]:
    """Numbers as GGUF stores them. Raises InputError when float16 cannot hold them."""
    package = need_package()
    with np.errstate(over="ignore"):
        raw: NDArray[Any] = package.quants.quantize(np.ascontiguousarray(numbers), package.GGMLQuantizationType[kind])
    if kind == "F16" and not np.isfinite(raw).all():
        raise InputError("the weights hold numbers beyond 65504, which float16 cannot; choose --dtype bf16 or f32")
    return raw


def decode(raw: NDArray[Any], kind: str) -> NDArray[np.float32]:
    """What a reader makes of `encode`'s result."""
    package = need_package()
    return np.asarray(package.quants.dequantize(raw, package.GGMLQuantizationType[kind]), dtype=np.float32)


def write(
    path: Path,
    *,
    config: ModelConfig,
    record: GgufFamily,
    tensors: Mapping[str, NDArray[np.float32]],
    kind: str,
    extra: Mapping[str, Any],
) -> None:
    """Write a file. `tensors` have the decoder's names; `extra` are the tokenizer's keys and others. Raises WriteError, and OSErrors."""
    package, config = need_package(), record.as_held(config)
    writer = package.GGUFWriter(path, record.architecture)
    try:
        for key, value in {**metadata(config, record), **extra}.items():
            if key != "general.architecture":
                _add(writer, package, key, value)
        writer.add_quantization_version(package.GGML_QUANT_VERSION)
        file_types = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0", "Q4_0": "MOSTLY_Q4_0"}
        writer.add_file_type(package.LlamaFileType[file_types[kind]])
        for theirs, divisors in rope_tensors(config).items():
            writer.add_tensor(theirs, divisors)
        for theirs, _, binding in _placed(config, record):
            arrays = [_reordered(tensors[name], name, config, record) for name in binding.ours]
            numbers = np.asarray(binding.rule.to_theirs(arrays), dtype=np.float32)
            chosen = kind_of(binding.ours[0], binding.our_shapes[0], kind)
            stored, raw_dtype = encode(numbers, chosen), package.GGMLQuantizationType[chosen]
            writer.add_tensor(theirs, stored, raw_dtype=raw_dtype)
            if binding.ours[0] == "embed.weight" and config.tie_embeddings and record.head_always:
                writer.add_tensor(HEAD, stored, raw_dtype=raw_dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    except OSError as error:
        if error.errno is None:  # numpy's tofile tells a full disk in words only
            raise write_error(error, path=path) from error
        raise
    finally:
        writer.close()


def _add(writer: Any, package: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif key == "tokenizer.ggml.token_type":
        writer.add_key_value(key, value, package.GGUFValueType.ARRAY, sub_type=package.GGUFValueType.INT32)
    else:
        writer.add_array(key, value)


def _reordered(array: NDArray[np.float32], name: str, config: ModelConfig, record: GgufFamily) -> NDArray[np.float32]:
    if record.norm_shift(name):
        array = array + np.float32(record.norm_shift(name))
    if record.reorders(name):
        reordered: NDArray[np.float32] = pairs_from_halves(array, config.head_dim)
        return reordered
    return array
