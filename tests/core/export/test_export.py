"""Exports read back by the programs that they are for: transformers for directories and GGUF, its tokenizers, our own readers."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers

from llmctl.core.card import license_of
from llmctl.core.checkpoint import load_model, load_tokenizer
from llmctl.core.config.export import ExportConfig
from llmctl.core.errors import InputError, LlmctlError, UsageError
from llmctl.core.export import gguf as gguf_format
from llmctl.core.export.events import Event, Opened, Verified, Warned, Written
from llmctl.core.export.export import export
from llmctl.core.gguf import GgufFile
from tests.core.export.tiny import make_model
from tests.core.gguf_writer import write_model
from tests.core.model.families import random_tokens
from tests.core.test_gguf_tokenizer import sentencepiece_file

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def run(model: Path | str, output: Path, **settings: object) -> list[Event]:
    return list(export(ExportConfig(model=str(model), output=output, **settings)))  # type: ignore[arg-type]


def verified(events: list[Event]) -> Verified:
    (found,) = (event for event in events if isinstance(event, Verified))
    return found


def transformers_logits(folder: Path, tokens: torch.Tensor, **options: object) -> torch.Tensor:
    with torch.no_grad():
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()(tokens).logits


def our_logits(path: Path, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return load_model(path, dtype=torch.float32).model(tokens)


TOKENS = random_tokens(1, 30)


def test_a_directory_is_the_same_model_to_transformers(model: Path, tmp_path: Path) -> None:
    events = run(model, tmp_path / "out", max_shard_size="60KB")
    assert [type(event) for event in events] == [Opened, Verified, Written]
    assert verified(events).reader == "transformers"
    assert verified(events).largest_difference < 1e-4
    assert verified(events).rounding_difference == 0
    assert verified(events).tokenizer_checked
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert torch.equal(transformers_logits(tmp_path / "out", TOKENS), transformers_logits(model, TOKENS))
    text = "it's 123 cats\n\n  two words"
    words, again = (transformers.AutoTokenizer.from_pretrained(path) for path in (model, tmp_path / "out"))
    assert words(text)["input_ids"] == again(text)["input_ids"]
    assert words.chat_template == again.chat_template


@pytest.mark.parametrize("dtype", ["bf16", "float16"])
def test_another_number_format_is_the_rounded_model(dtype: str, model: Path, tmp_path: Path) -> None:
    found = verified(run(model, tmp_path / "out", dtype=dtype))
    assert found.largest_difference < 1e-4 < found.rounding_difference
    kind = {"bf16": torch.bfloat16, "float16": torch.float16}[dtype]
    assert load_model(tmp_path / "out").dtype == kind
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=kind)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0", "q4_0"])
def test_a_gguf_file_is_the_same_model_to_transformers_and_to_us(kind: str, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    found = verified(run(model, file, format="gguf", dtype=kind))
    assert found.largest_difference < 1e-4
    assert (found.rounding_difference == 0) == (kind == "f32")
    theirs = our_logits(file, TOKENS)
    bound = {"f32": 1e-5, "f16": 0.02, "bf16": 0.2, "q8_0": 0.3, "q4_0": 4.0}[kind]
    assert (theirs - transformers_logits(model, TOKENS)).abs().max() < bound
    kinds = {name: tensor.kind for name, tensor in GgufFile(file).tensors.items()}
    assert kinds["blk.0.attn_q.weight"] == kind.upper()
    assert kinds["token_embd.weight"] == kinds["output.weight"] == ("Q8_0" if kind == "q4_0" else kind.upper())
    assert kinds["blk.0.attn_norm.weight"] == "F32"


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_the_tensors_are_those_that_llama_cpps_converter_writes(kind: str, model: Path, tmp_path: Path) -> None:
    """Byte for byte; the other writer is that of the tests of the reader, made after convert_hf_to_gguf.py."""
    run(model, tmp_path / "ours.gguf", format="gguf", dtype=kind.lower())
    write_model(tmp_path / "theirs.gguf", transformers.AutoModelForCausalLM.from_pretrained(model), dtype=kind)
    ours, theirs = GgufFile(tmp_path / "ours.gguf"), GgufFile(tmp_path / "theirs.gguf")
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name, tensor in theirs.tensors.items():
        assert (ours.tensors[name].kind, ours.tensors[name].shape) == (tensor.kind, tensor.shape)
        assert np.array_equal(ours.raw(ours.tensors[name]), theirs.raw(tensor)), name
    for key, value in theirs.metadata.items():
        if key not in ("general.quantization_version", "general.file_type"):
            assert ours.metadata[key] == value, key


_FOR_TRANSFORMERS: dict[str, dict[str, object]] = {
    "llama": {"tie_word_embeddings": False},
    "mistral": {"sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": True, "head_dim": 128},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 768, "norm_topk_prob": True},
    "gemma2": {"head_dim": 256},
    "gemma3_text": {"head_dim": 256, "num_hidden_layers": 6},
    "phi3": {"vocab_size": 32064, "pad_token_id": None},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "max_position_embeddings": 1024},
}
"""With the sizes that transformers does not read from a file, but has as its defaults."""


@pytest.mark.parametrize("model_type", _FOR_TRANSFORMERS)
def test_transformers_reads_the_gguf_as_the_same_model(model_type: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers reads GGUF files with accelerate only")
    folder = make_model(tmp_path / "m", model_type=model_type, **_FOR_TRANSFORMERS[model_type])
    run(folder, tmp_path / "m.gguf", format="gguf")
    theirs = transformers_logits(tmp_path, TOKENS, gguf_file="m.gguf")
    torch.testing.assert_close(theirs, transformers_logits(folder, TOKENS), atol=1e-4, rtol=1e-4)


def test_a_window_that_gguf_has_no_key_for_becomes_the_context_with_a_warning(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m", model_type="mistral", sliding_window=20)
    events = run(folder, tmp_path / "m.gguf", format="gguf")
    (warning,) = (event.message for event in events if isinstance(event, Warned))
    assert "context of 128 tokens becomes 20" in warning
    assert verified(events).num_tokens == 20
    assert load_model(tmp_path / "m.gguf").config.max_positions == 20


def test_llama_3s_scaling_goes_into_gguf_as_factors(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    folder = make_model(tmp_path / "m", rope_parameters={**rope, "original_max_position_embeddings": 8192})
    run(folder, tmp_path / "m.gguf", format="gguf")
    assert load_model(tmp_path / "m.gguf").config.rope_scaling == load_model(folder).config.rope_scaling


@pytest.mark.parametrize(("split", "name"), [("gpt2", "gpt-2"), ("llama3", "llama-bpe")])
def test_the_tokenizer_in_a_gguf_gives_the_same_ids_and_chats(split: str, name: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m", split=split)
    run(folder, tmp_path / "m.gguf", format="gguf")
    ours, again = load_tokenizer(folder), load_tokenizer(tmp_path / "m.gguf")
    metadata = GgufFile(tmp_path / "m.gguf").metadata
    assert metadata["tokenizer.ggml.pre"] == name
    assert metadata["tokenizer.ggml.tokens"][-1].startswith("[PAD")
    for text in ("it's 1234 cats; don't\n\n  two words <|im_end|>", "naïve 日本語 😀"):
        assert again.encode(text) == ours.encode(text)
        assert again.encode(text, allow_special=True) == ours.encode(text, allow_special=True)
    assert (again.bos_id, again.eos_id, again.chat_template) == (ours.bos_id, ours.eos_id, ours.chat_template)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    assert theirs.convert_ids_to_tokens(list(range(20))) == transformers.AutoTokenizer.from_pretrained(folder).convert_ids_to_tokens(
        list(range(20))
    )


def test_a_sentencepiece_tokenizer_goes_into_gguf(tmp_path: Path) -> None:
    sentencepiece_file(tmp_path / "words.gguf", architecture="llama")
    backend = tokenizers.Tokenizer.from_str(load_tokenizer(tmp_path / "words.gguf").to_json())
    folder = make_model(tmp_path / "m", backend=backend, vocab_size=500)
    assert verified(run(folder, tmp_path / "m.gguf", format="gguf")).tokenizer_checked
    metadata = GgufFile(tmp_path / "m.gguf").metadata
    assert metadata["tokenizer.ggml.model"] == "llama"
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf"), load_tokenizer(folder)
    for text in ("Once upon a time", "  two   spaces, 1984", "été 世界 \U0001f600"):
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text, add_bos=False), text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "spaces"}, "no pre-tokenizer"),
        ({"hidden_act": "gelu"}, "activation is 'gelu'"),
        ({"model_type": "gemma2", "tie_word_embeddings": False}, "no name for head.weight"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "beta_fast": 8.0}}, "rope_scaling"),
    ],
)
def test_what_gguf_cannot_hold_is_refused_and_leaves_nothing(changes: dict, message: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m", **changes)
    with pytest.raises(InputError, match=message):
        run(folder, tmp_path / "m.gguf", format="gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_odd_rows_are_written_as_f16_with_a_warning(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m", intermediate_size=100)
    events = run(folder, tmp_path / "m.gguf", format="gguf", dtype="q8_0")
    assert any(isinstance(event, Warned) and "no multiple of 32" in event.message for event in events)
    assert GgufFile(tmp_path / "m.gguf").tensors["blk.0.ffn_down.weight"].kind == "F16"


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_quantised_weights_come_back_as_they_were_held(quant: str, model: Path, tmp_path: Path) -> None:
    found = verified(run(model, tmp_path / "q", format="quant", quant=quant))
    assert found.largest_difference == 0 < found.rounding_difference
    again = load_model(tmp_path / "q")
    assert again.quant == quant
    with torch.inference_mode():
        assert torch.equal(again.model(TOKENS), load_model(model, quant=quant).model(TOKENS))
    assert verified(run(tmp_path / "q", tmp_path / "hf")).rounding_difference == 0
    torch.testing.assert_close(transformers_logits(tmp_path / "hf", TOKENS), our_logits(tmp_path / "q", TOKENS), atol=1e-4, rtol=1e-4)


def test_a_gguf_becomes_a_directory_again(model: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "m.gguf", format="gguf")
    run(tmp_path / "m.gguf", tmp_path / "back")
    torch.testing.assert_close(transformers_logits(tmp_path / "back", TOKENS), transformers_logits(model, TOKENS), atol=1e-4, rtol=1e-4)
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text())["eos_token_id"] == 2


def test_a_wrong_result_is_not_kept(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_format, "_reordered", lambda array, *_: np.roll(array, 1, axis=0))
    with pytest.raises(LlmctlError, match="verification failed"):
        run(model, tmp_path / "m.gguf", format="gguf")
    assert list(tmp_path.iterdir()) == []
    events = run(model, tmp_path / "m.gguf", format="gguf", verify=False)
    assert [type(event) for event in events] == [Opened, Written]


def test_float16_that_would_overflow_is_refused(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        loaded.model.layers[0].mlp.up_proj.weight[0, 0] = 1e6
    loaded.save_pretrained(folder)
    for settings in ({"dtype": "f16"}, {"dtype": "f16", "format": "gguf"}):
        with pytest.raises(InputError, match="65504"):
            run(folder, tmp_path / ("x.gguf" if "format" in settings else "x"), **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_the_card_tells_tokenizer_parent_licence_and_versions(model: Path, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "parent")
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# Parent\n")
    run(folder, tmp_path / "out", dtype="bf16")
    card = (tmp_path / "out" / "README.md").read_text()
    assert license_of(card) == "apache-2.0"
    for part in ("parent", "bfloat16", load_tokenizer(folder).fingerprint, torch.__version__, "| llmctl |"):
        assert part in card
    run(tmp_path / "out", tmp_path / "m.gguf", format="gguf")
    metadata = GgufFile(tmp_path / "m.gguf").metadata
    assert metadata["general.license"] == "apache-2.0"
    assert license_of(metadata["llmctl.card"]) == "apache-2.0"


def test_outputs_that_are_there_are_kept(model: Path, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_text("mine")
    with pytest.raises(UsageError, match="--overwrite"):
        run(model, tmp_path / "m.gguf", format="gguf")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    for format in ("hf", "quant"):
        with pytest.raises(UsageError, match="holds something"):
            run(model, tmp_path / "full", format=format, overwrite=True)
    assert (tmp_path / "m.gguf").read_text() == "mine"
    run(model, tmp_path / "m.gguf", format="gguf", overwrite=True, verify=False)
    (tmp_path / "empty").mkdir()
    run(model, tmp_path / "empty", verify=False)
    assert (tmp_path / "empty" / "config.json").is_file()
