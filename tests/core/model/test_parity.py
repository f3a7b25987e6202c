"""Our decoder against transformers' own models: logits, gradients, cached decoding, names and tensors."""

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn import functional as F

from llmctl.core.checkpoint import hf_tensors, load_config, load_model, save_model
from llmctl.core.families import FAMILIES
from llmctl.core.model import KVCache
from tests.core.model.families import SETTINGS, random_tokens, reference_model
from tests.core.model.table import record


@pytest.fixture(scope="module", params=list(SETTINGS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A transformers model, the folder that it was saved to, and our model loaded from there."""
    reference = reference_model(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    reference.save_pretrained(folder)
    return reference, folder, load_model(folder)


def test_logits_are_equal_in_float32(pair) -> None:
    reference, _, loaded = pair
    tokens = random_tokens(2, 40)
    with torch.no_grad():
        found, wanted = loaded.model(tokens), reference(tokens).logits
    record(loaded.family, "logits", found, wanted)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_gradients_are_equal(pair, tmp_path: Path) -> None:
    reference, _, loaded = pair
    tokens = random_tokens(2, 30, seed=2)
    for model in (reference, loaded.model):
        model.zero_grad()
    logits = reference(tokens).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    F.cross_entropy(loaded.model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    ours = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad  # None: an expert that no token chose
        for name, parameter in loaded.model.named_parameters()
    }
    gradients = hf_tensors(loaded.config, FAMILIES[loaded.family], ours, dtype=torch.float32)
    theirs = stored_gradients(reference, tmp_path)
    assert gradients.keys() == theirs.keys()
    for name, gradient in theirs.items():
        record(loaded.family, "gradients", gradients[name], gradient)
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def stored_gradients(reference: transformers.PreTrainedModel, folder: Path) -> dict[str, torch.Tensor]:
    """The gradients under the names and in the layout of a checkpoint, which for experts are not those of the modules."""
    holder = copy.deepcopy(reference)
    for held, parameter in zip(holder.parameters(), reference.parameters(), strict=True):
        held.data = parameter.grad
    holder.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("chunks", [[1] * 30, [30], [7, 1, 1, 13, 8], [29, 1]], ids=str)
def test_cached_decoding_is_equal_for_any_chunking(pair, chunks: list[int]) -> None:
    reference, _, loaded = pair
    tokens = random_tokens(2, 30, seed=3)
    cache = KVCache(loaded.config, num_slots=2, capacity=32)
    with torch.no_grad():
        parts = [loaded.model(part, cache=cache) for part in tokens.split(chunks, dim=1)]
        found, wanted = torch.cat(parts, dim=1), reference(tokens).logits
    record(loaded.family, "cached", found, wanted)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert cache.lengths.tolist() == [30, 30]


def test_names_and_tensors_survive_the_round_trip_bit_equal(pair, tmp_path: Path) -> None:
    _, folder, loaded = pair
    save_model(tmp_path, config=loaded.config, family=loaded.family, tensors=loaded.model.state_dict())
    theirs, ours = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name in theirs:
        record(loaded.family, "round trip", ours[name], theirs[name])
        assert torch.equal(ours[name], theirs[name]), name
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert load_config(tmp_path)[0] == loaded.config


def test_transformers_loads_what_we_write(pair, tmp_path: Path) -> None:
    reference, _, loaded = pair
    save_model(tmp_path, config=loaded.config, family=loaded.family, tensors=loaded.model.state_dict(), generation={"eos_token_id": [1, 3]})
    again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(again) is type(reference)
    assert again.generation_config.eos_token_id == [1, 3]
    tokens = random_tokens(1, 40, seed=4)
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, reference(tokens).logits)


def test_configs_of_transformers_4_are_read(pair, tmp_path: Path) -> None:
    """Version 4 wrote rope_theta and rope_scaling beside each other, and torch_dtype."""
    _, folder, loaded = pair
    config = json.loads((folder / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    rope = config.pop("rope_parameters", None)
    if rope is not None and "full_attention" in rope:  # Gemma 3
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    if rope is not None:
        neox = config["model_type"] == "gpt_neox"
        config["rotary_emb_base" if neox else "rope_theta"] = rope.pop("rope_theta")
        if "partial_rotary_factor" in rope:
            config["rotary_pct" if neox else "partial_rotary_factor"] = rope.pop("partial_rotary_factor")
        kind = rope.pop("rope_type")
        config["rope_scaling"] = None if kind == "default" else {"type": "su" if kind == "longrope" else kind, **rope}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_config(tmp_path)[0] == loaded.config


def test_greedy_generation_is_equal(pair) -> None:
    reference, _, loaded = pair
    prompt = random_tokens(1, 5, seed=5)
    wanted = reference.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=-1, pad_token_id=0)
    cache = KVCache(loaded.config, num_slots=1, capacity=32)
    ids, new = prompt[0].tolist(), prompt
    with torch.no_grad():
        for _ in range(20):
            new = loaded.model(new, cache=cache)[:, -1:].argmax(-1)
            ids.append(int(new))
    record(loaded.family, "generate", torch.tensor(ids), wanted[0])
    assert ids == wanted[0].tolist()
