"""Small packed data sets for the training tests, made from a text that repeats enough to be learnt."""

from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from llmctl.core.data.shards import MANIFEST_KIND, TOKENIZER_DIR, ShardWriter, id_dtype, shard_name
from llmctl.core.files import write_manifest
from llmctl.core.tokenizer import Tokenizer

VOCAB_SIZE = 512


def text(num_words: int, seed: int = 0) -> str:
    """Words drawn from a small grammar, so that a tiny model learns something in a few steps."""
    rng = np.random.default_rng(seed)
    subjects, verbs, things = (
        ["the king", "a fox", "my child", "the queen"],
        ["sees", "takes", "finds", "wants"],
        ["gold", "bread", "a crown", "home"],
    )
    pick = rng.integers(0, 4, size=(num_words // 4, 3))
    return "".join(f"{subjects[a]} {verbs[b]} {things[c]}.\n" for a, b, c in pick)


def make_tokenizer() -> Tokenizer:
    """A byte-level BPE of 512 ids with an end-of-text token."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False)
    rng = np.random.default_rng(1)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    noise = " ".join("".join(rng.choice(letters, size=6)) for _ in range(3000))
    backend.train_from_iterator([text(4000), noise], trainer)
    assert backend.get_vocab_size() == VOCAB_SIZE
    return Tokenizer.from_parts(backend, bos="<|endoftext|>", eos="<|endoftext|>", pad=None, chat_template=None, model_max_length=None)


def make_packed(directory: Path, *, num_words: int = 8000, val_words: int = 800, seed: int = 0, times: int = 1) -> Path:
    """A packed folder with a train and a val split, each of its text so many times."""
    directory.mkdir(parents=True)
    tokenizer = make_tokenizer()
    (directory / TOKENIZER_DIR).mkdir()
    tokenizer.save(directory / TOKENIZER_DIR)
    splits = {}
    for split, words, number in (("train", num_words, seed), ("val", val_words, seed + 1000)):
        written = text(words, number)
        ids = np.array(tokenizer.encode(written, add_bos=False))
        writer = ShardWriter(directory / shard_name(split, 0), vocab_size=VOCAB_SIZE, fingerprint=tokenizer.fingerprint)
        for _ in range(times):
            writer.write(ids)
            writer.end_document()
        info = writer.finish()
        splits[split] = {
            "num_tokens": info.num_tokens,
            "num_documents": info.num_documents,
            "num_bytes": len(written.encode()) * times,
            "shards": [info.name],
        }
    extra = {
        "kind": MANIFEST_KIND,
        "dtype": id_dtype(VOCAB_SIZE).name,
        "vocab_size": VOCAB_SIZE,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "splits": splits,
    }
    write_manifest(directory, extra=extra)
    return directory
