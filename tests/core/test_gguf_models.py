"""GGUF files as models, in and out: every family against transformers, names and bytes against llama.cpp's own tables."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from llmctl.core.checkpoint import load_model
from llmctl.core.errors import InputError
from llmctl.core.families import FAMILIES
from llmctl.core.families.gguf import GGUF_FAMILIES, family_record, halves_from_pairs, pairs_from_halves
from llmctl.core.families.gguf_rope import llama3_scaling
from llmctl.core.gguf import GgufFile
from tests.core.gguf_writer import architecture_of, blocky_model, permute, write_model
from tests.core.model.families import SETTINGS, random_tokens, reference_model

gguf = pytest.importorskip("gguf")

HELD = [
    "gpt2-tied",
    "gpt2-free-head",
    "gpt_neox-quarter",
    "gpt_neox-sequential-tied",
    "gpt_neox-linear",
    "llama-mha",
    "llama-gqa-tied",
    "llama-mqa-biases",
    "llama-head-dim",
    "llama-rope-linear",
    "mistral-full-tied",
    "mixtral-two-of-four",
    "mixtral-all-tied",
    "qwen2-gqa",
    "qwen3-head-dim",
    "qwen3_moe-every-layer",
    "gemma-tied",
    "gemma2-windows",
    "gemma3-windows",
    "phi3-mha",
    "phi3-gqa-window-partial",
    "phi3-longrope-short",
    "olmo2-mha",
    "granite-multipliers",
    "granite-tied-biases",
    "smollm3-every-fourth",
]
"""Settings that GGUF has keys and names for."""
SHORTENED = {"qwen2-window": 7, "qwen3-window": 5, "mistral-window": 7, "mixtral-one-of-three-window": 6}
"""Settings that it has within the window only."""
REFUSED = {
    "gpt2-gelu": "activation is 'gelu'",
    "gpt2-relu": "activation is 'relu'",
    "gpt_neox-whole-no-bias": "activation is 'gelu_tanh'",
    "llama-gelu": "activation is 'gelu_tanh'",
    "llama-rope-llama3": "not those of Llama 3's scaling",
    "llama-rope-yarn-mscale": "rope_scaling",
    "qwen3-tied-biases": "attn.o.bias",
    "qwen3_moe-some-layers": "layers.1.mlp.gate.weight",
    "gemma-untied-bias": "head.weight",
    "gemma2-scale-untied": "head.weight",
    "gemma3-scaled-softcap": "attention_scale is 0.0625",
    "olmo2-gqa-tied-bias": "attn.o.bias",
    "smollm3-chosen-window": "attn.o.bias",
}
"""Settings that llama.cpp has no file for, and what it lacks."""


def exported(setting: str, folder: Path) -> tuple[transformers.PreTrainedModel, Path]:
    """The transformers model of a setting, and what our export makes of its directory."""
    from llmctl.core.export.gguf import write

    reference = reference_model(setting)
    reference.save_pretrained(folder / "hf")
    loaded = load_model(folder / "hf")
    tensors = {name: tensor.numpy() for name, tensor in loaded.model.state_dict().items()}
    write(folder / "m.gguf", config=loaded.config, record=family_record(loaded.family), tensors=tensors, kind="F32", extra={})
    return reference, folder / "m.gguf"


def logits(model: transformers.PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("setting", HELD)
def test_models_that_llama_cpp_converts_load_with_equal_logits(setting: str, tmp_path: Path) -> None:
    reference = reference_model(setting)
    write_model(tmp_path / "m.gguf", reference)
    loaded = load_model(tmp_path / "m.gguf")
    assert loaded.family == reference.config.model_type.removesuffix("_text").replace("mistral", "llama")
    assert loaded.dtype == torch.float32
    tokens = random_tokens(2, 60)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(tokens), logits(reference, tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("setting", HELD)
def test_the_export_writes_the_tensors_and_keys_of_llama_cpps_converter(setting: str, tmp_path: Path) -> None:
    """Byte for byte."""
    reference, path = exported(setting, tmp_path)
    write_model(tmp_path / "theirs.gguf", reference)
    ours, theirs = GgufFile(path), GgufFile(tmp_path / "theirs.gguf")
    copy = {"output.weight"} if reference.config.model_type in ("gpt_neox", "olmo2") else set()  # llama.cpp asks for it even if tied
    assert ours.tensors.keys() - copy == theirs.tensors.keys() - copy
    for name, tensor in theirs.tensors.items():
        assert (ours.tensors[name].kind, ours.tensors[name].shape) == (tensor.kind, tensor.shape), name
        assert np.array_equal(ours.raw(ours.tensors[name]), theirs.raw(tensor)), name
    for key, value in theirs.metadata.items():
        assert ours.metadata[key] == value, key


@pytest.mark.parametrize("setting", [*HELD, "llama-rope-yarn", "llama-rope-dynamic"])
def test_what_our_export_writes_is_the_same_model(setting: str, tmp_path: Path) -> None:
    reference, path = exported(setting, tmp_path)
    again = load_model(path)
    assert again.config.tie_embeddings == reference.config.tie_word_embeddings
    tokens = random_tokens(1, 60)
    with torch.no_grad():
        torch.testing.assert_close(again.model(tokens), logits(reference, tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("setting", SHORTENED)
def test_a_window_without_a_key_becomes_the_context(setting: str, tmp_path: Path) -> None:
    reference, path = exported(setting, tmp_path)
    again = load_model(path)
    assert again.config.max_positions == SHORTENED[setting]
    tokens = random_tokens(2, SHORTENED[setting])
    with torch.no_grad():
        torch.testing.assert_close(again.model(tokens), logits(reference, tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("setting", REFUSED)
def test_what_llama_cpp_has_no_file_for_is_refused_by_name(setting: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"GGUF.*{REFUSED[setting]}"):
        exported(setting, tmp_path)


def test_every_family_goes_in_and_out_in_some_setting() -> None:
    kinds = {SETTINGS[setting][0].removesuffix("_text") for setting in HELD}
    assert kinds == set(FAMILIES)
    assert {*HELD, *SHORTENED, *REFUSED} <= SETTINGS.keys()


@pytest.mark.parametrize("record", GGUF_FAMILIES.values(), ids=lambda record: record.family)
def test_the_names_are_those_that_llama_cpp_lists_for_the_architecture(record) -> None:
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == record.architecture)
    listed = {gguf.TENSOR_NAMES[tensor].replace("{bid}", "{i}") for tensor in gguf.MODEL_TENSORS[number]}
    assert {rule.theirs.rpartition(".")[0] for rule in record.rules} <= listed


def test_every_model_type_has_an_architecture() -> None:
    for family in FAMILIES.values():
        config = transformers.AutoConfig.for_model(family.model_types[0])
        assert family_record(family.name).architecture == architecture_of(config)


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
