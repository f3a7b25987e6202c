"""GGUF files: our reader against the gguf package's and transformers' readers, real weights, and hostile files."""

import json
import os
import struct
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from llmctl.core import gguf as reader
from llmctl.core.checkpoint import load_model, load_tokenizer
from llmctl.core.errors import InputError, MissingExtraError, NotFoundError
from llmctl.core.families.gguf import halves_from_pairs, llama3_scaling, pairs_from_halves
from llmctl.core.gguf import BLOCKS, GgufFile
from llmctl.core.model import KVCache
from tests.core.model.families import random_tokens, reference_model

gguf = pytest.importorskip("gguf")

LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


OUTER_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def gguf_name(name: str, *, sandwich: bool = False) -> str:
    """llama.cpp's name of a tensor of transformers' Llama, or of a model that norms what its layers add, too."""
    if not name.startswith("model.layers."):
        return OUTER_NAMES[name]
    number, _, rest = name.removeprefix("model.layers.").partition(".")
    stem, _, part = rest.rpartition(".")
    if sandwich and stem == "post_attention_layernorm":
        return f"blk.{number}.post_attention_norm.{part}"
    return f"blk.{number}.{LAYER_NAMES[stem]}.{part}"


def permute(weights: np.ndarray, n_head: int, n_head_kv: int | None) -> np.ndarray:
    """As llama.cpp's convert_hf_to_gguf.py has it."""
    if n_head_kv is not None and n_head != n_head_kv:
        n_head = n_head_kv
    return weights.reshape(n_head, 2, weights.shape[0] // n_head // 2, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)


def unfused(model: transformers.PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a model, its experts' gates and ups apart: transformers holds them in one, GGUF in two."""
    for name, tensor in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            gate, up = tensor.chunk(2, dim=1)
            yield name.replace("gate_up_proj", "gate_proj.weight"), gate.contiguous()
            yield name.replace("gate_up_proj", "up_proj.weight"), up.contiguous()
        else:
            yield (f"{name}.weight" if name.endswith("experts.down_proj") else name), tensor


def write_model(path: Path, model: transformers.PreTrainedModel, *, dtype: str = "F32", extra: dict[str, Any] | None = None) -> None:
    """Write a tiny transformers model as llama.cpp's converter does."""
    config = model.config
    architecture = config.model_type.removesuffix("_text")
    architecture = {"mixtral": "llama", "qwen3_moe": "qwen3moe"}.get(architecture, architecture)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if architecture in ("gemma2", "gemma3"):
        writer.add_sliding_window(config.sliding_window)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    if getattr(config, "num_experts", None):
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(getattr(config, "moe_intermediate_size", config.intermediate_size))
    for name, tensor in dict(unfused(model)).items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.numpy()
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            array = permute(array, config.num_attention_heads, config.num_key_value_heads if "k_proj" in name else None)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            array = array + 1
        kind = gguf.GGMLQuantizationType[dtype if array.ndim == 2 else "F32"]
        data = gguf.quants.quantize(array.astype(np.float32), kind)
        writer.add_tensor(gguf_name(name, sandwich=architecture in ("gemma2", "gemma3")), data, raw_dtype=kind)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


LLAMAS = ["llama-mha", "llama-gqa-tied", "llama-mqa-biases", "llama-head-dim", "qwen2-gqa", "qwen3-head-dim"]
GEMMAS = ["gemma-tied", "gemma2-windows", "gemma3-windows"]


MIXTURES = ["mixtral-two-of-four", "mixtral-all-tied", "qwen3_moe-every-layer"]


@pytest.mark.parametrize("setting", [*LLAMAS, *GEMMAS, *MIXTURES])
def test_models_that_llama_cpp_converts_load_with_equal_logits(setting: str, tmp_path: Path) -> None:
    reference = reference_model(setting)
    write_model(tmp_path / "m.gguf", reference)
    loaded = load_model(tmp_path / "m.gguf")
    assert loaded.family == reference.config.model_type.removesuffix("_text")
    assert loaded.dtype == torch.float32
    tokens = random_tokens(2, 30)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(tokens), reference(tokens).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("setting", [*GEMMAS, *MIXTURES])
def test_what_our_export_writes_is_the_same_model(setting: str, tmp_path: Path) -> None:
    from llmctl.core.export.gguf import family_record, write

    reference_model(setting).save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    tensors = {name: tensor.numpy() for name, tensor in loaded.model.state_dict().items()}
    write(tmp_path / "m.gguf", config=loaded.config, record=family_record(loaded.family), tensors=tensors, kind="F32", extra={})
    again = load_model(tmp_path / "m.gguf")
    tokens = random_tokens(1, 30)
    with torch.no_grad():
        torch.testing.assert_close(again.model(tokens), loaded.model(tokens), atol=1e-5, rtol=1e-5)


def blocky_model() -> transformers.LlamaForCausalLM:
    """A Llama whose rows are whole blocks of 32."""
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("dtype", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantised_weights_give_the_logits_of_their_rounded_values(dtype: str, tmp_path: Path) -> None:
    """transformers' model with each matrix rounded by itself, in its own order of rows."""
    reference = blocky_model()
    write_model(tmp_path / "m.gguf", reference, dtype=dtype)
    kind = gguf.GGMLQuantizationType[dtype]
    with torch.no_grad():
        for parameter in reference.parameters():
            if parameter.ndim == 2:
                rounded = gguf.quants.dequantize(gguf.quants.quantize(parameter.numpy(), kind), kind)
                parameter.copy_(torch.from_numpy(rounded.copy()))
    loaded = load_model(tmp_path / "m.gguf", dtype=torch.float32)
    tokens = random_tokens(1, 40)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(tokens), reference(tokens).logits, atol=1e-5, rtol=1e-5)
    stored = load_model(tmp_path / "m.gguf").dtype
    assert stored == {"F16": torch.float16, "BF16": torch.bfloat16}.get(dtype, torch.float32)


def test_llama_3_scaling_is_recovered_from_its_factors(tmp_path: Path) -> None:
    """llama.cpp's converter writes divisors of the frequencies and no parameters."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=131072,
        rope_parameters=rope,
    )
    plain = 1.0 / 500_000.0 ** (torch.arange(0, 64, 2).float() / 64)
    factors = (plain / ROPE_INIT_FUNCTIONS["llama3"](config)[0]).numpy()
    reference = transformers.LlamaForCausalLM(config).eval()
    write_model(tmp_path / "m.gguf", reference, extra={"rope_freqs.weight": factors})
    loaded = load_model(tmp_path / "m.gguf")
    tokens = random_tokens(1, 60)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(tokens), reference(tokens).logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="not those of Llama 3"):
        llama3_scaling(factors * np.linspace(1, 2, len(factors)), loaded.config)


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_reordering_of_rotary_pairs_is_llama_cpps_and_its_own_inverse(kind) -> None:
    weights = np.random.default_rng(0).standard_normal((24, 5), dtype=np.float32)
    assert np.array_equal(np.asarray(pairs_from_halves(kind(weights), 8)), permute(weights, 3, None))
    assert np.array_equal(np.asarray(halves_from_pairs(pairs_from_halves(kind(weights), 8), 8)), weights)
    assert np.array_equal(np.asarray(halves_from_pairs(kind(permute(weights[:, 0], 3, None)), 8)), weights[:, 0])


@pytest.mark.parametrize("dtype", ["Q8_0", "Q4_0", "Q4_1"])
def test_our_dequantisation_is_the_packages_bit_for_bit(dtype: str) -> None:
    kind = gguf.GGMLQuantizationType[dtype]
    numbers = np.random.default_rng(0).standard_normal((700, 32 * 13), dtype=np.float32)
    raw = gguf.quants.quantize(numbers, kind)
    assert np.array_equal(reader._dequantise(raw, dtype).reshape(numbers.shape), gguf.quants.dequantize(raw, kind))


def test_sizes_of_blocks_are_those_of_the_gguf_package() -> None:
    sizes = {kind.value: (kind.name, *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType}
    for number, block in BLOCKS.items():
        assert sizes[number] == block


VALUES = {
    "a.u8": ("uint8", 200),
    "a.i8": ("int8", -100),
    "a.u16": ("uint16", 60_000),
    "a.i16": ("int16", -30_000),
    "a.u32": ("uint32", 4_000_000_000),
    "a.i32": ("int32", -2_000_000_000),
    "a.u64": ("uint64", 1 << 63),
    "a.i64": ("int64", -(1 << 62)),
    "a.f32": ("float32", 0.5),
    "a.f64": ("float64", 0.1),
    "a.yes": ("bool", True),
    "a.no": ("bool", False),
    "a.text": ("string", "κόσμε 世界"),
    "a.ints": ("array", [1, -2, 3]),
    "a.floats": ("array", [0.5, 0.25]),
    "a.bools": ("array", [True, False]),
    "a.texts": ("array", ["a", "", "世"]),
}


def small_file(path: Path) -> bytes:
    writer = gguf.GGUFWriter(path, "llama")
    for key, (kind, value) in VALUES.items():
        getattr(writer, f"add_{kind}")(key, value)
    writer.add_tensor("one", np.arange(10, dtype=np.float32))
    writer.add_tensor("two", np.arange(96, dtype=np.float32).reshape(3, 32).astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def test_all_kinds_of_values_and_tensors_are_read(tmp_path: Path) -> None:
    small_file(tmp_path / "m.gguf")
    file = GgufFile(tmp_path / "m.gguf")
    assert file.metadata == {"general.architecture": "llama", **{key: value for key, (_, value) in VALUES.items()}}
    theirs = gguf.GGUFReader(tmp_path / "m.gguf")
    assert [tensor.name for tensor in theirs.tensors] == list(file.tensors)
    for tensor in theirs.tensors:
        assert np.array_equal(file.array(file.tensors[tensor.name]), tensor.data), tensor.name


# hostile files


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def header(num_tensors: int, num_keys: int, body: bytes = b"", *, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, num_tensors, num_keys) + body


def tensor_head(name: str, dimensions: list[int], kind: int, offset: int) -> bytes:
    count = len(dimensions)
    return text(name) + struct.pack(f"<I{count}Q", count, *dimensions) + struct.pack("<IQ", kind, offset)


HUGE = 1 << 62
HOSTILE = {
    "empty": (b"", "too few"),
    "another format": (b"PK\x03\x04" + bytes(40), "does not begin with GGUF"),
    "old version": (header(0, 0, bytes(8), version=1), "version 1"),
    "big endian": (b"GGUF" + struct.pack(">I", 3) + bytes(24), "big-endian"),
    "many keys": (header(0, HUGE), f"{HUGE:,} keys"),
    "many tensors": (header(HUGE, 0), f"{HUGE:,} tensors"),
    "keys that are not there": (header(0, 100), "are left"),
    "huge string": (header(0, 1, struct.pack("<Q", HUGE)), f"a string of {HUGE:,} bytes"),
    "string over the end": (header(0, 1, struct.pack("<Q", 60_000)), "are left"),
    "key not UTF-8": (header(0, 1, struct.pack("<Q", 2) + b"\xff\xfe" + bytes(16)), "not UTF-8"),
    "unknown type": (header(0, 1, text("k") + struct.pack("<I", 77)), "values of type 77"),
    "array of arrays": (header(0, 1, text("k") + struct.pack("<IIQ", 9, 9, 1 << 40)), "arrays of type 9"),
    "huge array of numbers": (header(0, 1, text("k") + struct.pack("<IIQ", 9, 0, HUGE)), "too long"),
    "array over the end": (header(0, 1, text("k") + struct.pack("<IIQ", 9, 4, 1000)), "are left"),
    "huge array of strings": (header(0, 1, text("k") + struct.pack("<IIQ", 9, 8, HUGE)), "too long"),
    "strings over the end": (header(0, 1, text("k") + struct.pack("<IIQQ", 9, 8, 1, 1 << 63)), "runs over the end"),
    "a key twice": (header(0, 2, (text("k") + struct.pack("<II", 4, 1)) * 2), "appears twice"),
    "bad alignment": (header(0, 1, text("general.alignment") + struct.pack("<II", 4, 3)), "alignment is 3"),
    "no dimensions": (header(1, 0, tensor_head("t", [], 0, 0)), "0 dimensions"),
    "many dimensions": (header(1, 0, tensor_head("t", [1] * 9, 0, 0)), "9 dimensions"),
    "unknown tensor type": (header(1, 0, tensor_head("t", [1], 99, 0)), "type 99"),
    "shape overflow": (header(1, 0, tensor_head("t", [1 << 33, 1 << 33], 0, 0)), "are not in the file"),
    "zero dimension": (header(1, 0, tensor_head("t", [0], 0, 0)), "cannot have the dimensions"),
    "broken block": (header(1, 0, tensor_head("t", [33], 2, 0) + bytes(64)), "cannot have the dimensions"),
    "offset outside": (header(1, 0, tensor_head("t", [1], 0, 1 << 40)), "are not in the file"),
    "offset wraps": (header(1, 0, tensor_head("t", [1], 0, (1 << 64) - 32)), "are not in the file"),
    "offset not aligned": (header(1, 0, tensor_head("t", [1], 0, 4) + bytes(100)), "not aligned"),
    "overlap": (header(2, 0, tensor_head("t", [16], 0, 0) + tensor_head("u", [16], 0, 32) + bytes(200)), "overlaps"),
    "a tensor twice": (header(2, 0, tensor_head("t", [1], 0, 0) * 2 + bytes(200)), "appears twice"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_by_name_in_bounded_memory(name: str, tmp_path: Path) -> None:
    content, message = HOSTILE[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=message) as caught:
            GgufFile(path)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_strings_of_all_arrays_together_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_STRINGS", 10)
    arrays = b"".join(text(f"k{i}") + struct.pack("<IIQ", 9, 8, 6) + text("") * 6 for i in range(2))
    (tmp_path / "bad.gguf").write_bytes(header(0, 2, arrays))
    with pytest.raises(InputError, match="6 strings is too long"):
        GgufFile(tmp_path / "bad.gguf")


@settings(max_examples=300, deadline=None)
@given(position=st.integers(0, 1 << 16), change=st.binary(min_size=1, max_size=8), cut=st.integers(0, 1 << 16) | st.none())
def test_any_damage_to_a_header_is_an_input_error_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, position: int, change: bytes, cut: int | None
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    content = bytearray(small_file(folder / "m.gguf"))
    position %= len(content)
    content[position : position + len(change)] = change
    content = content if cut is None else content[: cut % len(content)]
    (folder / "m.gguf").write_bytes(content)
    try:
        file = GgufFile(folder / "m.gguf")
        for tensor in file.tensors.values():
            file.array(tensor)
    except InputError:
        pass


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such file"):
        GgufFile(tmp_path / "none.gguf")
    with pytest.raises(InputError, match="cannot read"):
        GgufFile(tmp_path)


def test_an_unknown_architecture_and_bad_metadata_are_named(tmp_path: Path) -> None:
    small_file(tmp_path / "m.gguf")
    with pytest.raises(InputError, match=r"m\.gguf: tensor 'token_embd.weight' is missing"):
        load_model(tmp_path / "m.gguf")
    writer = gguf.GGUFWriter(tmp_path / "n.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match="architecture 'mamba' is not supported"):
        load_model(tmp_path / "n.gguf")


def test_missing_extra_and_mis_shaped_tensors_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = reference_model("llama-mha")
    write_model(tmp_path / "q.gguf", blocky_model(), dtype="Q5_0")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "gguf.quants", None)
        with pytest.raises(MissingExtraError, match=r"llmctl\[gguf\]"):
            load_model(tmp_path / "q.gguf")
    reference.model.layers[1].mlp.up_proj.weight.data = torch.zeros(60, 32)
    write_model(tmp_path / "m.gguf", reference)
    with pytest.raises(InputError, match=r"'blk.1.ffn_up.weight' has the shape \[60, 32\].*\[56, 32\]"):
        load_model(tmp_path / "m.gguf")
    write_model(tmp_path / "e.gguf", reference_model("llama-mha"), extra={"blk.0.odd.weight": np.zeros(3, dtype=np.float32)})
    with pytest.raises(InputError, match=r"'blk.0.odd.weight' has no place"):
        load_model(tmp_path / "e.gguf")


# tokenizers


def trained_backend(pre_tokenizer: Any, text_lines: list[str]) -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|end|>", "<|user|>"], show_progress=False
    )
    backend.train_from_iterator(text_lines, trainer)
    return backend


LINES = [
    "Once upon a time, in 1984, there was a king's daughter.",
    "  don't   stop\n\nnow 12345 67",
    "世界 κόσμε été 🙂",
    "I'LL be\tback\r\n",
] * 4


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_a_byte_level_tokenizer_is_recovered(name: str, tmp_path: Path) -> None:
    from tokenizers import Regex

    from llmctl.core.families.gguf_tokenizer import _LLAMA3, _QWEN2

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pre_tokenizer = {
        "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
        "smollm": pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
        "llama-bpe": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_LLAMA3), "isolated"), byte_level]),
        "qwen2": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_QWEN2), "isolated"), byte_level]),
    }[name]
    backend = trained_backend(pre_tokenizer, LINES)
    model = json.loads(backend.to_str())["model"]
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    vocab = sorted(model["vocab"], key=model["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(vocab)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in vocab])
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tokenizer = load_tokenizer(tmp_path / "t.gguf")
    assert tokenizer.vocab_size == len(vocab)
    assert tokenizer.chat_template == "{{ messages[0]['content'] }}"
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 0, None)
    assert tokenizer.special_ids == {0, 1}
    for line in LINES[:4]:
        ids = backend.encode(line).ids
        assert tokenizer.encode(line) == ([0, *ids] if name == "llama-bpe" else ids)
        assert tokenizer.decode(ids) == line


def sentencepiece_file(path: Path, *, architecture: str) -> None:
    """A vocabulary as SentencePiece trains it: special tokens, bytes, pieces with scores, best first; Gemma's with runs of spaces."""
    backend = Backend(models.BPE())
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=150, show_progress=False)
    backend.train_from_iterator(LINES, trainer)
    learned = json.loads(backend.to_str())["model"]["vocab"]
    gemma = architecture.startswith("gemma")
    special = ["<pad>", "<eos>", "<bos>", "<unk>"] if gemma else ["<unk>", "<s>", "</s>"]
    runs = ["\n", "\n\n", "  ", "   "] if gemma else ["<think>"]
    byte_pieces = [f"<0x{value:02X}>" for value in range(256)]
    pieces = [piece for piece in learned if piece not in ("▁▁", "▁▁▁", *runs)]
    pieces.sort(key=lambda piece: (len(piece) < 2, learned[piece]))
    kinds = [3] * len(special) + [4] * len(runs) + [6] * 256 + [1] * len(pieces)
    scores = [-1000.0] * (len(kinds) - len(pieces)) + [-float(i) for i in range(len(pieces))]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*special, *runs, *byte_pieces, *pieces])
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(special.index("<bos>" if gemma else "<s>"))
    writer.add_eos_token_id(special.index("<eos>" if gemma else "</s>"))
    writer.add_unk_token_id(special.index("<unk>"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_sentencepiece_tokenizer_is_recovered_as_transformers_does(architecture: str, tmp_path: Path) -> None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer, get_gguf_tokenizer

    path = tmp_path / "t.gguf"
    sentencepiece_file(path, architecture=architecture)
    ours = load_tokenizer(path)
    found, parts, settings = get_gguf_tokenizer(str(path))
    theirs, _ = convert_gguf_tokenizer(found, parts)
    assert settings["add_bos_token"] is True
    assert ours.adds_bos
    assert ours.special_ids >= {ours.bos_id, ours.eos_id}
    for line in [*LINES[:4], " one space", "  two\n\n   three", "a<think>b", "\U0001f600 \u0fff", "", "wonder king's"]:
        ids = theirs.encode(line, add_special_tokens=False).ids
        assert ours.encode(line) == [ours.bos_id, *ids], line
        assert ours.decode(ids) == theirs.decode(ids), line
        if architecture == "gemma3":
            assert ours.decode(ids) == line
    assert len({len(theirs.encode(word, add_special_tokens=False).ids) for word in ("there", "xyzzy")}) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": "t5"}, "of kind 't5'"),
        ({"tokenizer.ggml.model": "llama"}, "scores is missing"),
        ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.0]}, "a number for each of the 3 tokens"),
        (
            {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.0] * 3, "tokenizer.ggml.tokens": ["a", "b", "a" * 5000]},
            "5,000 char",
        ),
        ({"tokenizer.ggml.pre": "martian"}, "pre-tokenizer 'martian'"),
        ({"tokenizer.ggml.tokens": None}, "tokens is missing"),
        ({"tokenizer.ggml.merges": ["a"]}, "not two tokens"),
        ({"tokenizer.ggml.merges": ["a z"]}, "do not fit its tokens"),
        ({"tokenizer.ggml.bos_token_id": 3}, "there are 3 tokens"),
    ],
)
def test_a_bad_tokenizer_is_named(change: dict[str, Any], message: str) -> None:
    from llmctl.core.families.gguf_tokenizer import tokenizer_from_gguf

    metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a", "b", "ab"], "tokenizer.ggml.merges": ["a b"]}
    assert tokenizer_from_gguf(metadata, where="m.gguf").encode("ab") == [2]
    with pytest.raises(InputError, match=message):
        tokenizer_from_gguf({**metadata, **change}, where="m.gguf")


# the real thing


REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def smollm2() -> Path:
    path = os.environ.get("LLMCTL_TEST_SMOLLM2")
    if not path:
        pytest.skip("LLMCTL_TEST_SMOLLM2 is not set (the path of SmolLM2-135M-Instruct.Q4_1.gguf)")
    return Path(path)


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return json.loads((REPOSITORY / "tests" / "data" / "golden_smollm2.json").read_text())  # type: ignore[no-any-return]


def test_smollm2_gives_the_ids_and_the_loss_of_transformers(smollm2: Path, golden: dict[str, Any]) -> None:
    loaded, tokenizer = load_model(smollm2), load_tokenizer(smollm2)
    assert loaded.eos_ids == (2,)
    prompt = tokenizer.encode(golden["greedy"]["prompt"])
    cache = KVCache(loaded.config, num_slots=1, capacity=64)
    ids, new = list(prompt), torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(golden["greedy"]["max_new_tokens"]):
            new = loaded.model.logits(loaded.model.hidden(new, cache=cache)[:, -1:]).argmax(-1)
            ids.append(int(new))
        assert ids == golden["greedy"]["ids"]
        loss = golden["loss"]
        content = (REPOSITORY / "examples" / Path(loss["file"]).name).read_bytes().decode()[: loss["chars"]]
        tokens = torch.tensor([tokenizer.encode(content)[: loss["tokens"]]])
        found = torch.nn.functional.cross_entropy(loaded.model(tokens)[0, :-1], tokens[0, 1:])
    assert float(found) == pytest.approx(loss["mean_nll"], abs=1e-4)


def test_smollm2_chat_ids_are_those_of_its_template(smollm2: Path, golden: dict[str, Any]) -> None:
    tokenizer = load_tokenizer(smollm2)
    ids = tokenizer.encode_chat([{"role": "user", "content": golden["chat"]["user"]}], add_generation_prompt=True)
    assert golden["chat"]["ids"][: len(ids)] == ids
    assert tokenizer.decode(golden["chat"]["ids"][len(ids) :]) == golden["chat"]["answer"]


@pytest.fixture(scope="module")
def gemma3() -> Path:
    path = os.environ.get("LLMCTL_TEST_GEMMA3")
    if not path:
        pytest.skip("LLMCTL_TEST_GEMMA3 is not set (the path of gemma-3-270m-q4_k_m.gguf)")
    return Path(path)


def test_gemma3_gives_the_ids_and_the_loss_of_transformers(gemma3: Path) -> None:
    """Both read the same file, so that nothing of the model needs to be kept here."""
    pytest.importorskip("accelerate", reason="transformers reads GGUF files with it only")
    prompt = "The old lighthouse keeper had not spoken to anyone for"
    reference = transformers.AutoModelForCausalLM.from_pretrained(gemma3.parent, gguf_file=gemma3.name, dtype=torch.float32)
    theirs = transformers.AutoTokenizer.from_pretrained(gemma3.parent, gguf_file=gemma3.name)
    content = (REPOSITORY / "examples" / "tinyshakespeare.txt").read_text()[:2500]
    wanted_prompt, wanted_text = theirs(prompt).input_ids, theirs(content).input_ids[:600]  # longer than the window of 512
    with torch.no_grad():
        wanted = reference.generate(torch.tensor([wanted_prompt]), max_new_tokens=40, do_sample=False)[0].tolist()
        tokens = torch.tensor([wanted_text])
        loss = torch.nn.functional.cross_entropy(reference(tokens).logits[0, :-1], tokens[0, 1:])
    del reference
    loaded, tokenizer = load_model(gemma3), load_tokenizer(gemma3)
    assert tokenizer.encode(prompt) == wanted_prompt
    assert tokenizer.encode(content)[:600] == wanted_text
    cache = KVCache(loaded.config, num_slots=1, capacity=64)
    ids, new = list(wanted_prompt), torch.tensor([wanted_prompt])
    with torch.no_grad():
        while len(ids) < len(wanted):
            new = loaded.model.logits(loaded.model.hidden(new, cache=cache)[:, -1:]).argmax(-1)
            ids.append(int(new))
        assert ids == wanted
        found = torch.nn.functional.cross_entropy(loaded.model(tokens)[0, :-1], tokens[0, 1:])
    assert float(found) == pytest.approx(float(loss), abs=1e-4)
