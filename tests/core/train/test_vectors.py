"""Pre-training that starts from word vectors, and the cards of its checkpoints."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmctl.core.card import license_of
from llmctl.core.checkpoint import load_model
from llmctl.core.config.pretrain import PretrainConfig
from llmctl.core.data.shards import TokenDataset
from llmctl.core.data.wordvectors import vector_names
from llmctl.core.errors import InputError, NotFoundError, UsageError
from llmctl.core.model.shapes import shape_for_depth
from llmctl.core.train.events import Warned
from llmctl.core.train.pretrain import train
from tests.tiny_data import VOCAB_SIZE, make_packed, make_tokenizer

SIZE = shape_for_depth(1, VOCAB_SIZE, 32, "qwen3").hidden_size


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_packed(tmp_path_factory.mktemp("data") / "packed", num_words=600, val_words=100)


@pytest.fixture
def settings(packed: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "data": packed, "out_dir": tmp_path / "run", "depth": 1, "seq_len": 32, "batch_size": 4, "max_steps": 2, "save_every": 1,
        "sample_every": 0, "threads": 1, "dtype": "f32", "device": "cpu", "learning_rate": 1e-9, "muon_learning_rate": 1e-9,
    }  # fmt: skip


def vectors_file(path: Path, words: list[str], size: int = SIZE) -> np.ndarray:
    """Write a text file by hand and give its numbers."""
    table = np.random.default_rng(0).standard_normal((len(words), size)).astype(np.float32)
    lines = [f"{len(words)} {size}", *(f"{word} {' '.join(map(repr, row.tolist()))}" for word, row in zip(words, table, strict=True))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return table


def test_embeddings_start_from_the_vectors_of_their_tokens(settings: dict[str, Any], tmp_path: Path) -> None:
    names = vector_names(make_tokenizer())
    ids = [70, 300, 511]
    table = vectors_file(tmp_path / "v.txt", ["nosuchword", *(names[i] for i in ids), names[70]])
    plain = {**settings, "out_dir": tmp_path / "plain"}
    events = list(train(PretrainConfig(**settings, init_embeddings=tmp_path / "v.txt")))
    list(train(PretrainConfig(**plain)))
    assert any(isinstance(event, Warned) and f"3 of {VOCAB_SIZE}" in event.message for event in events)
    started = load_model(tmp_path / "run" / "step-00000002").model.embed.weight
    without = load_model(tmp_path / "plain" / "step-00000002").model.embed.weight
    torch.testing.assert_close(started[ids], torch.from_numpy(table[1:4]), atol=1e-4, rtol=0)
    others = [i for i in range(VOCAB_SIZE) if i not in ids]
    torch.testing.assert_close(started[others], without[others], atol=1e-4, rtol=0)


def test_a_resumed_run_needs_the_file_no_more(settings: dict[str, Any], tmp_path: Path) -> None:
    vectors_file(tmp_path / "v.txt", [vector_names(make_tokenizer())[300]])
    given = {**settings, "init_embeddings": tmp_path / "v.txt"}
    list(train(PretrainConfig(**given)))
    (tmp_path / "v.txt").unlink()
    list(train(PretrainConfig(**{**given, "max_steps": 3, "allow_change": ("max_steps",)}, resume=True)))
    with pytest.raises(InputError, match="init_embeddings"):
        list(train(PretrainConfig(**{**settings, "max_steps": 4, "allow_change": ("max_steps",)}, resume=True)))


def test_vectors_that_do_not_fit_are_refused_before_anything_is_made(settings: dict[str, Any], tmp_path: Path) -> None:
    vectors_file(tmp_path / "size.txt", ["a"], size=5)
    vectors_file(tmp_path / "none.txt", ["nosuchword"])
    for name, kind, message in (
        ("size.txt", InputError, f"5 numbers, the model's embeddings have {SIZE}"),
        ("none.txt", InputError, "none of its words"),
        ("gone.txt", NotFoundError, "no such file"),
    ):
        with pytest.raises(kind, match=message):
            list(train(PretrainConfig(**settings, init_embeddings=tmp_path / name)))
    assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match="does not go with --model"):
        PretrainConfig(model="m", init_embeddings=tmp_path / "none.txt")


def test_checkpoints_carry_a_card_that_stays_the_same(settings: dict[str, Any], packed: Path, tmp_path: Path) -> None:
    list(train(PretrainConfig(**settings)))
    cards = [(tmp_path / "run" / name / "README.md").read_text() for name in ("step-00000001", "step-00000002")]
    assert cards[0] == cards[1]
    dataset = TokenDataset.open(packed, split="train")
    for part in (dataset.data_hash, dataset.tokenizer_fingerprint, "llmctl pretrain", "learning_rate", "random weights", torch.__version__):
        assert part in cards[0]
    assert license_of(cards[0]) is None
