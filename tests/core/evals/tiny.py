"""A tiny random model of transformers with a real byte-level tokenizer, in a folder, and small invented tasks."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from llmctl.core.checkpoint import load_model_and_tokenizer
from llmctl.core.model import Decoder
from llmctl.core.tokenizer import Tokenizer
from tests.core.data.chat_tokenizers import byte_tokenizer

NUM_POSITIONS = 64
SENTENCES = ("the cat sat on the mat", "a dog", "rain fell all night and in the morning the river was high", "où?", "狐狸和国王")


def write_gpt2(folder: Path) -> Path:
    """A GPT-2 of two layers and 64 learned positions, without a tokenizer."""
    torch.manual_seed(2)
    config = transformers.GPT2Config(
        vocab_size=260,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=NUM_POSITIONS,
        initializer_range=0.25,
        bos_token_id=None,
        eos_token_id=None,
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def write_model(folder: Path, *, seed: int = 0, poison: bool = False) -> Path:
    """A Llama of two layers and 64 positions; `poison` puts a NaN into its weights."""
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=NUM_POSITIONS,
        initializer_range=0.25,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_id,
    )
    model = transformers.LlamaForCausalLM(config)
    if poison:
        with torch.no_grad():
            model.model.norm.weight[3] = float("nan")
    model.save_pretrained(folder)
    tokenizer.save(folder)
    return folder


def load(folder: Path) -> tuple[Decoder, Tokenizer]:
    """Ours."""
    loaded, tokenizer = load_model_and_tokenizer(folder)
    return loaded.model, tokenizer


def oracle(folder: Path) -> Any:
    """Theirs, in float64: (ids) -> log-probabilities (T, V) of what follows each position."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()

    def log_probabilities(ids: Sequence[int]) -> torch.Tensor:
        with torch.no_grad():
            return torch.log_softmax(model(torch.tensor([list(ids)])).logits[0], dim=-1)

    return log_probabilities


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


CHOICE_TASK = """
name = "animals"
kind = "multiple_choice"
dataset = "animals.jsonl"
context = "Q: {{ q }}\\nA:"
choices = "options"
gold = "{{ answer }}"
metrics = ["acc", "acc_norm", "acc_bytes"]
"""

WORD_TASK = """
name = "words"
kind = "continuation"
dataset = "words.jsonl"
context = "{{ text.split(' ')[:-1] | join(' ') }}"
target = "{{ text.split(' ')[-1] }}"
metrics = ["acc", "perplexity"]
"""


def write_tasks(folder: Path, *, num_items: int = 12) -> tuple[Path, Path]:
    """The two tasks above with invented rows of varying lengths. Returns their paths."""
    nouns = ("cat", "dog", "old grey wolf", "fox", "hen")
    animals = [
        {
            "q": f"what did the {nouns[i % 5]} number {i} see" + " then" * (i % 4),
            "options": [f"a {nouns[(i + k) % 5]}" + "!" * k for k in range(2 + i % 3)],
            "answer": i % 2,
        }
        for i in range(num_items)
    ]
    words = [{"text": f"the {nouns[i % 5]} said {'very ' * (i % 3)}loudly number {i}"} for i in range(num_items)]
    write_rows(folder / "animals.jsonl", animals)
    write_rows(folder / "words.jsonl", words)
    (folder / "animals.toml").write_text(CHOICE_TASK)
    (folder / "words.toml").write_text(WORD_TASK)
    return folder / "animals.toml", folder / "words.toml"
