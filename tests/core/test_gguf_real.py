"""Real GGUF files against transformers: SmolLM2's Q4_1 and Gemma 3's Q4_K_M."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from llmctl.core.checkpoint import load_model, load_tokenizer
from llmctl.core.model import KVCache

gguf = pytest.importorskip("gguf")

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
