"""Ids that somebody else computed: the article's GPT-2 program, and SmolLM2 in float32. Large files come from the environment."""

import json
import os
from pathlib import Path

import pytest
import torch

from llmctl.core.infer.events import Finished
from llmctl.core.infer.generator import Generator

DATA = os.environ.get("LLMCTL_TEST_DATA")
SMOLLM2 = os.environ.get("LLMCTL_TEST_SMOLLM2")


def answer(generator: Generator, text: str, max_new_tokens: int) -> Finished:
    request = generator.request(text, max_new_tokens=max_new_tokens, temperature=0.0)
    (done,) = [event for event in generator.engine.run([request]) if isinstance(event, Finished)]
    return done


@pytest.mark.skipif(DATA is None, reason="needs LLMCTL_TEST_DATA")
def test_the_articles_program_with_the_vocabulary_of_gpt2(tmp_path: Path) -> None:
    """`generate(max_length=50, num_return_sequences=1)` on "Once upon a time", greedy, on a tiny random GPT-2."""
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

    files = Path(str(DATA)) / "tokenizers" / "gpt2"
    tokenizer = GPT2TokenizerFast(vocab=str(files / "vocab.json"), merges=str(files / "merges.txt"))
    torch.manual_seed(3)
    model = GPT2LMHeadModel(GPT2Config(n_embd=48, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3)).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    inputs = tokenizer("Once upon a time", return_tensors="pt")
    expected = model.generate(**inputs, max_length=50, num_return_sequences=1, do_sample=False, pad_token_id=50256)[0]

    generator = Generator.open(tmp_path)
    request = generator.request("Once upon a time", max_new_tokens=46, temperature=0.0)
    assert list(request.prompt_ids) == inputs["input_ids"][0].tolist()
    done = answer(generator, "Once upon a time", 46)
    assert [*request.prompt_ids, *done.token_ids] == expected.tolist()
    assert done.text == tokenizer.decode(expected[4:], skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.fixture(scope="module")
def golden() -> dict[str, dict[str, object]]:
    return json.loads((Path(__file__).parents[2] / "data" / "golden_smollm2.json").read_text())  # type: ignore[no-any-return]


@pytest.mark.skipif(SMOLLM2 is None, reason="needs LLMCTL_TEST_SMOLLM2, the path of SmolLM2-135M-Instruct.Q4_1.gguf")
def test_smollm2_in_float32(golden: dict[str, dict[str, object]]) -> None:
    raw = Generator.open(str(SMOLLM2), dtype="float32", chat=False)
    request = raw.request(str(golden["greedy"]["prompt"]))
    done = answer(raw, str(golden["greedy"]["prompt"]), 40)
    assert [*request.prompt_ids, *done.token_ids] == golden["greedy"]["ids"]

    chat = Generator.open(str(SMOLLM2), dtype="float32")
    request = chat.request(str(golden["chat"]["user"]))
    done = answer(chat, str(golden["chat"]["user"]), 40)
    assert [*request.prompt_ids, *done.token_ids] == golden["chat"]["ids"]
    assert done.finish == "eos"
    assert done.text == str(golden["chat"]["answer"]).removesuffix("<|im_end|>")
