"""Adapters in PEFT's directory format: written, read, merged, refused. PEFT itself is the reference of the slow tests."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llmctl.core.checkpoint import load_model, resolve_adapted, save_adapter, save_model
from llmctl.core.checkpoint.adapter import adaptable_modules, choose_modules
from llmctl.core.config.export import ExportConfig
from llmctl.core.errors import InputError, LlmctlError, NotFoundError, UsageError
from llmctl.core.export.events import Verified
from llmctl.core.export.export import export
from llmctl.core.families import family_named
from llmctl.core.infer.opening import ExecutorKind, open_model
from llmctl.core.model import Decoder
from llmctl.core.model.lora import LoraConfig, add_adapters
from tests.core.model.families import VOCAB, reference_model
from tests.core.native.models import runnable_kernels

TOKENS = torch.arange(24).reshape(2, 12) * 5 % VOCAB
LORA = LoraConfig(rank=3, alpha=4.5)


def saved_base(folder: Path, setting: str) -> Path:
    reference_model(setting).save_pretrained(folder)
    return folder


def adapted(base: Path, targets: tuple[str, ...]) -> tuple[Decoder, str, str]:
    """The base with adapters that are not zero; its family and its fingerprint."""
    loaded = load_model(base, dtype=torch.float32, identify=True)
    chosen = choose_modules(adaptable_modules(loaded.config, family_named(loaded.family)), targets)
    groups = [[name.removesuffix(".weight") for name in binding.ours] for binding in chosen.values()]
    add_adapters(loaded.model, groups, LORA, seed=1)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if name.endswith("lora_b"):
                parameter.normal_(std=0.2, generator=draw)
    assert loaded.fingerprint is not None
    return loaded.model, loaded.family, loaded.fingerprint


def saved_adapter(folder: Path, base: Path, targets: tuple[str, ...] = ("all-linear",)) -> Decoder:
    model, family, fingerprint = adapted(base, targets)
    folder.mkdir()
    save_adapter(
        folder,
        config=model.config,
        family=family,
        tensors=model.state_dict(),
        lora=LORA,
        targets=targets,
        base=str(base),
        fingerprint=fingerprint,
    )
    return model


ODD = [
    "gpt2-tied",
    "gpt_neox-quarter",
    "phi3-gqa-window-partial",
    "llama-mqa-biases",
    "qwen3-tied-biases",
    "gemma2-windows",
    "mixtral-all-tied",
]
"""Matrices that transformers holds joined, transposed, head by head, alone, and beside experts."""


@pytest.mark.parametrize("setting", ODD)
def test_an_adapter_merged_at_load_computes_what_it_did_in_training(tmp_path: Path, setting: str) -> None:
    base = saved_base(tmp_path / "base", setting)
    model = saved_adapter(tmp_path / "adapter", base)
    loaded = load_model(base, dtype=torch.float32, adapter=tmp_path / "adapter").model
    with torch.no_grad():
        wanted = model(TOKENS)
        torch.testing.assert_close(loaded(TOKENS), wanted, atol=2e-5, rtol=1e-5)
        assert not torch.allclose(load_model(base).model(TOKENS), wanted, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("setting", ODD)
@pytest.mark.parametrize("targets", [("all-linear",), None], ids=["all", "some"])
def test_peft_computes_the_same_with_an_adapter_of_ours(tmp_path: Path, setting: str, targets: tuple[str, ...] | None) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = saved_base(tmp_path / "base", setting)
    family = load_model(base).family
    some = {"gpt2": ("attn.c_proj", "c_attn"), "gpt_neox": ("query_key_value", "dense_4h_to_h"), "phi3": ("qkv_proj", "gate_up_proj")}
    model = saved_adapter(tmp_path / "adapter", base, targets or some.get(family, ("q_proj", "v_proj")))
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(TOKENS).logits, model(TOKENS), atol=2e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("setting", ODD)
@pytest.mark.parametrize("more", [{}, {"use_rslora": True}, {"alpha_pattern": True}], ids=["plain", "rslora", "alpha-pattern"])
def test_an_adapter_of_pefts_computes_the_same_with_us(tmp_path: Path, setting: str, more: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = saved_base(tmp_path / "base", setting)
    names = {"gpt2": "c_attn", "gpt_neox": "query_key_value", "phi3": "qkv_proj"}
    name = names.get(load_model(base).family, "q_proj")
    if "alpha_pattern" in more:
        more = {"alpha_pattern": {name: 9}}
    targets = ["q_proj", "v_proj"] if setting.startswith("mixtral") else "all-linear"  # there, all includes the stacked experts
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM", **more)
    torch.manual_seed(0)
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        wanted = theirs(TOKENS).logits
        ours = load_model(base, dtype=torch.float32, adapter=tmp_path / "adapter").model
        torch.testing.assert_close(ours(TOKENS), wanted, atol=1e-4, rtol=1e-4)


@pytest.fixture
def llama(tmp_path: Path) -> tuple[Path, Path]:
    """A base and an adapter for it."""
    base = saved_base(tmp_path / "base", "llama-gqa-tied")
    saved_adapter(tmp_path / "adapter", base)
    return base, tmp_path / "adapter"


def test_the_executors_take_an_adapter_alike(llama: tuple[Path, Path]) -> None:
    base, adapter = llama
    ids = np.arange(9)[None] * 7 % VOCAB
    wanted = load_model(base, dtype=torch.float32, adapter=adapter).model(torch.from_numpy(ids))[0, -1].detach().numpy()
    kinds: list[ExecutorKind] = ["torch", *(["native"] if runnable_kernels() else [])]  # type: ignore[list-item]
    for kind in kinds:
        executor = open_model(base, device="cpu", dtype="f32", executor=kind, adapter=adapter).executor
        executor.reserve(num_slots=1, capacity=16)
        found = executor.step(ids, np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64))
        np.testing.assert_allclose(found[0], wanted, atol=2e-5)


def test_the_fingerprint_is_that_of_the_numbers_not_of_the_files(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", "llama-gqa-tied")
    loaded = load_model(base, identify=True)
    save = {"config": loaded.config, "family": loaded.family, "tensors": loaded.model.state_dict()}
    for name, more in (("shards", {"max_shard_bytes": 20_000}), ("bf16", {"dtype": torch.bfloat16})):
        (tmp_path / name).mkdir()
        save_model(tmp_path / name, **save, **more)  # type: ignore[arg-type]
        assert load_model(tmp_path / name, identify=True).fingerprint == loaded.fingerprint
    changed = {name: tensor * 1.01 if name == "layers.1.mlp.up.weight" else tensor for name, tensor in loaded.model.state_dict().items()}
    (tmp_path / "other").mkdir()
    save_model(tmp_path / "other", **{**save, "tensors": changed})  # type: ignore[arg-type]
    assert load_model(tmp_path / "other", identify=True).fingerprint != loaded.fingerprint


def test_another_base_is_refused_by_both_executors(tmp_path: Path, llama: tuple[Path, Path]) -> None:
    base, adapter = llama
    other = tmp_path / "other"
    shutil.copytree(base, other)
    weights = load_file(base / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, other / "model.safetensors", metadata={"format": "pt"})
    for load in (lambda: load_model(other, adapter=adapter), lambda: open_model(other, device="cpu", adapter=adapter)):
        with pytest.raises(InputError, match=r"trained on another model.*its base was .*base"):
            load()


def test_an_adapter_finds_its_base_and_both_can_be_named(tmp_path: Path, llama: tuple[Path, Path]) -> None:
    base, adapter = llama
    assert resolve_adapted(str(base), None) == (base, None)
    for named in ((str(adapter), None), (None, str(adapter)), (str(base), str(adapter))):
        assert resolve_adapted(*named) == (base, adapter)
    with pytest.raises(InputError, match="is no adapter"):
        resolve_adapted(None, str(base))
    with pytest.raises(UsageError, match="is an adapter too"):
        resolve_adapted(str(adapter), str(adapter))
    base.rename(tmp_path / "moved")
    with pytest.raises(NotFoundError, match=r"its base model is not there.*--model BASE --adapter"):
        resolve_adapted(str(adapter), None)
    assert resolve_adapted(str(tmp_path / "moved"), str(adapter))[0] == tmp_path / "moved"


def _changed_config(adapter: Path, **keys: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True}, "use_dora = 'True' is not supported"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"lora_alpha": "x"}, "lora_alpha is 'x'"),
        ({"alpha_pattern": {"(a+)+$": 3}}, "is a regular expression"),
    ],
)
def test_what_cannot_be_applied_is_refused(llama: tuple[Path, Path], keys: dict[str, Any], message: str) -> None:
    base, adapter = llama
    _changed_config(adapter, **keys)
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        load_model(base, adapter=adapter)


@pytest.mark.parametrize("damage", ["missing", "pickle", "half", "shape", "stranger", "empty", "int8", "cut"])
def test_bad_weights_are_refused_by_name(llama: tuple[Path, Path], damage: str) -> None:
    base, adapter = llama
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(key for key in tensors if key.endswith("q_proj.lora_A.weight"))
    if damage in ("missing", "pickle"):
        file.rename(adapter / ("adapter_model.bin" if damage == "pickle" else "elsewhere"))
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-5])
    else:
        if damage == "half":
            del tensors[name]
        elif damage == "shape":
            tensors[name] = tensors[name][:, :-1].contiguous()
        elif damage == "stranger":
            tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.zeros(3, VOCAB)
        elif damage == "int8":
            tensors[name] = tensors[name].to(torch.int8)
        save_file(tensors if damage != "empty" else {}, file)
    with pytest.raises(LlmctlError) as caught:
        load_model(base, adapter=adapter)
    assert caught.value.exit_code == (10 if damage == "missing" else 4)
    assert "adapter" in str(caught.value)


def test_targets_are_named_as_peft_names_them() -> None:
    family = family_named("gpt2")
    modules = adaptable_modules(family.config_from_hf({"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}), family)
    assert len(choose_modules(modules, ("all-linear",))) == 8
    assert list(choose_modules(modules, ("attn.c_proj",))) == [f"transformer.h.{i}.attn.c_proj" for i in range(2)]
    assert len(choose_modules(modules, ("c_proj",))) == 4
    with pytest.raises(InputError, match="--lora-targets q_proj: this model has no such module; it has c_attn, c_proj, c_fc"):
        choose_modules(modules, ("q_proj",))


def test_quantised_loading_merges_before_it_quantises(llama: tuple[Path, Path]) -> None:
    """Quantising the merged model, saved by PEFT's arithmetic, gives the same codes."""
    base, adapter = llama
    merged = load_model(base, dtype=torch.float32, adapter=adapter)
    whole = base.parent / "whole"
    whole.mkdir()
    save_model(whole, config=merged.config, family=merged.family, tensors=merged.model.state_dict())
    with torch.no_grad():
        found = load_model(base, quant="int8", adapter=adapter).model(TOKENS)
        assert torch.equal(found, load_model(whole, quant="int8").model(TOKENS))


def test_the_config_of_an_adapter_says_what_peft_wants_to_know(llama: tuple[Path, Path]) -> None:
    base, adapter = llama
    written = json.loads((adapter / "adapter_config.json").read_text())
    assert written["peft_type"] == "LORA"
    assert written["base_model_name_or_path"] == str(base)
    assert (written["r"], written["lora_alpha"]) == (LORA.rank, LORA.alpha)
    assert written["target_modules"] == sorted(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    assert dataclasses.asdict(LORA)["dropout"] == written["lora_dropout"]


def test_an_export_merges_in_float32_and_rounds_once(tmp_path: Path, llama: tuple[Path, Path]) -> None:
    """Over a base in bf16: float32 keeps the merged numbers, and bf16 is their rounding, the cost of which is told."""
    base, adapter = llama
    loaded = load_model(base)
    (tmp_path / "half").mkdir()
    save_model(tmp_path / "half", config=loaded.config, family=loaded.family, tensors=loaded.model.state_dict(), dtype=torch.bfloat16)
    merged = load_model(tmp_path / "half", dtype=torch.float32, adapter=adapter).model.state_dict()
    for dtype, kept in ((None, torch.bfloat16), ("float32", torch.float32)):
        out = tmp_path / str(dtype)
        events = list(export(ExportConfig(model=str(tmp_path / "half"), adapter=str(adapter), output=out, dtype=dtype)))
        (verified,) = (event for event in events if isinstance(event, Verified))
        assert (verified.rounding_difference > 0) == (dtype is None)
        found = load_model(out).model.state_dict()
        assert all(torch.equal(found[name], tensor.to(kept)) for name, tensor in merged.items())
