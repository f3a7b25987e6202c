"""Models as GGUF files, for llama.cpp and what builds on it: metadata, tokenizer, weights. Knows GGUF's terms; opens no model.

The keys and the handling of each are those of llama.cpp's convert_hf_to_gguf.py; the bytes are written by its gguf package.
Nothing is written that our own reader would not read as the same model: a fact that GGUF has no key for is refused.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmctl.core.config.model import ModelConfig
from llmctl.core.data.wordvectors import vocabulary
from llmctl.core.errors import InputError, MissingExtraError, write_error
from llmctl.core.families.base import bind
from llmctl.core.families.gguf import GGUF_FAMILIES, ROPE_FACTORS, GgufFamily, Metadata, llama3_scaling, pairs_from_halves
from llmctl.core.families.gguf_tokenizer import PRE_TOKENIZERS, tokenizer_from_gguf
from llmctl.core.model.facts import tensor_shapes
from llmctl.core.quant import GROUP, layout_for

if TYPE_CHECKING:
    from llmctl.core.tokenizer import Tokenizer

_PRE_TOKENIZERS = ("gpt-2", "smollm", "llama-bpe", "dbrx", "qwen2", "stablelm2")
"""One name of llama.cpp's for each rule that we know."""
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_NOT_IN_GGUF = ("initializer_range", "scale_residual_init")
"""Facts that matter for training only."""
_PROBES = (
    "Hello world, it's 3.14159 or 1,234,567!  Two  spaces   three\tand\ttabs\n\nnew lines\r\n \n  end ",
    "I'll we've they'd DON'T you're 's 'S café naïve Ünïcödé ﬁ ½ x² 日本語のテキスト 한국어 русский العربية ไทย",
    "def f(x):\n    return x**2  # comment\n\n\n\tif (a != b) { c += d[0]; } 2024-01-01 0x1F 12 123 1234 12345",
    "emoji 😀👩‍👩‍👧‍👦🏳️‍🌈 \u200b\u00a0nbsp e\u0301 A\u030a \u2028 zero\u0000byte ... !!! ??? $%^&*()_+-=[]{}|;:'\",.<>/?`~\\",
)


def need_package() -> Any:
    """The gguf package. Raises MissingExtraError when it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError("--format gguf", extra="gguf") from error
    return gguf


def family_record(family: str) -> GgufFamily:
    """How GGUF has models of this family. Raises InputError that lists those that there are."""
    for record in GGUF_FAMILIES.values():
        if record.family == family:
            return record
    known = ", ".join(record.family for record in GGUF_FAMILIES.values())
    raise InputError(f"models of the family {family} cannot be written as GGUF; the families that can are {known}")


def metadata(config: ModelConfig, record: GgufFamily) -> dict[str, Any]:
    """The keys of the architecture: what `record.config` reads them back from.

    Raises InputError when they do not come back as the same facts, naming those that differ.
    """
    values: dict[str, Any] = {
        "block_count": config.num_layers,
        "context_length": config.max_positions,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.mlp_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.dimension_count": config.rotary_size,
        "rope.freq_base": config.rope_theta,
        "vocab_size": config.vocab_size,
    }
    optional = {
        "attention.sliding_window": next((window for window in config.windows or () if window is not None), None),
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
        "rope.freq_base_swa": config.local_rope_theta,
        "expert_count": config.experts and config.experts.num_experts,
        "expert_used_count": config.experts and config.experts.num_active,
        "expert_feed_forward_length": config.experts and config.experts.mlp_size,
    }
    values |= {key: value for key, value in optional.items() if value is not None}
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind in ("linear", "yarn"):
        values |= {"rope.scaling.type": scaling.kind, "rope.scaling.factor": float(scaling.parameters["factor"])}
        if scaling.kind == "yarn":
            values["rope.scaling.original_context_length"] = int(scaling.parameters["original_max_position_embeddings"])
    keyed = {"general.architecture": record.architecture, **{f"{record.architecture}.{key}": value for key, value in values.items()}}
    shapes = {theirs: shape for theirs, shape, _ in _placed(config, record)}
    try:
        again = record.config(Metadata(keyed), shapes, config.vocab_size)
        if scaling is not None and scaling.kind == "llama3":
            again = dataclasses.replace(again, rope_scaling=llama3_scaling(rope_factors(config), config))
    except InputError as error:
        raise InputError(f"this model cannot be written as GGUF: {error}") from error
    differing = [field.name for field in dataclasses.fields(config) if not _same(config, again, field.name)]
    if differing:
        name = differing[0]
        raise InputError(
            f"GGUF's {record.architecture} cannot hold this model: {name} is {getattr(config, name)!r},"
            f" and would be read as {getattr(again, name)!r}"
        )
    return keyed


def _same(one: ModelConfig, other: ModelConfig, name: str) -> bool:
    a, b = getattr(one, name), getattr(other, name)
    if name in _NOT_IN_GGUF:
        return True
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) <= 1e-6 * abs(a)  # GGUF's numbers are float32
    return bool(a == b)


def rope_factors(config: ModelConfig) -> NDArray[np.float32]:
    """Llama 3's scaling as GGUF has it: divisors of the frequencies, (R/2,). The formula is transformers'."""
    assert config.rope_scaling is not None
    numbers = config.rope_scaling.parameters
    low, high, factor = numbers["low_freq_factor"], numbers["high_freq_factor"], numbers["factor"]
    size = config.rotary_size
    wavelengths = 2 * np.pi * config.rope_theta ** (np.arange(0, size, 2, dtype=np.float64) / size)
    blend = np.clip((numbers["original_max_position_embeddings"] / wavelengths - low) / (high - low), 0.0, 1.0)
    factors: NDArray[np.float32] = (1 / ((1 - blend) / factor + blend)).astype(np.float32)
    return factors


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
    package = need_package()
    writer = package.GGUFWriter(path, record.architecture)
    try:
        for key, value in {**metadata(config, record), **extra}.items():
            if key != "general.architecture":
                _add(writer, package, key, value)
        writer.add_quantization_version(package.GGML_QUANT_VERSION)
        file_types = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0", "Q4_0": "MOSTLY_Q4_0"}
        writer.add_file_type(package.LlamaFileType[file_types[kind]])
        if config.rope_scaling is not None and config.rope_scaling.kind == "llama3":
            writer.add_tensor(ROPE_FACTORS, rope_factors(config))
        for theirs, _, binding in _placed(config, record):
            arrays = [_reordered(tensors[name], name, config, record) for name in binding.ours]
            numbers = np.asarray(binding.rule.to_theirs(arrays), dtype=np.float32)
            chosen = kind_of(binding.ours[0], binding.our_shapes[0], kind)
            writer.add_tensor(theirs, encode(numbers, chosen), raw_dtype=package.GGMLQuantizationType[chosen])
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
    if record.interleaved and name.rpartition(".")[0].endswith(("attn.q", "attn.k")):
        reordered: NDArray[np.float32] = pairs_from_halves(array, config.head_dim)
        return reordered
    return array


def tokenizer_metadata(tokenizer: "Tokenizer", *, vocab_size: int, eos_ids: Sequence[int]) -> dict[str, Any]:
    """The tokenizer's keys, chat template included. Ids that the tokenizer does not have become unused tokens.

    llama.cpp names its pre-tokenizers and holds their rules itself: the name is found by trying each on texts that tell
    them apart. Raises InputError when none gives the tokenizer's ids, and for a kind that is not byte-level BPE.
    """
    content = json.loads(tokenizer.to_json())
    if content["model"].get("type") != "BPE" or not tokenizer.is_byte_level:
        raise InputError("only byte-level BPE tokenizers can be written as GGUF")
    if not content["model"]["merges"]:
        raise InputError("the tokenizer has no merges, and llama.cpp reads no such file; the model cannot be written as GGUF")
    known = vocabulary(tokenizer)
    added = {entry["id"]: _CONTROL if entry["special"] else _USER_DEFINED for entry in content["added_tokens"]}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    values: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [known.get(i, f"[PAD{i}]") for i in range(vocab_size)],
        "tokenizer.ggml.token_type": [added.get(i, _NORMAL if i in known else _UNUSED) for i in range(vocab_size)],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.add_bos_token": tokenizer.adds_bos,
    }
    eos = [*eos_ids, *([tokenizer.eos_id] if tokenizer.eos_id is not None and not eos_ids else [])]
    ids = {"bos": tokenizer.bos_id, "eos": eos[0] if eos else None, "eot": eos[1] if len(eos) > 1 else None, "padding": tokenizer.pad_id}
    values |= {f"tokenizer.ggml.{name}_token_id": value for name, value in ids.items() if value is not None}
    if tokenizer.chat_template is not None:
        values["tokenizer.chat_template"] = tokenizer.chat_template
    probes = probes_for(tokenizer, known)
    wanted = tokenizer.encode_batch(probes)
    for name in _PRE_TOKENIZERS:
        if name in PRE_TOKENIZERS:
            candidate = tokenizer_from_gguf({**values, "tokenizer.ggml.pre": name}, where="the tokenizer")
            if candidate.encode_batch(probes) == wanted:
                return {**values, "tokenizer.ggml.pre": name}
    raise InputError(
        f"llama.cpp has no pre-tokenizer that splits text as this tokenizer does (tried {', '.join(_PRE_TOKENIZERS)});"
        " the model cannot be written as GGUF"
    )


def probes_for(tokenizer: "Tokenizer", known: Mapping[int, str]) -> list[str]:
    """Texts that tell tokenizers apart: odd ones, and a sample of the vocabulary itself."""
    ordinary = [i for i in known if i not in tokenizer.special_ids]
    sample = ordinary[:: max(1, len(ordinary) // 2000)]
    return [*_PROBES, *(tokenizer.decode(sample[start : start + 50]) for start in range(0, len(sample), 50))]
