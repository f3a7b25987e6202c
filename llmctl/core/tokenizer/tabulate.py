"""Makes the tables of a PlainEncoder from a tokenizer, and proves them on odd texts. Knows tokenizer.json; knows no file.

It takes byte-level BPE without dropout, behind the pre-tokenisers that can be said in Python's `re` for an alphabet in which
the two agree: no white space beyond ASCII, no digits beyond ASCII, no marks, and only letters that have been letters for long.
"""

import json
import re
import sys
import unicodedata
from typing import Any

import numpy as np
import numpy.typing as npt

from llmctl.core.tokenizer.byte_level import byte_to_char, char_to_byte, token_to_bytes
from llmctl.core.tokenizer.odd_texts import odd_texts
from llmctl.core.tokenizer.parts import parts_of
from llmctl.core.tokenizer.plain import ASCII_ALPHABET, PlainEncoder
from llmctl.core.tokenizer.tokenizer import Tokenizer

Tables = dict[str, npt.NDArray[np.uint8]]

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What ByteLevel cuts by, if it does."""
_LETTER_BLOCKS = ((0xAA, 0x800), (0x3041, 0x3097), (0x30A1, 0x30FB), (0x4E00, 0x9FA6), (0xAC00, 0xD7A4))
"""Blocks whose letters no version of Unicode in use has changed."""
_OTHER_BLOCKS = ((0xA1, 0xC0), (0x2010, 0x2028), (0x2030, 0x205F), (0x20A0, 0x20C0), (0x3001, 0x3004), (0x3008, 0x3012))
"""Blocks whose punctuation and symbols are taken."""
_CASELESS = "\u017f"
"""The long s, which is an s to a pattern that looks at no case."""
_LONGEST_PROBE = 1 << 12


class NotTabulatedError(Exception):
    """There are no tables for this tokenizer; the message says why."""


def tabulate(tokenizer: Tokenizer) -> tuple[dict[str, Any], Tables]:
    """What a PlainEncoder needs: facts that JSON can hold, and tables, as bytes. Raises NotTabulatedError."""
    content = json.loads(tokenizer.to_json(pretty=False))
    model = content["model"]
    if not tokenizer.is_byte_level or model.get("type") != "BPE":
        raise NotTabulatedError("it is no byte-level BPE")
    if any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")):
        raise NotTabulatedError("its BPE is not the plain one")
    steps = _steps(content)
    letters, others = _alphabet(composed=_normal_form(content))
    tokens, added = model["vocab"], content["added_tokens"]
    facts: dict[str, Any] = {
        "vocab_size": tokenizer.vocab_size,
        "byte_ids": [tokens.get(char, -1) for char in byte_to_char()],
        "specials": tokenizer.special_tokens,
        "added": [token["content"] for token in added],
        "splits_specials": not any(token[flag] for token in added for flag in ("lstrip", "rstrip", "single_word")),
        "reaches_control": tokenizer.reaches_control,
        "ascii_steps": [_in_python(step, letters="A-Za-z") for step in steps],
        "steps": [_in_python(step, letters="A-Za-z" + letters) for step in steps],
        "guard": f"[{ASCII_ALPHABET}{letters}{others}]*",
        **_frame(tokenizer),
    }
    tables = _tables(tokenizer, model)
    encoder = PlainEncoder(facts, {name: table.data for name, table in tables.items()}, most_chars=sys.maxsize)
    _prove(encoder, tokenizer, letters + others)
    return facts, tables


def _steps(content: dict[str, Any]) -> list[str]:
    """The patterns that cut text into words, each the pieces of the one before."""
    state = content["pre_tokenizer"] or {}
    parts = parts_of(state)[1:] if state.get("type") == "Sequence" else [state]
    steps = []
    for number, part in enumerate(parts):
        kind, pattern = part.get("type"), part.get("pattern") or {}
        if kind == "Digits":
            steps.append(rf"\p{{N}}{'' if part['individual_digits'] else '+'}|[^\p{{N}}]+")
        elif kind == "Split" and part["behavior"] == "Isolated" and not part["invert"] and "Regex" in pattern:
            steps.append(pattern["Regex"])
        elif kind == "ByteLevel" and not part["add_prefix_space"] and number == len(parts) - 1:
            steps += [_GPT2] if part["use_regex"] else []
        else:
            raise NotTabulatedError(f"its pre-tokeniser {kind} is not known")
    if not parts or parts[-1].get("type") != "ByteLevel":
        raise NotTabulatedError("its text is not cut into bytes last")
    return steps


def _normal_form(content: dict[str, Any]) -> bool:
    """Whether the text is composed (NFC) first. Raises NotTabulatedError for anything else that is done to it."""
    normalizer = content["normalizer"]
    kinds = [part.get("type") for part in parts_of(normalizer)] if normalizer is not None else []
    if not set(kinds) <= {"NFC", "Sequence"}:
        raise NotTabulatedError("its text is rewritten first")
    return "NFC" in kinds


def _alphabet(*, composed: bool) -> tuple[str, str]:
    """Letters, and other characters, beyond ASCII, as the inside of a class of `re`; of composed ones only where that is asked for."""

    def taken(blocks: tuple[tuple[int, int], ...], *, are_letters: bool) -> str:
        chars = [chr(code) for start, end in blocks for code in range(start, end)]
        kept = [
            char
            for char in chars
            if char.isalpha() == are_letters
            and (are_letters or unicodedata.category(char)[0] in "PS")
            and char not in _CASELESS
            and not (composed and unicodedata.normalize("NFC", char) != char)
        ]
        return _ranges(kept)

    return taken(_LETTER_BLOCKS, are_letters=True), taken(_OTHER_BLOCKS, are_letters=False)


def _ranges(chars: list[str]) -> str:
    spans: list[list[str]] = []
    for char in chars:
        if spans and ord(char) == ord(spans[-1][1]) + 1:
            spans[-1][1] = char
        else:
            spans.append([char, char])
    return "".join(first if first == last else f"{first}-{last}" for first, last in spans)


def _in_python(pattern: str, *, letters: str) -> str:
    r"""A pattern of tokenizer.json, whose \p{L} are `letters` and \p{N} the digits, for texts that hold no others."""
    parts, in_class = [], False
    for token in re.findall(r"\\[pP]\{\^?\w+\}|\\.|.", pattern, re.DOTALL):
        if token in ("[", "]"):
            if in_class and token == "[":
                raise NotTabulatedError("its pattern has a class within a class")
            in_class = token == "["
        if token in (r"\p{L}", r"\p{N}"):
            inside = letters if token == r"\p{L}" else "0-9"
            token = inside if in_class else f"[{inside}]"
        elif token[:2] in (r"\p", r"\P"):
            raise NotTabulatedError(f"its pattern asks for {token}")
        parts.append(token)
    # findall gives a group instead of the match
    text = re.sub(r"(?<!\\)\((?!\?)", "(?:", "".join(parts))
    try:
        re.compile(text)
    except re.error as error:
        raise NotTabulatedError(f"its pattern is none of Python's: {error}") from error
    return text


def _frame(tokenizer: Tokenizer) -> dict[str, list[int]]:
    """The ids that the reference puts before and after every text."""
    core, whole = tokenizer.encode("a", add_bos=False), tokenizer.encode("a")
    start = next((start for start in range(len(whole)) if whole[start : start + len(core)] == core), None)
    if start is None:
        raise NotTabulatedError("what is put around a text is not known")
    return {"before": whole[:start], "after": whole[start + len(core) :]}


def _tables(tokenizer: Tokenizer, model: dict[str, Any]) -> Tables:
    vocab: dict[str, int] = model["vocab"]
    by_id = tokenizer.tokens_by_id()
    texts = [token_to_bytes(by_id[token_id]) if token_id in by_id else b"" for token_id in range(tokenizer.vocab_size)]
    ranks: dict[int, int] = {}
    merged = []
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ranks[vocab[left] << 32 | vocab[right]] = rank  # of a pair that stands there twice, `tokenizers` takes the later
        merged.append(vocab[left + right])
    pairs = np.array(sorted(ranks), dtype="<u8")
    alphabet = char_to_byte()
    order = [i for token, i in vocab.items() if all(char in alphabet for char in token)] if model.get("ignore_merges") else []
    arrays = {
        "tokens": np.frombuffer(b"".join(texts), dtype=np.uint8),
        "ends": np.cumsum([len(text) for text in texts], dtype="<u4"),
        "pairs": pairs,
        "ranks": np.array([ranks[pair] for pair in pairs.tolist()], dtype="<u4"),
        "merged": np.array(merged, dtype="<u4"),
        "order": np.array(sorted(order, key=lambda token_id: texts[token_id]), dtype="<u4"),
    }
    return {name: array.view(np.uint8) for name, array in arrays.items()}


def _prove(encoder: PlainEncoder, tokenizer: Tokenizer, alphabet: str) -> None:
    """Compare with `tokenizers` on odd texts, on all letters, and around names of control tokens. Raises NotTabulatedError."""
    texts = [text[:_LONGEST_PROBE] for text in odd_texts(tokenizer)]
    every = [char for start, end in (*_LETTER_BLOCKS[:3], *_OTHER_BLOCKS) for char in map(chr, range(start, end))]
    ordinary = re.findall(f"[{alphabet}]", "".join(every))
    texts += [f"x{char} {char}{char}'s 1{char}.{char}\n" for char in ordinary]
    named = [f"a{name}b {name}\n{name}{name} 's" for name in tokenizer.special_tokens]
    for special, probes in ((False, texts), (True, [*texts, *named])):
        wanted = tokenizer.encode_batch(probes, allow_special=special)
        for text, ids in zip(probes, wanted, strict=True):
            found = encoder.encode(text, special=special, post=True)
            if found is not None and found != ids:
                raise NotTabulatedError(f"ids differ from those of tokenizers on {text[:60]!r}")
