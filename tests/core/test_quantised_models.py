"""Models held quantised: the decoder with QuantWeights against the same decoder with the dequantised numbers, in and out of files."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from llmctl.core.checkpoint import load_config, load_model, load_model_and_tokenizer, save_quantised
from llmctl.core.checkpoint.calibrate import input_importance
from llmctl.core.checkpoint.quantweight import QuantWeight, held_bytes
from llmctl.core.errors import InputError
from llmctl.core.model import KVCache
from llmctl.core.model.facts import num_parameters
from llmctl.core.quant import LAYOUTS, dequantise, layout_for, quantise
from tests.cli.tiny_model import make_model
from tests.core.gguf_writer import blocky_model, k_quantised_model, write_model
from tests.core.model.families import random_tokens, reference_model

SETTINGS = ["gpt2-tied", "gpt2-free-head", "llama-gqa-tied", "llama-mqa-biases", "qwen3-head-dim"]


def plain_twin(path: Path, layout) -> torch.nn.Module:
    """The model of `path` whose matrices were rounded by hand, as ordinary tensors."""
    model = load_model(path, dtype=torch.float32).model
    importance = input_importance(model) if layout == "int4" else {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            chosen = layout_for(name, tuple(parameter.shape), layout)
            if chosen is not None:
                rounded = dequantise(quantise(parameter.numpy(), chosen, importance=importance.get(name)))
                parameter.copy_(torch.from_numpy(rounded))
    return model


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_model_quantised_at_load_has_the_logits_of_its_rounded_weights(setting: str, layout, tmp_path: Path) -> None:
    reference_model(setting).save_pretrained(tmp_path / "m")
    loaded = load_model(tmp_path / "m", quant=layout)
    twin = plain_twin(tmp_path / "m", layout)
    tokens = random_tokens(2, 20)
    with torch.inference_mode():
        wanted = twin(tokens)
        torch.testing.assert_close(loaded.model(tokens), wanted, atol=1e-5, rtol=1e-5)
        cache = KVCache(loaded.config, num_slots=2, capacity=20, dtype=loaded.dtype, device="cpu")
        steps = [loaded.model(tokens[:, :7], cache=cache)] + [loaded.model(tokens[:, i : i + 1], cache=cache) for i in range(7, 20)]
        torch.testing.assert_close(torch.cat(steps, dim=1), wanted, atol=1e-4, rtol=1e-4)
    assert loaded.quant == layout
    assert loaded.dtype == torch.float32


def test_importance_is_the_mean_square_of_inputs_and_lessens_the_error_of_products(tmp_path: Path) -> None:
    """Against the products themselves, on other inputs than those it was measured on."""
    model = blocky_model()
    with torch.no_grad():  # a few large inputs, as trained models have them
        for layer in model.model.layers:
            layer.input_layernorm.weight[::7] *= 20
    model.save_pretrained(tmp_path / "m")
    loaded = load_model(tmp_path / "m").model
    name = "layers.0.attn.q.weight"
    importance = input_importance(loaded)[name]
    seen = []
    hook = loaded.layers[0].attn.q.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    with torch.inference_mode():
        loaded(random_tokens(1, 60, seed=9))
    hook.remove()
    weights = loaded.state_dict()[name]
    assert set(input_importance(loaded)) == {n for n, p in loaded.named_parameters() if n.startswith("layers.") and p.ndim == 2}
    assert np.corrcoef(importance, seen[0].square().mean(dim=0).numpy())[0, 1] > 0.9
    errors = []
    for given in (None, importance):
        rounded = torch.from_numpy(dequantise(quantise(weights.numpy(), "int4", importance=given)))
        errors.append(float((seen[0] @ (rounded - weights).T).square().sum()))
    assert errors[1] < 0.6 * errors[0]


def test_memory_is_held_quantised(tmp_path: Path) -> None:
    blocky_model().save_pretrained(tmp_path / "m")
    sizes = {}
    for layout in (None, *LAYOUTS):
        loaded = load_model(tmp_path / "m", quant=layout)
        sizes[layout] = held_bytes(list(loaded.model.state_dict().values()))
        assert sum(p.numel() for p in loaded.model.parameters()) == num_parameters(loaded.config).total
    assert sizes["int8"] < 0.3 * sizes[None]
    assert sizes["int4"] < 0.22 * sizes[None]  # the head keeps 8 bits, and it is large in a model so small


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_pass_through_quantised_weights(layout, tmp_path: Path) -> None:
    """For adapters beside frozen quantised weights."""
    reference_model("llama-gqa-tied").save_pretrained(tmp_path / "m")
    models = [load_model(tmp_path / "m", quant=layout).model, plain_twin(tmp_path / "m", layout)]
    gradients = []
    for model in models:
        hidden = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        model.layers[0].mlp(hidden).square().sum().backward()
        gradients.append(hidden.grad)
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_quantised_directory_comes_back_bit_for_bit(layout, tmp_path: Path) -> None:
    make_model(tmp_path / "m")
    first, tokenizer = load_model_and_tokenizer(tmp_path / "m", quant=layout)
    (tmp_path / "q").mkdir()
    save_quantised(
        tmp_path / "q",
        config=first.config,
        family=first.family,
        tensors=first.model.state_dict(),
        layout=layout,
        tokenizer=tokenizer,
        max_shard_bytes=20_000,
    )
    assert len(list((tmp_path / "q").glob("*.safetensors"))) > 1
    again, words = load_model_and_tokenizer(tmp_path / "q")
    assert again.quant == layout
    assert words.fingerprint == tokenizer.fingerprint
    for name, tensor in again.model.state_dict().items():
        other = first.model.state_dict()[name]
        assert type(tensor) is type(other)
        assert torch.equal(torch.as_tensor(tensor + 0), torch.as_tensor(other + 0)), name
    tokens = random_tokens(1, 12)
    with torch.inference_mode():
        assert torch.equal(again.model(tokens), first.model(tokens))
    assert load_model(tmp_path / "q", quant=layout).quant == layout
    with pytest.raises(InputError, match="quantised already"):
        load_model(tmp_path / "q", quant="int4" if layout == "int8" else "int8")


@pytest.mark.parametrize(("kind", "layout"), [("Q8_0", "int8"), ("Q4_0", "int4"), ("Q4_1", "int4"), ("Q4_1", "int8")])
def test_ggufs_own_groups_are_held_without_loss(kind: str, layout, tmp_path: Path) -> None:
    write_model(tmp_path / "m.gguf", blocky_model(), dtype=kind)
    plain, held = load_model(tmp_path / "m.gguf"), load_model(tmp_path / "m.gguf", quant=layout)
    for name, tensor in held.model.state_dict().items():
        assert torch.equal(torch.as_tensor(tensor + 0), plain.model.state_dict()[name]), name
    kinds = {tensor.layout_name for tensor in held.model.state_dict().values() if isinstance(tensor, QuantWeight)}
    assert kinds == {"int8" if kind == "Q8_0" else "int4"}


def test_eight_bits_of_a_gguf_are_quantised_anew_to_four(tmp_path: Path) -> None:
    write_model(tmp_path / "m.gguf", blocky_model(), dtype="Q8_0")
    plain, held = load_model(tmp_path / "m.gguf").model.state_dict(), load_model(tmp_path / "m.gguf", quant="int4").model.state_dict()
    name = "layers.1.attn.q.weight"
    importance = input_importance(load_model(tmp_path / "m.gguf").model)
    wanted = dequantise(quantise(plain[name].numpy(), "int4", importance=importance[name]))
    assert torch.equal(held[name].numbers(), torch.from_numpy(wanted))
    assert torch.equal(held["embed.weight"].numbers(), plain["embed.weight"])


K_QUANTS = [("Q2_K",), ("Q3_K",), ("Q4_K",), ("Q5_K",), ("Q6_K",), ("Q4_K", "Q6_K", "Q5_K")]


@pytest.mark.parametrize("kinds", K_QUANTS, ids="-".join)
def test_k_quants_load_with_the_numbers_of_the_gguf_package(kinds: tuple[str, ...], tmp_path: Path) -> None:
    reference, raw = k_quantised_model(kinds)
    write_model(tmp_path / "m.gguf", reference, raw=raw)
    loaded, tokens = load_model(tmp_path / "m.gguf"), random_tokens(1, 40)
    with torch.inference_mode():
        torch.testing.assert_close(loaded.model(tokens), reference(tokens).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kinds", K_QUANTS[2:], ids="-".join)
def test_k_quants_are_quantised_anew_from_the_numbers_they_hold(kinds: tuple[str, ...], layout, tmp_path: Path) -> None:
    reference, raw = k_quantised_model(kinds)
    reference.save_pretrained(tmp_path / "m")
    write_model(tmp_path / "m.gguf", reference, raw=raw)
    held, twin = load_model(tmp_path / "m.gguf", quant=layout), plain_twin(tmp_path / "m", layout)
    tokens = random_tokens(1, 40)
    assert held.quant == layout
    with torch.inference_mode():
        torch.testing.assert_close(held.model(tokens), twin(tokens), atol=1e-5, rtol=1e-5)
    for (name, tensor), original in zip(
        held.model.state_dict().items(), load_model(tmp_path / "m").model.state_dict().values(), strict=True
    ):
        lost = float((torch.as_tensor(tensor + 0) - original).square().sum() / original.square().sum())
        assert lost < (1e-4 if layout == "int8" or "embed" in name or "head" in name else 2e-2), name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A quantised directory to damage."""
    make_model(tmp_path / "m")
    loaded = load_model(tmp_path / "m", quant="int4")
    (tmp_path / "q").mkdir()
    save_quantised(tmp_path / "q", config=loaded.config, family=loaded.family, tensors=loaded.model.state_dict(), layout="int4")
    return tmp_path / "q"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop("layers.0.attn.q.weight.codes"), "codes"),
        (lambda t: t.pop("layers.0.attn.q.weight.scales"), "scales"),
        (lambda t: t.pop("layers.0.attn.q.weight.minimums"), "minimums"),
        (lambda t: t.pop("final_norm.weight"), "final_norm.weight"),
        (lambda t: t.update({"embed.weight.minimums": t["embed.weight.scales"].clone()}), "none is wanted"),
        (lambda t: t.update({"layers.0.attn.q.weight.codes": t["layers.0.attn.q.weight.codes"][:-1].clone()}), "wanted"),
        (lambda t: t.update({"layers.0.attn.q.weight.scales": t["layers.0.attn.q.weight.scales"].float()}), "of F16 is wanted"),
        (lambda t: t.update({"final_norm.weight": torch.zeros(32, dtype=torch.uint8)}), "numbers of shape"),
        (lambda t: t.update({"stray": torch.zeros(3)}), "no place"),
    ],
)
def test_parts_that_do_not_fit_are_refused_by_name(folder: Path, damage, message: str) -> None:
    file = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    damage(tensors)
    safetensors.torch.save_file(tensors, file)
    with pytest.raises(InputError, match=message):
        load_model(folder)


@pytest.mark.parametrize("change", [{"format": 2}, {"group_size": 64}, {"layout": "int3"}, {"quant_method": "gptq"}])
def test_other_versions_and_other_methods_are_refused(folder: Path, change: dict[str, object]) -> None:
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"] |= change
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match="quantization_config"):
        load_config(folder)
