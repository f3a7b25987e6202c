"""The ids of ordinary text from tables that lie in a file: byte-level BPE in Python. Knows words and merges; knows no `tokenizers`.

Reading a tokenizer.json takes longer than the rest of a short run, so tables are made of it once (core/tokenizer/tabulate.py)
and mapped. They serve texts of bounded length in an alphabet in which Python's `re` and the pre-tokenisers agree; for any
other `PlainEncoder` gives None, and whoever asked goes to `tokenizers`.
"""

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

MOST_CHARS = 1 << 18
"""Of all texts together. Who encodes more has time to open `tokenizers`, which is twice as fast; and all words are remembered."""
_LONGEST_WORD = 256
"""Bytes of a word. Merging takes the square of it."""
_UNMERGED = 1 << 62

ASCII_ALPHABET = r"\t\n\r -~"
"""The ASCII characters of ordinary texts. What is beyond comes with the tables."""


class _NotOrdinaryError(Exception):
    """`tokenizers` must encode the text."""


class PlainEncoder:
    """Encodes ordinary text by the tables of `tabulate`; None for any other."""

    def __init__(self, facts: Mapping[str, Any], tables: Mapping[str, memoryview], *, most_chars: int = MOST_CHARS) -> None:
        self._facts = facts
        self._text, self._ends = tables["tokens"], tables["ends"].cast("I")  # bytes of all ids, and where those of each end
        self._pairs, self._ranks = tables["pairs"].cast("Q"), tables["ranks"].cast("I")  # left << 32 | right, in order
        self._merged = tables["merged"].cast("I")  # rank -> id
        self._order = tables["order"].cast("I")  # ids that are looked up whole, in the order of their bytes; may be empty
        self._byte_ids: list[int] = facts["byte_ids"]
        self._specials: dict[str, int] = facts["specials"]
        self._names: list[str] = facts["added"]
        self._known: dict[str, list[int]] = {}
        self._chars_left = most_chars

    def bytes_of(self, token_id: int) -> bytes:
        """What an id stands for; empty for an unknown one."""
        if not 0 <= token_id < len(self._ends):
            return b""
        return bytes(self._text[self._ends[token_id - 1] if token_id else 0 : self._ends[token_id]])

    def encode(self, text: str, *, special: bool, post: bool) -> list[int] | None:
        """As Tokenizer.encode: `special` finds the names of control tokens in the text, `post` adds what the reference adds."""
        self._chars_left -= len(text)
        if self._chars_left < 0 or not self._is_ordinary(text):
            return None
        names = {name for name in self._names if name in text}
        if names and not (special and self._facts["splits_specials"] and names <= self._specials.keys()):
            return None
        try:
            ids = self._cut_at(names, text) if names else self._words(text)
        except _NotOrdinaryError:
            return None
        return [*self._facts["before"], *ids, *self._facts["after"]] if post else ids

    def _is_ordinary(self, text: str) -> bool:
        return re.fullmatch(f"[{ASCII_ALPHABET}]*" if text.isascii() else self._facts["guard"], text) is not None

    def _cut_at(self, names: set[str], text: str) -> list[int]:
        pattern = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
        ids: list[int] = []
        for piece in re.split(f"({pattern})", text):
            if piece in names:
                ids.append(self._specials[piece])
            else:
                ids += self._words(piece)
        return ids

    def _words(self, text: str) -> list[int]:
        steps: Sequence[str] = self._facts["ascii_steps" if text.isascii() else "steps"]
        words = [text] if text else []
        for step in steps:
            pattern = re.compile(step)
            words = [word for piece in words for word in pattern.findall(piece)]
        if sum(map(len, words)) != len(text):  # what no alternative matches
            raise _NotOrdinaryError
        return [token_id for word in words for token_id in self._word(word)]

    def _word(self, word: str) -> list[int]:
        known = self._known.get(word)
        if known is None:
            known = self._known[word] = self._encode_word(word.encode())
        return known

    def _encode_word(self, word: bytes) -> list[int]:
        if len(word) > _LONGEST_WORD:
            raise _NotOrdinaryError
        if self._order:
            place = bisect_left(self._order, word, key=self.bytes_of)
            if place < len(self._order) and self.bytes_of(self._order[place]) == word:
                return [self._order[place]]
        ids = [self._byte_ids[byte] for byte in word]
        if min(ids) < 0:  # a byte without an id: `tokenizers` drops it, or has a token for what is unknown
            raise _NotOrdinaryError
        ranks = [self._rank(left, right) for left, right in pairwise(ids)]
        while ranks and (lowest := min(ranks)) < _UNMERGED:  # of equals the first, as in tokenizers' queue
            place = ranks.index(lowest)
            ids[place : place + 2] = [self._merged[lowest]]
            del ranks[place]
            if place > 0:
                ranks[place - 1] = self._rank(ids[place - 1], ids[place])
            if place < len(ranks):
                ranks[place] = self._rank(ids[place], ids[place + 1])
        return ids

    def _rank(self, left: int, right: int) -> int:
        pair = left << 32 | right
        place = bisect_left(self._pairs, pair)
        return self._ranks[place] if place < len(self._pairs) and self._pairs[place] == pair else _UNMERGED
