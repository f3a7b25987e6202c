"""Where a text may be cut without changing its ids. Knows UTF-8 and tokenizer.json's pre-tokenisers; knows no files and no ids."""

import unicodedata
from typing import Any

# Patterns of pre-tokenisers for which `last_cut` was proven (see its docstring and tests), as tokenizer.json writes them.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CL100K_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SAFE_PATTERNS = frozenset(
    {
        _GPT2,
        *(_CONTRACTIONS + rf"|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}" + _CL100K_TAIL for digits in (r"\p{N}{1,3}", r"\p{N}")),
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    }
)


def may_cut(tokenizer_json: dict[str, Any]) -> bool:
    """Whether a text's ids are those of its pieces joined, when it is cut at the places that `last_cut` finds.

    True for byte-level tokenizers whose pre-tokeniser is known to end a word there. False means "not known".
    """
    normalizer, pre = tokenizer_json.get("normalizer"), tokenizer_json.get("pre_tokenizer")
    if normalizer is not None and normalizer.get("type") != "NFC":
        return False
    if any(
        token.get("lstrip") or token.get("rstrip") or token.get("single_word") or _spans_line(token.get("content", ""))
        for token in tokenizer_json.get("added_tokens", ())
    ):
        return False
    parts = pre.get("pretokenizers", []) if pre is not None and pre.get("type") == "Sequence" else [pre]
    return _splits_at_lines(parts)


def _spans_line(content: str) -> bool:
    """Whether an added token holds a newline beside something else, which a cut could divide."""
    return "\n" in content and bool(content.strip("\n"))


def _splits_at_lines(parts: list[Any]) -> bool:
    splits = False
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "ByteLevel" and not part.get("add_prefix_space"):
            splits = splits or part.get("use_regex", True)
        elif kind == "Split" and part.get("behavior") == "Isolated" and part.get("pattern", {}).get("Regex") in SAFE_PATTERNS:
            splits = True
        elif kind != "Digits":
            return False
    return splits


def last_cut(data: bytes | bytearray, stop: int) -> int | None:
    """The last place in [1, stop) where UTF-8 text may be cut without changing its ids; None if there is none.

    The pre-tokenisers of GPT-2, Llama 3, Qwen and o200k end a word (a) after a single newline between something that is
    no blank and a letter or digit, and (b) before a newline that follows a letter or digit. Elsewhere a pattern may join
    the two sides, or look ahead: GPT-2 takes the last blank of a run apart, unless the text ends there.
    """
    while (newline := data.rfind(b"\n", 0, stop)) >= 0:
        cut = _cut_beside(data, newline)
        if cut is not None and 0 < cut < stop:
            return cut
        stop = newline
    return None


def first_cut(data: bytes | bytearray, start: int, stop: int) -> int | None:
    """The place to cut beside the first newline in [start, stop) that has one."""
    while (newline := data.find(b"\n", start, stop)) >= 0:
        cut = _cut_beside(data, newline)
        if cut:
            return cut
        start = newline + 1
    return None


def _cut_beside(data: bytes | bytearray, newline: int) -> int | None:
    before = data[max(0, newline - 4) : newline].decode("utf-8", "ignore")[-1:]
    if not before or not data.endswith(before.encode(), 0, newline):
        return None
    after = data[newline + 1 : newline + 5].decode("utf-8", "ignore")[:1]
    if after.isalnum() and data.startswith(after.encode(), newline + 1) and unicodedata.category(before)[0] in "LNPS":
        return newline + 1
    return newline if _is_plain_letter(before) else None


def _is_plain_letter(character: str) -> bool:
    """A letter or digit that every version of Unicode in use calls one."""
    return (character.isascii() and character.isalnum()) or ("\u00c0" <= character <= "\u9fff" and character.isalpha())
