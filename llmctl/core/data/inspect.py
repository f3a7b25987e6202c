"""What a tokenizer makes of texts: how many ids a word, by input and by script, and which of its ids it never needs. Knows no shards."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmctl.core.data.quality import script_of

if TYPE_CHECKING:
    from llmctl.core.tokenizer import Tokenizer

NO_SCRIPT = "(none)"
"""Digits, punctuation, white space and signs."""
_WORD = re.compile(r"\w+")


@dataclass
class Fertility:
    """Sums over some text. `words` are runs of letters and digits, which says little where words are not divided by blanks."""

    tokens: int = 0
    characters: int = 0
    bytes: int = 0
    words: int = 0

    @property
    def tokens_per_word(self) -> float | None:
        """None where there are no words."""
        return self.tokens / self.words if self.words else None

    @property
    def characters_per_token(self) -> float | None:
        """None where there are no tokens."""
        return self.characters / self.tokens if self.tokens else None

    @property
    def bytes_per_token(self) -> float | None:
        """None where there are no tokens."""
        return self.bytes / self.tokens if self.tokens else None


@dataclass
class Inspection:
    """Of one tokenizer. `by_script` counts a token and a word by its first letter, a character by itself."""

    name: str
    tokenizer: "Tokenizer"
    total: Fertility = field(default_factory=Fertility)
    by_input: dict[str, Fertility] = field(default_factory=dict)
    by_script: dict[str, Fertility] = field(default_factory=dict)
    used: Counter[int] = field(default_factory=Counter)

    def add(self, source: str, text: str) -> None:
        """Count in a text of the input `source`."""
        ids, offsets = self.tokenizer.encode_with_offsets(text)
        self.used.update(ids)
        words = _WORD.findall(text)
        for row in (self.total, self.by_input.setdefault(source, Fertility())):
            row.tokens += len(ids)
            row.characters += len(text)
            row.bytes += len(text.encode())
            row.words += len(words)
        for script, number in Counter(first_script(text[start:end]) for start, end in offsets).items():
            self._row(script).tokens += number
        for script, number in Counter(map(first_script, words)).items():
            self._row(script).words += number
        for char, number in Counter(text).items():
            row = self._row(first_script(char))
            row.characters += number
            row.bytes += number * len(char.encode())

    def _row(self, script: str) -> Fertility:
        return self.by_script.setdefault(script, Fertility())

    def unused_ids(self) -> list[int]:
        """The ordinary ids that no text gave, those of the longest tokens first."""
        tokenizer = self.tokenizer
        unused = [i for i in range(tokenizer.vocab_size) if i not in self.used and i not in tokenizer.special_ids and tokenizer.is_known(i)]
        return sorted(unused, key=lambda i: (-len(tokenizer.token_text(i)), i))


def first_script(text: str) -> str:
    """The script of the first letter of `text`."""
    return next((script_of(char) for char in text if char.isalpha()), NO_SCRIPT)


def parts_of(tokenizer: "Tokenizer", text: str) -> list[str]:
    """`text` token by token, for showing. Tokens that are parts of one character stand together with how many they are: `國·2`."""
    _, offsets = tokenizer.encode_with_offsets(text)
    parts: list[tuple[int, int, int]] = []
    for start, end in offsets:
        if parts and start < parts[-1][1]:
            first, last, number = parts[-1]
            parts[-1] = (first, max(last, end), number + 1)
        else:
            parts.append((start, end, 1))
    return [text[start:end] + (f"·{number}" if number > 1 else "") for start, end, number in parts]


def largest_scripts(inspections: Sequence[Inspection], number: int) -> list[str]:
    """The scripts with most characters."""
    rows = inspections[0].by_script
    return sorted(rows, key=lambda script: (-rows[script].characters, script))[:number]
