"""A tokenizer as GGUF's metadata, which our own reader must read back with the same ids. Knows tokenizers; writes no file.

llama.cpp names its pre-tokenizers and holds their rules itself, and joins SentencePiece's pieces by score rather than by a list
of merges: what is written is tried on texts that tell tokenizers apart, and refused where it gives other ids.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmctl.core.data.wordvectors import vocabulary
from llmctl.core.errors import InputError
from llmctl.core.families.gguf_tokenizer import PRE_TOKENIZERS, tokenizer_from_gguf

if TYPE_CHECKING:
    from llmctl.core.tokenizer import Tokenizer

_PRE_TOKENIZERS = ("gpt-2", "smollm", "llama-bpe", "dbrx", "qwen2", "stablelm2")
"""One name of llama.cpp's for each rule that we know."""
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_UNREACHABLE = -1000.0
"""The score that SentencePiece's converters give to what is no result of joining."""
_BYTES = frozenset(f"<0x{value:02X}>" for value in range(256))
_PROBES = (
    "Hello world, it's 3.14159 or 1,234,567!  Two  spaces   three\tand\ttabs\n\nnew lines\r\n \n  end ",
    "I'll we've they'd DON'T you're 's 'S café naïve Ünïcödé ﬁ ½ x² 日本語のテキスト 한국어 русский العربية ไทย",
    "def f(x):\n    return x**2  # comment\n\n\n\tif (a != b) { c += d[0]; } 2024-01-01 0x1F 12 123 1234 12345",
    "emoji 😀👩‍👩‍👧‍👦🏳️‍🌈 \u200b\u00a0nbsp e\u0301 A\u030a \u2028 zero\u0000byte ... !!! ??? $%^&*()_+-=[]{}|;:'\",.<>/?`~\\",
)


def tokenizer_metadata(tokenizer: "Tokenizer", *, architecture: str, vocab_size: int, eos_ids: Sequence[int]) -> dict[str, Any]:
    """The tokenizer's keys, chat template included. Ids that the tokenizer does not have become unused tokens.

    Raises InputError when llama.cpp has nothing that gives the tokenizer's ids, and for a kind that is neither byte-level BPE
    nor BPE with byte fallback (SentencePiece's).
    """
    content = json.loads(tokenizer.to_json())
    model = content["model"]
    is_sentencepiece = model.get("type") == "BPE" and model.get("byte_fallback") is True
    if not is_sentencepiece and (model.get("type") != "BPE" or not tokenizer.is_byte_level):
        raise InputError("only byte-level BPE and SentencePiece's BPE with byte fallback can be written as GGUF")
    if not model["merges"]:
        raise InputError("the tokenizer has no merges, and llama.cpp reads no such file; the model cannot be written as GGUF")
    known = vocabulary(tokenizer)
    added = {entry["id"]: _CONTROL if entry["special"] else _USER_DEFINED for entry in content["added_tokens"]}
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    values: dict[str, Any] = {
        "tokenizer.ggml.tokens": [known.get(i, f"[PAD{i}]") for i in range(vocab_size)],
        "tokenizer.ggml.token_type": [added.get(i, _NORMAL if i in known else _UNUSED) for i in range(vocab_size)],
        "tokenizer.ggml.add_bos_token": tokenizer.adds_bos,
    }
    eos = [*eos_ids, *([tokenizer.eos_id] if tokenizer.eos_id is not None and not eos_ids else [])]
    ids = {"bos": tokenizer.bos_id, "eos": eos[0] if eos else None, "eot": eos[1] if len(eos) > 1 else None, "padding": tokenizer.pad_id}
    values |= {f"tokenizer.ggml.{name}_token_id": value for name, value in ids.items() if value is not None}
    if tokenizer.chat_template is not None:
        values["tokenizer.chat_template"] = tokenizer.chat_template
    probes = probes_for(tokenizer, known)
    wanted = tokenizer.encode_batch(probes)
    tried = _sentencepiece(values, content, merges) if is_sentencepiece else _byte_level(values, merges)
    for candidate in tried:
        read = tokenizer_from_gguf({"general.architecture": architecture, **candidate}, where="the tokenizer")
        if read.encode_batch(probes) == wanted:
            return candidate
    what = "no way to join pieces by score" if is_sentencepiece else f"no pre-tokenizer (tried {', '.join(_PRE_TOKENIZERS)})"
    raise InputError(f"llama.cpp has {what} that splits text as this tokenizer does; the model cannot be written as GGUF")


def _byte_level(values: Mapping[str, Any], merges: Sequence[tuple[str, ...]]) -> Iterator[dict[str, Any]]:
    """With each pre-tokenizer that we know the rules of."""
    for name in _PRE_TOKENIZERS:
        if name in PRE_TOKENIZERS:
            joined = [" ".join(merge) for merge in merges]
            yield {**values, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name, "tokenizer.ggml.merges": joined}


def _sentencepiece(values: Mapping[str, Any], content: Mapping[str, Any], merges: Sequence[tuple[str, ...]]) -> Iterator[dict[str, Any]]:
    """Each piece scored by the first merge that gives it, with and without a space before the text."""
    scores: dict[str, float] = {}
    for rank, merge in enumerate(merges):
        scores.setdefault("".join(merge), -float(rank))
    tokens, types = values["tokenizer.ggml.tokens"], list(values["tokenizer.ggml.token_type"])
    unknown = content["model"].get("unk_token") or "<unk>"  # a tokenizer whose bytes reach everything may not name it
    for i, token in enumerate(tokens):
        if token == unknown:
            types[i] = _UNKNOWN
        elif types[i] == _NORMAL and token in _BYTES:
            types[i] = _BYTE
    singles = 1.0 + len(merges)  # a single character is there from the start, whatever its score
    scored = [scores.get(token, -singles if len(token) == 1 else _UNREACHABLE) for token in tokens]
    keys = {
        **values,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scored,
        "tokenizer.ggml.token_type": types,
    }
    if unknown in tokens:
        keys["tokenizer.ggml.unknown_token_id"] = tokens.index(unknown)
    said = json.dumps([content.get("normalizer"), content.get("pre_tokenizer")])
    likely = '"Prepend"' in said or ('"Metaspace"' in said and '"never"' not in said)
    for prefix in (likely, not likely):
        yield {**keys, "tokenizer.ggml.add_space_prefix": prefix}


def probes_for(tokenizer: "Tokenizer", known: Mapping[int, str]) -> list[str]:
    """Texts that tell tokenizers apart: odd ones, and a sample of the vocabulary itself."""
    ordinary = [i for i in known if i not in tokenizer.special_ids]
    sample = ordinary[:: max(1, len(ordinary) // 2000)]
    return [*_PROBES, *(tokenizer.decode(sample[start : start + 50]) for start in range(0, len(sample), 50))]
