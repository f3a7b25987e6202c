"""Tokenizers inside GGUF files: byte-level BPE and SentencePiece, against `tokenizers` and transformers' own converter."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from llmctl.core.checkpoint import load_tokenizer
from llmctl.core.errors import InputError
from llmctl.core.gguf import GgufFile

gguf = pytest.importorskip("gguf")


def trained_backend(pre_tokenizer: Any, text_lines: list[str]) -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|end|>", "<|user|>"], show_progress=False
    )
    backend.train_from_iterator(text_lines, trainer)
    return backend


LINES = [
    "Once upon a time, in 1984, there was a king's daughter.",
    "  don't   stop\n\nnow 12345 67",
    "世界 κόσμε été 🙂",
    "I'LL be\tback\r\n",
] * 4


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_a_byte_level_tokenizer_is_recovered(name: str, tmp_path: Path) -> None:
    from tokenizers import Regex

    from llmctl.core.families.gguf_tokenizer import _LLAMA3, _QWEN2

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pre_tokenizer = {
        "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
        "smollm": pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
        "llama-bpe": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_LLAMA3), "isolated"), byte_level]),
        "qwen2": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_QWEN2), "isolated"), byte_level]),
    }[name]
    backend = trained_backend(pre_tokenizer, LINES)
    model = json.loads(backend.to_str())["model"]
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    vocab = sorted(model["vocab"], key=model["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(vocab)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in vocab])
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tokenizer = load_tokenizer(tmp_path / "t.gguf")
    assert tokenizer.vocab_size == len(vocab)
    assert tokenizer.chat_template == "{{ messages[0]['content'] }}"
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 0, None)
    assert tokenizer.special_ids == {0, 1}
    for line in LINES[:4]:
        ids = backend.encode(line).ids
        assert tokenizer.encode(line) == ([0, *ids] if name == "llama-bpe" else ids)
        assert tokenizer.decode(ids) == line


def sentencepiece_file(path: Path, *, architecture: str, prefix: bool = True) -> None:
    """A vocabulary as SentencePiece trains it: special tokens, bytes, pieces with scores, best first; Gemma's with runs of spaces."""
    backend = Backend(models.BPE())
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=150, show_progress=False)
    backend.train_from_iterator(LINES, trainer)
    learned = json.loads(backend.to_str())["model"]["vocab"]
    gemma = architecture.startswith("gemma")
    special = ["<pad>", "<eos>", "<bos>", "<unk>"] if gemma else ["<unk>", "<s>", "</s>"]
    runs = ["\n", "\n\n", "  ", "   "] if gemma else ["<think>"]
    byte_pieces = [f"<0x{value:02X}>" for value in range(256)]
    pieces = [piece for piece in learned if piece not in ("▁▁", "▁▁▁", *runs)]
    pieces.sort(key=lambda piece: (len(piece) < 2, learned[piece]))
    kinds = [3] * len(special) + [4] * len(runs) + [6] * 256 + [1] * len(pieces)
    scores = [-1000.0] * (len(kinds) - len(pieces)) + [-float(i) for i in range(len(pieces))]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*special, *runs, *byte_pieces, *pieces])
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(special.index("<bos>" if gemma else "<s>"))
    writer.add_eos_token_id(special.index("<eos>" if gemma else "</s>"))
    writer.add_unk_token_id(special.index("<unk>"))
    writer.add_add_space_prefix(prefix and not gemma)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_sentencepiece_tokenizer_is_recovered_as_transformers_does(architecture: str, tmp_path: Path) -> None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer, get_gguf_tokenizer

    path = tmp_path / "t.gguf"
    sentencepiece_file(path, architecture=architecture)
    ours = load_tokenizer(path)
    found, parts, settings = get_gguf_tokenizer(str(path))
    theirs, _ = convert_gguf_tokenizer(found, parts)
    assert settings["add_bos_token"] is True
    assert ours.adds_bos
    assert ours.special_ids >= {ours.bos_id, ours.eos_id}
    for line in [*LINES[:4], " one space", "  two\n\n   three", "a<think>b", "\U0001f600 \u0fff", "", "wonder king's"]:
        ids = theirs.encode(line, add_special_tokens=False).ids
        assert ours.encode(line) == [ours.bos_id, *ids], line
        assert ours.decode(ids) == theirs.decode(ids), line
        if architecture == "gemma3":
            assert ours.decode(ids) == line
    assert len({len(theirs.encode(word, add_special_tokens=False).ids) for word in ("there", "xyzzy")}) == 2


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_sentencepiece_tokenizer_goes_out_with_the_scores_order_and_kinds_it_came_in_with(
    architecture: str, prefix: bool, tmp_path: Path
) -> None:
    from llmctl.core.export.gguf_tokenizer import tokenizer_metadata

    sentencepiece_file(tmp_path / "t.gguf", architecture=architecture, prefix=prefix)
    original, tokenizer = GgufFile(tmp_path / "t.gguf").metadata, load_tokenizer(tmp_path / "t.gguf")
    count = len(original["tokenizer.ggml.tokens"])
    found = tokenizer_metadata(tokenizer, architecture=architecture, vocab_size=count + 2, eos_ids=())
    assert found["tokenizer.ggml.add_space_prefix"] is (prefix and architecture == "llama")
    assert found["tokenizer.ggml.tokens"][count:] == [f"[PAD{count}]", f"[PAD{count + 1}]"]
    for key in ("bos", "eos", "unknown"):
        assert found[f"tokenizer.ggml.{key}_token_id"] == original[f"tokenizer.ggml.{key}_token_id"]
    scores, kinds = found["tokenizer.ggml.scores"], found["tokenizer.ggml.token_type"]
    pieces = [i for i in range(count) if original["tokenizer.ggml.token_type"][i] == 1]
    joined = [i for i in pieces if scores[i] > -1000.0 and len(original["tokenizer.ggml.tokens"][i]) > 1]
    assert len(joined) > 20
    by_original = sorted(joined, key=lambda i: -original["tokenizer.ggml.scores"][i])
    assert sorted(joined, key=lambda i: -scores[i]) == by_original
    unknown = original["tokenizer.ggml.unknown_token_id"]
    for i, kind in enumerate(original["tokenizer.ggml.token_type"]):
        if kind in (3, 6):
            assert kinds[i] == (2 if i == unknown else kind)


def test_a_tokenizer_that_scores_cannot_say_is_refused() -> None:
    """Its list joins b and c, but not a and bc, which SentencePiece would, since abc is a piece."""
    from llmctl.core.export.gguf_tokenizer import tokenizer_metadata
    from llmctl.core.tokenizer import Tokenizer

    pieces = ["<unk>", *(f"<0x{value:02X}>" for value in range(256)), *"Helo,bcw", "He", "ll", "llo", "Hello"]
    model = models.BPE(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=[("H", "e"), ("l", "l"), ("ll", "o")],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = Backend(model)
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = Tokenizer.from_parts(backend, bos=None, eos=None, pad=None)
    with pytest.raises(InputError, match="no way to join pieces by score"):
        tokenizer_metadata(tokenizer, architecture="llama", vocab_size=len(pieces), eos_ids=())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": "t5"}, "of kind 't5'"),
        ({"tokenizer.ggml.model": "llama"}, "scores is missing"),
        ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.0]}, "a number for each of the 3 tokens"),
        (
            {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.0] * 3, "tokenizer.ggml.tokens": ["a", "b", "a" * 5000]},
            "5,000 char",
        ),
        ({"tokenizer.ggml.pre": "martian"}, "pre-tokenizer 'martian'"),
        ({"tokenizer.ggml.tokens": None}, "tokens is missing"),
        ({"tokenizer.ggml.merges": ["a"]}, "not two tokens"),
        ({"tokenizer.ggml.merges": ["a z"]}, "do not fit its tokens"),
        ({"tokenizer.ggml.bos_token_id": 3}, "there are 3 tokens"),
    ],
)
def test_a_bad_tokenizer_is_named(change: dict[str, Any], message: str) -> None:
    from llmctl.core.families.gguf_tokenizer import tokenizer_from_gguf

    metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a", "b", "ab"], "tokenizer.ggml.merges": ["a b"]}
    assert tokenizer_from_gguf(metadata, where="m.gguf").encode("ab") == [2]
    with pytest.raises(InputError, match=message):
        tokenizer_from_gguf({**metadata, **change}, where="m.gguf")
