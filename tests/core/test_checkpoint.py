"""Models in and out: sharding, tokenizers beside weights, and everything that is refused, by name and in bounded memory."""

import contextlib
import dataclasses
import json
import mmap
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from llmctl.core import hub
from llmctl.core.checkpoint import (
    check_tokenizer,
    hf_tensors,
    load_config,
    load_model,
    load_model_and_tokenizer,
    load_tokenizer,
    resolve_model,
    save_model,
)
from llmctl.core.config.model import ModelConfig
from llmctl.core.errors import InputError, NotFoundError, WriteError
from llmctl.core.families import FAMILIES
from llmctl.core.model import Decoder
from llmctl.core.model.facts import tensor_shapes
from llmctl.core.model.shapes import shape_for_depth
from llmctl.core.tensorfile import INDEX_NAME, SINGLE_NAME, TensorFile
from tests.core.model.families import SETTINGS, random_tokens, reference_model

CONFIG = shape_for_depth(1, 50, 32, "llama")


def fresh_tensors(config=CONFIG, *, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    model = Decoder(config)
    model.init_weights(torch.Generator().manual_seed(0))
    return {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Llama's directory, float32, without a tokenizer."""
    path = tmp_path / "model"
    path.mkdir()
    save_model(path, config=CONFIG, family="llama", tensors=fresh_tensors())
    return path


def change_json(path: Path, **changes: Any) -> None:
    value = json.loads(path.read_text())
    value.update(changes)
    path.write_text(json.dumps({key: v for key, v in value.items() if v is not ...}))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in load_file(folder / SINGLE_NAME).items()}


# saving and loading


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_saved_model_loads_as_stored_and_transformers_agrees(tmp_path: Path, dtype: torch.dtype) -> None:
    save_model(tmp_path, config=CONFIG, family="llama", tensors=fresh_tensors(), dtype=dtype)
    loaded = load_model(tmp_path)
    assert loaded.dtype == dtype
    assert loaded.config == CONFIG
    assert not loaded.model.training
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    wide = load_model(tmp_path, dtype=torch.float32)
    tokens = random_tokens(1, 20) % 50
    with torch.no_grad():
        torch.testing.assert_close(wide.model(tokens), reference(tokens).logits, atol=1e-5, rtol=1e-5)


def test_sharded_directories_work_both_ways(tmp_path: Path) -> None:
    reference = reference_model("qwen3-head-dim")
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    reference.save_pretrained(theirs, max_shard_size="20KB")
    assert (theirs / INDEX_NAME).is_file()
    loaded = load_model(theirs)
    ours.mkdir()
    save_model(ours, config=loaded.config, family="qwen3", tensors=loaded.model.state_dict(), max_shard_bytes=20_000)
    shards = sorted(ours.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    assert all(shard.stat().st_size < 22_000 for shard in shards)
    again = transformers.AutoModelForCausalLM.from_pretrained(ours)
    for name, tensor in reference.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    tokens = random_tokens(1, 30)
    with torch.no_grad():
        assert torch.equal(load_model(ours).model(tokens), loaded.model(tokens))


def test_weights_are_mapped_and_changing_them_leaves_the_file_alone(folder: Path) -> None:
    before = (folder / SINGLE_NAME).read_bytes()
    loaded = load_model(folder)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.add_(1.0)
    assert (folder / SINGLE_NAME).read_bytes() == before
    assert all(torch.equal(parameter, fresh_tensors()[name] + 1.0) for name, parameter in loaded.model.named_parameters())


def test_loading_with_conversion_gives_back_the_pages_it_read(tmp_path: Path) -> None:
    """Peak memory stays under the result plus 100 MB: 72 MB of bf16 become 144 MB of float32 (Linux counts in /proc)."""
    if not Path("/proc/self/status").exists() or not hasattr(mmap, "MADV_DONTNEED"):
        pytest.skip("needs Linux's /proc")
    config = shape_for_depth(8, 16_000, 64, "llama")
    save_model(tmp_path, config=config, family="llama", tensors=fresh_tensors(config, dtype=torch.bfloat16))
    code = """
import sys, torch
from llmctl.core.checkpoint import load_model
from pathlib import Path
def peak(key): return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(key))
before = peak("VmRSS")
model = load_model(Path(sys.argv[1]), dtype=torch.float32).model
print(peak("VmHWM") - before, sum(p.numel() * 4 for p in model.parameters()))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    grown, wanted = map(int, done.stdout.split())
    assert grown < wanted + (50 << 20), f"{grown >> 20} MB for {wanted >> 20} MB of weights"


def test_a_bare_trunk_and_old_buffers_are_read_as_the_hub_has_gpt2(tmp_path: Path) -> None:
    """openai-community/gpt2 has names without `transformer.`, masks as `attn.bias`, and no lm_head."""
    reference = reference_model("gpt2-tied")
    reference.save_pretrained(tmp_path)
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in weights(tmp_path).items()}
    assert "wte.weight" in tensors
    for layer in range(3):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, tmp_path / SINGLE_NAME)
    tokens = random_tokens(1, 20)
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path).model(tokens), reference(tokens).logits, atol=1e-5, rtol=1e-5)


def test_a_tied_head_may_be_stored_as_a_copy_but_not_as_something_else(folder: Path) -> None:
    tensors = weights(folder)
    assert "lm_head.weight" not in tensors
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, folder / SINGLE_NAME)
    assert load_model(folder).config == CONFIG
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, folder / SINGLE_NAME)
    with pytest.raises(InputError, match=r"'lm_head.weight' has no place"):
        load_model(folder)


def test_unaligned_tensors_are_read(folder: Path) -> None:
    """The format lets a header be of any length."""
    content = (folder / SINGLE_NAME).read_bytes()
    length = int.from_bytes(content[:8], "little")
    (folder / SINGLE_NAME).write_bytes(struct.pack("<Q", length + 1) + content[8 : 8 + length] + b" " + content[8 + length :])
    loaded = load_model(folder)
    assert all(torch.equal(tensor, fresh_tensors()[name]) for name, tensor in loaded.model.state_dict().items())


def test_ends_of_text_come_from_the_generation_config_first(folder: Path) -> None:
    change_json(folder / "config.json", eos_token_id=3)
    assert load_model(folder).eos_ids == (3,)
    change_json(folder / "generation_config.json", eos_token_id=[4, 5], temperature=0.6)
    loaded = load_model(folder)
    assert loaded.eos_ids == (4, 5)
    assert loaded.generation["temperature"] == 0.6
    (folder / "generation_config.json").unlink()
    assert load_model(folder).eos_ids == (3,)


def test_what_is_saved_must_be_the_whole_model(tmp_path: Path) -> None:
    tensors = fresh_tensors()
    for wrong, message in (
        ({name: tensor for name, tensor in tensors.items() if name != "final_norm.weight"}, "'final_norm.weight' is missing"),
        ({**tensors, "extra": torch.zeros(1)}, "'extra' is not one of this model's"),
        ({**tensors, "final_norm.weight": torch.zeros(3)}, r"'final_norm.weight' has the shape \[3\]"),
    ):
        with pytest.raises(InputError, match=message):
            save_model(tmp_path, config=CONFIG, family="llama", tensors=wrong)
    with pytest.raises(InputError, match="'mamba' is not known"):
        save_model(tmp_path, config=CONFIG, family="mamba", tensors=tensors)
    with pytest.raises(InputError, match="gpt2 model cannot have"):
        save_model(tmp_path, config=CONFIG, family="gpt2", tensors=tensors)


def test_a_full_disk_is_a_write_error(tmp_path: Path) -> None:
    code = """
import resource, signal, sys, torch
from pathlib import Path
from llmctl.core.checkpoint import save_model
from llmctl.core.errors import WriteError
from llmctl.core.model.facts import tensor_shapes
from llmctl.core.model.shapes import shape_for_depth
config = shape_for_depth(1, 50, 32, "llama")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
tensors = {name: torch.zeros(shape) for name, shape in tensor_shapes(config).items()}
try:
    save_model(Path(sys.argv[1]), config=config, family="llama", tensors=tensors)
except WriteError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "cannot write" in done.stdout
    assert "model.safetensors" in done.stdout
    assert WriteError.exit_code == 5


def configs_of(family: str) -> list[ModelConfig]:
    """The facts of every setting of the parity tests that is of this family."""
    types = FAMILIES[family].model_types
    raw = [transformers.AutoConfig.for_model(kind, **options).to_dict() for kind, options in SETTINGS.values() if kind in types]
    return [FAMILIES[family].config_from_hf(config) for config in raw]


@pytest.mark.parametrize("family", list(FAMILIES))
def test_name_rules_work_on_numpy_as_on_torch(family: str) -> None:
    config = configs_of(family)[0]
    tensors = fresh_tensors(config)
    theirs = hf_tensors(config, FAMILIES[family], tensors, dtype=torch.float32)
    for binding in FAMILIES[family].bindings(config, tensor_shapes(config)):
        array = theirs[binding.theirs].numpy()
        assert array.shape == binding.their_shape
        parts = binding.rule.to_ours(array, binding.our_shapes)
        for name, part in zip(binding.ours, parts, strict=True):
            assert np.array_equal(part, tensors[name].numpy()), name
        assert np.array_equal(binding.rule.to_theirs(parts), array)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_config_that_the_family_cannot_say_is_refused_by_the_fact(family: str) -> None:
    """Or a saved model would load as another. No family has a bias on the head."""
    config = dataclasses.replace(configs_of(family)[0], head_bias=True)
    with pytest.raises(InputError, match=f"a {family} model cannot have head_bias = True"):
        FAMILIES[family].write_config(config, dtype="float32", bos_id=None, eos_ids=(), pad_id=None)


# tokenizers


def add_tokenizer(folder: Path, num_ids: int) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    backend = Backend(models.WordLevel({f"w{i}": i for i in range(num_ids)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w1"}))


def test_a_tokenizer_with_more_ids_than_the_model_is_refused_with_both_numbers(folder: Path) -> None:
    add_tokenizer(folder, 50)
    loaded, tokenizer = load_model_and_tokenizer(folder)
    assert tokenizer.encode("w3 w4") == [3, 4]
    check_tokenizer(tokenizer, loaded.config, where=folder)
    add_tokenizer(folder, 51)
    with pytest.raises(InputError, match="51 ids, the model has embeddings for 50"):
        load_model_and_tokenizer(folder)


def test_saving_with_a_tokenizer_lets_transformers_generate_and_stop(folder: Path, tmp_path: Path) -> None:
    add_tokenizer(folder, 50)
    tokenizer = load_tokenizer(folder)
    path = tmp_path / "out"
    path.mkdir()
    save_model(path, config=CONFIG, family="llama", tensors=fresh_tensors(), tokenizer=tokenizer, generation={"temperature": 0.5})
    assert json.loads((path / "config.json").read_text())["eos_token_id"] == 1
    generation = transformers.GenerationConfig.from_pretrained(path)
    assert generation.eos_token_id == 1
    assert generation.temperature == 0.5
    assert transformers.AutoTokenizer.from_pretrained(path)("w3 w4").input_ids == [3, 4]
    assert load_model(path).eos_ids == (1,)


# refusals


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "auto_map": ({"auto_map": {"AutoModelForCausalLM": "evil--code.Model"}}, "'auto_map'"),
    "pipelines": ({"custom_pipelines": {"x": {}}}, "'custom_pipelines'"),
    "attention of somebody's": ({"_attn_implementation_internal": "kernels-community/evil"}, "'_attn_implementation_internal'"),
    "kernels": ({"kernel_config": {"a": "b"}}, "'kernel_config'"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "unknown type": ({"model_type": "mamba"}, "model_type 'mamba'"),
    "type not text": ({"model_type": ["llama"]}, "model_type"),
    "missing size": ({"hidden_size": ...}, "hidden_size is missing"),
    "size as text": ({"hidden_size": "64"}, "hidden_size is '64'"),
    "size true": ({"num_hidden_layers": True}, "num_hidden_layers is True"),
    "negative": ({"vocab_size": -1}, "vocab_size is -1"),
    "huge": ({"vocab_size": 1 << 40}, "vocab_size is 1099511627776"),
    "a billion layers": ({"num_hidden_layers": 10**9}, "1000000000 layers"),
    "heads do not divide": ({"num_attention_heads": 3, "head_dim": ...}, "hidden_size 64 is not a multiple of num_attention_heads 3"),
    "kv heads do not divide": ({"num_attention_heads": 4, "num_key_value_heads": 3}, "4 heads cannot share 3"),
    "odd head": ({"head_dim": 7}, "even size, 7"),
    "activation": ({"hidden_act": "mish"}, "'mish' is not supported"),
    "epsilon": ({"rms_norm_eps": 0}, "norm_eps 0"),
    "epsilon infinite": ({"rms_norm_eps": 1e300}, "rms_norm_eps is 1e\\+300"),
    "rope not a table": ({"rope_parameters": "fast"}, "rope parameters are 'fast'"),
    "rope by layer": ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "differ by layer"),
    "rope kind": ({"rope_parameters": {"rope_type": "spiral"}}, "'spiral' is not supported"),
    "rope without factor": ({"rope_parameters": {"rope_type": "linear"}}, "'linear' lack factor"),
    "rope factor": ({"rope_parameters": {"rope_type": "linear", "factor": -2}}, "factor is -2"),
    "rope theta": ({"rope_parameters": {"rope_theta": 0}}, "rope_theta is 0"),
    "rope range": (
        {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}},
        "low_freq_factor 4.0 must be below",
    ),
    "partial rope": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    "tied as text": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_a_bad_config_is_refused_by_key(folder: Path, name: str) -> None:
    changes, message = BAD_CONFIGS[name]
    change_json(folder / "config.json", **changes)
    with pytest.raises(InputError, match=message) as caught:
        load_model(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


FUZZED = {family: configs_of(family)[-1] for family in FAMILIES}
OTHER_KEYS = {"head_dim", "rope_parameters", "rope_scaling", "model_type", "sliding_window", "layer_types", "no_rope_layer_interval"}
KEYS = sorted({*OTHER_KEYS, *(key for family, config in FUZZED.items() for key in FAMILIES[family].config_to_hf(config))})
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
TABLE_KEYS = st.sampled_from(["rope_type", "factor", "rope_theta", "x"])


def nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(inner, max_size=3) | st.dictionaries(TABLE_KEYS, inner, max_size=3)


@settings(max_examples=400, deadline=None)
@given(key=st.sampled_from(KEYS), value=st.recursive(SCALARS, nested, max_leaves=6), family=st.sampled_from(list(FAMILIES)))
def test_any_value_of_a_config_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, key: str, value: Any, family: str) -> None:
    path = tmp_path_factory.mktemp("config") / "config.json"
    raw = FAMILIES[family].write_config(FUZZED[family], dtype="float32", bos_id=None, eos_ids=(), pad_id=None)
    path.write_text(json.dumps({**raw, key: value}))
    with contextlib.suppress(InputError):
        load_config(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not valid JSON"),
        ("[1]", "a JSON object is wanted"),
        ('{"a": 1, "a": 2}', "'a' appears twice"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_config_that_is_no_object_is_refused(folder: Path, content: str, message: str) -> None:
    for name in ("config.json", "generation_config.json"):
        kept = (folder / name).read_text()
        (folder / name).write_text(content)
        with pytest.raises(InputError, match=message):
            load_model(folder)
        (folder / name).write_text(kept)


def test_missing_extra_and_mis_shaped_tensors_are_named(folder: Path) -> None:
    tensors = weights(folder)
    norm = "model.norm.weight"
    for wrong, message in (
        ({name: tensor for name, tensor in tensors.items() if name != norm}, rf"tensor '{norm}' is missing"),
        ({**tensors, "model.odd": torch.zeros(2)}, "tensor 'model.odd' has no place in this llama model"),
        ({**tensors, norm: torch.zeros(63)}, rf"'{norm}' has the shape \[63\], the config asks for \[64\]"),
        ({**tensors, norm: torch.zeros(64, dtype=torch.int64)}, f"'{norm}' has the dtype I64"),
    ):
        save_file(wrong, folder / SINGLE_NAME)
        with pytest.raises(InputError, match=message):
            load_model(folder)


def safetensors(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded + data


def entry(start: int, end: int, *, dtype: str = "F32", shape: Any = (1,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


BAD_FILES = {
    "empty": (b"", "too few"),
    "header of no length": (safetensors(b"", length=0) + bytes(20), "claims 0 bytes"),
    "header of 2^63": (safetensors(b"{}", length=1 << 63), f"claims {1 << 63:,} bytes"),
    "header cut off": (safetensors(b"{}", length=100), "claims 100 bytes"),
    "not JSON": (safetensors(b"{nope}"), "not valid JSON"),
    "not UTF-8": (safetensors(b'{"\xff": 1}'), "not UTF-8"),
    "a list": (safetensors([1, 2]), "not a JSON object"),
    "deep": (safetensors(b"[" * 200_000), "nested too deeply"),
    "a name twice": (safetensors(b'{"a": %b, "a": %b}' % ((json.dumps(entry(0, 4)).encode(),) * 2), bytes(4)), "'a' appears twice"),
    "no fields": (safetensors({"a": {}}), "tensor 'a': the header must give"),
    "dtype": (safetensors({"a": entry(0, 4, dtype="F8")}, bytes(4)), "tensor 'a': dtype 'F8'"),
    "dtype not text": (safetensors({"a": entry(0, 4, dtype=["F32"])}, bytes(4)), "tensor 'a': dtype"),
    "shape negative": (safetensors({"a": entry(0, 4, shape=[-1])}, bytes(4)), "tensor 'a': .* is not a shape"),
    "shape overflow": (safetensors({"a": entry(0, 0, shape=[1 << 32, 1 << 32])}), "takes 73,786,976,294,838,206,464 bytes"),
    "shape of fractions": (safetensors({"a": entry(0, 4, shape=[1.0])}, bytes(4)), "is not a shape"),
    "shape against bytes": (safetensors({"a": entry(0, 4, shape=[2])}, bytes(4)), "takes 8 bytes, the header gives it 4"),
    "offsets outside": (safetensors({"a": entry(0, 8, shape=[2])}, bytes(4)), "do not lie within"),
    "offsets backwards": (safetensors({"a": entry(4, 0)}, bytes(4)), "do not lie within"),
    "overlap": (safetensors({"a": entry(0, 8, shape=[2]), "b": entry(4, 8)}, bytes(8)), "'b' overlaps"),
    "hole": (safetensors({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)), "'b' leaves a hole"),
    "hole at the start": (safetensors({"a": entry(4, 8)}, bytes(8)), "'a' leaves a hole"),
    "bytes left over": (safetensors({"a": entry(0, 4)}, bytes(9)), "5 bytes after the last tensor"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_safetensors_file_is_refused_by_name(folder: Path, name: str) -> None:
    content, message = BAD_FILES[name]
    (folder / SINGLE_NAME).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load_model(folder)
    assert str(folder / SINGLE_NAME) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_huge_header_is_refused_before_it_is_read(folder: Path) -> None:
    with open(folder / SINGLE_NAME, "wb") as file:
        file.write(struct.pack("<Q", 101 << 20))
        file.truncate(200 << 20)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="a header of 105,906,176 bytes"):
            load_model(folder)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@settings(max_examples=300, deadline=None)
@given(position=st.integers(0, 1 << 16), change=st.binary(min_size=1, max_size=4), cut=st.integers(0, 1 << 16) | st.none())
def test_any_damage_to_a_safetensors_file_is_an_input_error_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, position: int, change: bytes, cut: int | None
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / SINGLE_NAME
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, path)
    content = bytearray(path.read_bytes())
    position %= len(content)
    content[position : position + len(change)] = change
    path.write_bytes(content if cut is None else content[: cut % len(content)])
    with contextlib.suppress(InputError):
        TensorFile(path)


def shard(folder: Path, table: dict[str, str] | None = None) -> Path:
    """Turn `folder` into a sharded one: two files and an index, whose weight_map is `table` or the right one."""
    tensors = weights(folder)
    (folder / SINGLE_NAME).unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[:4], "b.safetensors": names[4:]}
    for file, inside in parts.items():
        save_file({name: tensors[name] for name in inside}, folder / file)
    right = {name: file for file, inside in parts.items() for name in inside}
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": right if table is None else table}))
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "../b.safetensors",
        "/etc/passwd.safetensors",
        "x/../../b.safetensors",
        "a\0.safetensors",
        "a\\b.safetensors",
        "",
        "a.bin",
        7,
        None,
        ["a"],
    ],
    ids=repr,
)
def test_a_shard_name_that_leaves_the_folder_is_refused_before_it_is_opened(
    folder: Path, name: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard(folder, {"model.norm.weight": name})
    monkeypatch.setattr("llmctl.core.tensorfile.open_regular", lambda path: pytest.fail(f"{path} was opened"))
    with pytest.raises(InputError, match="refused"):
        load_model(folder)


def test_a_shard_that_is_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    shard(folder)
    (folder / "a.safetensors").rename(tmp_path / "outside.safetensors")
    (folder / "a.safetensors").symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(InputError, match="is a link that leaves the folder"):
        load_model(folder)


def test_links_inside_the_hubs_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    """The cache keeps files in blobs/ and links to them from snapshots/REVISION/."""
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in folder.iterdir():
        file.rename(blobs / f"hash-of-{file.name}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"hash-of-{file.name}")
    assert load_model(snapshot).config == CONFIG


def test_an_index_and_its_files_must_agree(folder: Path) -> None:
    shard(folder)
    assert load_model(folder).config == CONFIG
    right = json.loads((folder / INDEX_NAME).read_text())["weight_map"]
    name = next(iter(right))

    def index(table: Any) -> None:
        (folder / INDEX_NAME).write_text(json.dumps({"weight_map": table}))

    index({**right, "model.odd": "a.safetensors"})
    with pytest.raises(InputError, match=r"lists a tensor that is not in it: 'model.odd'"):
        load_model(folder)
    index({key: value for key, value in right.items() if key != name})
    with pytest.raises(InputError, match=f"does not list its tensor: '{name}'"):
        load_model(folder)
    index({**right, name: "c.safetensors"})
    with pytest.raises(InputError, match=r"c\.safetensors: no such file"):
        load_model(folder)
    for table in ({}, [], None, "x"):
        index(table)
        with pytest.raises(InputError, match="no weight_map"):
            load_model(folder)
    tensors = load_file(folder / "b.safetensors")
    save_file({**tensors, name: load_file(folder / "a.safetensors")[name]}, folder / "b.safetensors")
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {**right}}).replace("{}", ""))
    with pytest.raises(InputError, match=name):
        load_model(folder)


class Canary:
    """Unpickled, it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "weights.ckpt", "model.pkl"])
def test_a_pickle_is_refused_by_name_and_never_run(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / SINGLE_NAME).unlink()
    (folder / name).write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    for load in (lambda: load_model(folder), lambda: load_model(folder / name), lambda: resolve_model(str(folder / name))):
        with pytest.raises(InputError, match=f"{name}: pickle refused"):
            load()
    assert not (tmp_path / "canary").exists()


def test_what_is_not_there_is_not_found(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(NotFoundError, match=r"config\.json"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(NotFoundError, match=r"config\.json"):
        load_model(tmp_path)
    (folder / SINGLE_NAME).unlink()
    with pytest.raises(NotFoundError, match=r"no model\.safetensors"):
        load_model(folder)
    (folder / SINGLE_NAME).mkdir()
    with pytest.raises(NotFoundError, match=r"no model\.safetensors"):
        load_model(folder)
    with pytest.raises(InputError, match="a model is a directory"):
        resolve_model(str(folder / "config.json"))


# finding


def test_a_run_folder_is_told_from_a_model(tmp_path: Path) -> None:
    for step in (10, 20):
        (tmp_path / "run" / f"step-{step:08d}").mkdir(parents=True)
    with pytest.raises(NotFoundError, match=r"is a run folder, not a model; its newest checkpoint is .*run/step-00000020"):
        resolve_model(str(tmp_path / "run"))


def test_a_reference_is_a_path_then_a_built_in_then_a_hub_id(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(folder)) == folder
    (tmp_path / "x.gguf").touch()
    assert resolve_model(str(tmp_path / "x.gguf")) == tmp_path / "x.gguf"
    monkeypatch.setattr("llmctl.core.checkpoint.resolve.BUILT_IN", tmp_path)
    assert resolve_model("model") == tmp_path / "model"
    monkeypatch.setattr(hub, "fetch_model", lambda reference: Path("/cache") / reference)
    assert resolve_model("org/name@v1.0") == Path("/cache/org/name@v1.0")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert resolve_model("org/name") == Path("org/name")
    for nothing in ("", "nothing", "a/b/c", "../..//x", "a" * 5000, "a\0b", "gro/", "/no/where", "org/na me", "http://x/y"):
        with pytest.raises(NotFoundError, match="not found"):
            resolve_model(nothing)


@pytest.mark.parametrize("setting", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}], ids=["offline", "unreachable"])
def test_a_hub_model_that_cannot_be_had_is_one_line_and_quick(tmp_path: Path, setting: dict[str, str]) -> None:
    code = """
from llmctl.core.checkpoint import resolve_model
from llmctl.core.errors import NotFoundError
try:
    resolve_model("nobody/no-such-model")
except NotFoundError as error:
    print(error)
"""
    environment = {**{key: value for key, value in os.environ.items() if not key.startswith("HF_")}, **setting}
    environment |= {"HF_HOME": str(tmp_path), "HF_TOKEN": "hf_secret"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=240, check=True)
    assert "not found locally, offline" in done.stdout
    assert done.stdout.count("\n") == 1
    assert "hf_secret" not in done.stdout + done.stderr
    assert done.stderr == ""


def test_a_model_in_the_hubs_cache_needs_no_network(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    found = hub.fetch_model("org/name")
    assert found == snapshot
    assert load_model(found).config == CONFIG
    assert hub.fetch_model("org/name@main") == snapshot


def test_finding_a_model_and_its_tokenizer_needs_no_torch() -> None:
    code = """
import sys
from llmctl.core.checkpoint import check_tokenizer, load_config, load_tokenizer, resolve_model
import llmctl.core.gguf, llmctl.core.families.gguf_tokenizer
sys.exit(any(name in sys.modules for name in ("torch", "transformers")))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_loading_needs_no_transformers(folder: Path) -> None:
    add_tokenizer(folder, 50)
    code = """
import sys
from pathlib import Path
from llmctl.core.checkpoint import load_model_and_tokenizer
load_model_and_tokenizer(Path(sys.argv[1]))
sys.exit("transformers" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code, str(folder)], check=False).returncode == 0
