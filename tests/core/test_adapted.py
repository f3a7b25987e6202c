"""Architectures that no family covers, through transformers: the decoder's interface against transformers' own logits and texts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from llmctl.core.checkpoint import load_model
from llmctl.core.checkpoint.adapt import load_adapted
from llmctl.core.errors import InputError, UsageError
from llmctl.core.evals.scoring import score_groups, score_sequences
from llmctl.core.evals.tokens import Group
from llmctl.core.families import is_known
from llmctl.core.infer.torch_executor import TorchExecutor
from llmctl.core.model import KVCache
from llmctl.core.model.adapted import AdaptedModel
from tests.core.model.families import VOCAB, random_tokens

_SMALL = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "opt": {**_SIZES, "ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 32},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "cohere": {**_SIZES, "intermediate_size": 48, "max_position_embeddings": 64, "logit_scale": 0.3},
}
"""Learned positions with an offset, ALiBi, interleaved rotation, a recurrent state, scaled logits."""


def write(folder: Path, architecture: str) -> transformers.PreTrainedModel:
    config = transformers.AutoConfig.for_model(architecture, **_SMALL, **ARCHITECTURES[architecture])
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A transformers model, and ours loaded from where it was saved."""
    folder = tmp_path_factory.mktemp(request.param)
    reference = write(folder, request.param)
    return reference, load_model(folder, adapt=True)


def test_it_says_what_it_is(pair) -> None:
    reference, loaded = pair
    assert not is_known({"model_type": reference.config.model_type})
    assert isinstance(loaded.model, AdaptedModel)
    assert loaded.note is not None
    assert repr(reference.config.model_type) in loaded.note
    assert "transformers" in loaded.note
    assert loaded.config.vocab_size == VOCAB
    assert loaded.eos_ids == (1,)
    assert sum(p.numel() for p in loaded.model.parameters()) == sum(p.numel() for p in reference.parameters())


def test_logits_are_transformers(pair) -> None:
    reference, loaded = pair
    tokens = random_tokens(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(tokens), reference(tokens).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ragged_slots_in_pieces_cut_back_and_copied_are_as_the_whole_text(pair, dtype: torch.dtype) -> None:
    """`dtype` is the cache's: it holds ids, which bf16 must not round."""
    reference, loaded = pair
    texts = [random_tokens(1, length, seed=length)[0] for length in (9, 14)]
    cache = KVCache(loaded.config, num_slots=4, capacity=16, dtype=dtype)

    def feed(pieces: list[tuple[int, int, torch.Tensor]]) -> list[torch.Tensor]:
        """(slot, start, tokens) of one call -> logits of each piece."""
        width = max(len(tokens) for _, _, tokens in pieces)
        ids, places = torch.zeros(len(pieces), width, dtype=torch.int64), torch.full((len(pieces), width), -1)
        for row, (_, start, tokens) in enumerate(pieces):
            ids[row, : len(tokens)] = tokens
            places[row, : len(tokens)] = torch.arange(start, start + len(tokens))
        with torch.no_grad():
            out = loaded.model(ids, positions=places, cache=cache, slots=torch.tensor([slot for slot, _, _ in pieces]))
        return [out[row, : len(tokens)] for row, (_, _, tokens) in enumerate(pieces)]

    with torch.no_grad():
        whole = [reference(text[None]).logits[0] for text in texts]

    def check(found: torch.Tensor, text: int, start: int) -> None:
        torch.testing.assert_close(found, whole[text][start : start + len(found)], atol=2e-5, rtol=2e-5)

    first, second = feed([(2, 0, texts[0][:4]), (0, 0, texts[1][:7])])
    check(first, 0, 0)
    check(second, 1, 0)
    first, second = feed([(2, 4, texts[0][4:5]), (0, 7, texts[1][7:10])])
    check(first, 0, 4)
    check(second, 1, 7)
    assert cache.lengths.tolist() == [10, 0, 5, 0]
    cache.copy_slot(0, to=3)
    cache.truncate(0, length=6)
    copied, cut = feed([(3, 10, texts[1][10:]), (0, 6, texts[1][6:8])])
    check(copied, 1, 10)
    check(cut, 1, 6)
    cache.clear([2])
    check(feed([(2, 0, texts[1][:3])])[0], 1, 0)


def test_greedy_texts_are_transformers(pair) -> None:
    reference, loaded = pair
    prompt = random_tokens(1, 5, seed=3)
    wanted = reference.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=-1, pad_token_id=0)[0].tolist()
    executor = TorchExecutor(loaded.model)
    executor.reserve(num_slots=1, capacity=8)
    ids, fed = prompt[0].tolist(), 0
    for _ in range(12):
        executor.reserve(num_slots=1, capacity=len(ids))  # grows, and copies what the slots hold
        logits = executor.step(np.array([ids[fed:]]), np.array([fed]), np.array([0]))
        fed = len(ids)
        ids.append(int(logits[0].argmax()))
    assert ids == wanted


def test_scores_of_choices_are_those_of_each_sequence_alone(pair) -> None:
    _, loaded = pair
    context = tuple(random_tokens(1, 6, seed=5)[0].tolist())
    group = Group(context=context, continuations=((3, 4), (5,), (6, 7, 8)))
    together = score_groups(loaded.model, [group])[0]
    for ids, scores in zip(group.continuations, together, strict=True):
        alone = score_sequences(loaded.model, [(*context, *ids)], [len(ids)])[0]
        assert scores.log_likelihood == pytest.approx(alone.log_likelihood, abs=1e-4)
        assert scores.greedy == alone.greedy


def test_only_inference_takes_it(pair, tmp_path: Path) -> None:
    reference, loaded = pair
    folder = loaded.path
    with pytest.raises(InputError, match=f"model_type '{reference.config.model_type}' is not supported"):
        load_model(folder)
    with pytest.raises(UsageError, match="--quant int8"):
        load_model(folder, adapt=True, quant="int8")
    with pytest.raises(ValueError, match="documents"):
        loaded.model.hidden(random_tokens(1, 4), document_lengths=((2, 2),))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"auto_map": {"AutoModelForCausalLM": "evil--code.Model"}}, "'auto_map' asks to run code"),
        ({"text_config": {"auto_map": {"AutoConfig": "evil.Config"}}}, "'auto_map' asks to run code"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"model_type": "no_such_thing"}, "transformers cannot load"),
        ({"model_type": "vit"}, "no causal language model"),
        ({"num_hidden_layers": 3}, "is missing"),
        ({"hidden_size": "wide"}, "transformers cannot load"),
    ],
)
def test_what_transformers_cannot_or_must_not_load_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write(tmp_path, "opt")
    raw = {**json.loads((tmp_path / "config.json").read_text()), **change}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match=message) as caught:
        load_adapted(tmp_path, raw, dtype=None, device="cpu")
    assert "\n" not in str(caught.value)


def test_pickles_and_bad_weights_are_refused_here_too(tmp_path: Path) -> None:
    write(tmp_path, "opt")
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-10])
    with pytest.raises(InputError, match=r"model\.safetensors"):
        load_model(tmp_path, adapt=True)
    weights.unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="pickle refused"):
        load_model(tmp_path, adapt=True)
