"""Small real tokenizers for the data tests."""

import json
import re
from pathlib import Path

import pytest
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from llmctl.core.data.cuts import SAFE_PATTERNS
from llmctl.core.tokenizer import Tokenizer

TEXT = (
    "Once upon a time there was a king's daughter, and she'd 3 golden balls.\nThe fox said: come! 1234 56\n\n"
    "從前有一個國王，他有三個女兒。\n第二天，狐狸來了。\r\n\r\n  - a list // with marks\n/path é ü ñ\n\t\ttabs\n"
)


def byte_level(pre: pre_tokenizers.PreTokenizer, *, bos: str | None = None, vocab_size: int | None = None) -> Tokenizer:
    """A byte-level BPE of 400 merges and more, with <|endoftext|>. `vocab_size` adds ids that no text gives, and gives
    the letter "a" the highest of all."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre
    backend.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", *([bos] if bos else [])]
    trainer = trainers.BpeTrainer(
        vocab_size=700, min_frequency=1, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([TEXT * 3], trainer)
    if vocab_size is not None:
        content = json.loads(backend.to_str())
        vocab = content["model"]["vocab"]
        vocab |= {f"filler {i}": i for i in range(len(vocab), vocab_size)}
        vocab["a"], vocab[f"filler {vocab_size - 1}"] = vocab_size - 1, vocab["a"]
        backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    return Tokenizer.from_parts(backend, bos=bos, eos="<|endoftext|>", pad=None)


def splitting(pattern: str) -> pre_tokenizers.PreTokenizer:
    """The pre-tokeniser that Llama 3, Qwen and o200k write: a Split, then bytes."""
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def all_pre_tokenizers() -> dict[str, pre_tokenizers.PreTokenizer]:
    """Every kind for which texts are cut."""
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    kinds = {"gpt2": plain, "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain])}
    return kinds | {re.sub(r"\W", "", p)[:40] + str(len(p)): splitting(p) for p in sorted(SAFE_PATTERNS)}


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """GPT-2's pre-tokenisation, 700 ids."""
    return byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))


@pytest.fixture(scope="session")
def tokenizer_dir(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, as a folder."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return folder
