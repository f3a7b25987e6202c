"""What may be done to documents before they are encoded: repaired, redacted, left out. Knows text; knows no ids and no files but its own.

Each tool is off unless asked for, looks at one document at a time, and is counted. Whether a document is a duplicate is
decided where all of them pass in order (packrun); here it gets the keys by which that is seen.
"""

import hashlib
import json
import re
import tomllib
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmctl.core.errors import InputError, MissingExtraError, NotFoundError, UsageError

NUM_BANDS, _BAND_ROWS, _MINHASH_SEED = 16, 8, 1
"""Two documents whose sets of shingles overlap by the part j meet in a band with probability 1 - (1 - j^8)^16: 0.06 at one
half, 0.62 at 0.7, 0.95 at 0.8 (Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, chapter 3)."""
_SHINGLE_WORDS = 5
_GRAM_WORDS, _SHORTEST_GRAM_WORDS = 13, 8
"""Brown et al., 2020 (GPT-3), appendix C: overlaps of 13 words, and down to 8 where the examples are short."""
_CJK = "\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")

Keys = npt.NDArray[np.uint64]


@dataclass(frozen=True, kw_only=True)
class QualityRules:
    """What is done to documents; see PackConfig. `redact` maps names to patterns."""

    normalize: str | None = None
    min_chars: int | None = None
    max_chars: int | None = None
    scripts: tuple[str, ...] = ()
    redact: tuple[tuple[str, str], ...] = ()
    dedupe: str | None = None
    decontaminate: tuple[str, ...] = ()

    @property
    def is_on(self) -> bool:
        """Whether anything is done."""
        return self != QualityRules()

    def as_plan(self) -> dict[str, Any]:
        """What decides the result, as JSON: of the evaluation sets their hashes."""
        files = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in self.decontaminate]
        facts = {name: getattr(self, name) for name in ("normalize", "min_chars", "max_chars", "dedupe")}
        lists = {"scripts": list(self.scripts), "redact": [list(pair) for pair in self.redact], "decontaminate": files}
        return {**facts, **lists}


def read_patterns(path: Path) -> tuple[tuple[str, str], ...]:
    """Names and regular expressions of a TOML file: `EMAIL = '[\\w.+-]+@[\\w-]+\\.\\w+'`. Raises NotFoundError, UsageError."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise NotFoundError(f"--redact {path}: no such file") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"--redact {path}: {error}; lines such as EMAIL = '[\\w.+-]+@[\\w-]+\\.\\w+' are wanted") from error
    for name, pattern in table.items():
        try:
            matches_nothing = isinstance(pattern, str) and re.compile(pattern).match("") is not None
        except re.error as error:
            raise UsageError(f"--redact {path}: {name}: {error}") from error
        if not isinstance(pattern, str) or matches_nothing:
            raise UsageError(f"--redact {path}: {name}: a regular expression that matches something is wanted")
    if not table:
        raise UsageError(f"--redact {path}: holds no patterns; lines such as EMAIL = '[\\w.+-]+@[\\w-]+\\.\\w+' are wanted")
    return tuple(table.items())


class Cleaner:
    """Applies QualityRules to documents. Raises MissingExtraError for a tool that is not installed, InputError for a bad evaluation set."""

    def __init__(self, rules: QualityRules) -> None:
        self._rules = rules
        self._repair = _opened("ftfy").fix_text if rules.normalize == "ftfy" else None
        self._minhash = _opened("rensa").RMinHash if rules.dedupe == "near" else None
        self._patterns = [(re.compile(pattern), f"[{name}]") for name, pattern in rules.redact]
        self._scripts = frozenset(name.upper() for name in rules.scripts)
        self._overlap = _Overlap(rules.decontaminate) if rules.decontaminate else None

    def clean(self, texts: Sequence[bytes]) -> tuple[list[bytes], Counter[str]]:
        """The documents that stay, as they are now, and how many were changed or left out by what."""
        kept, counts = [], Counter[str]()
        for data in texts:
            text = data.decode()
            fresh = self._repair(text) if self._repair else unicodedata.normalize("NFC", text) if self._rules.normalize else text
            counts["normalized"] += fresh != text
            for pattern, name in self._patterns:
                fresh, number = pattern.subn(name, fresh)
                counts["redacted"] += number
            if (why := self._unwanted(fresh)) is not None:
                counts[why] += 1
            else:
                kept.append(fresh.encode())
        return kept, +counts

    def _unwanted(self, text: str) -> str | None:
        rules = self._rules
        if rules.min_chars is not None and len(text) < rules.min_chars:
            return "too_short"
        if rules.max_chars is not None and len(text) > rules.max_chars:
            return "too_long"
        if self._scripts and not self._is_in_scripts(text):
            return "other_script"
        return "contaminated" if self._overlap is not None and self._overlap.is_in(text) else None

    def _is_in_scripts(self, text: str) -> bool:
        """Whether more than half of the letters are of the scripts."""
        counts: Counter[bool] = Counter()
        for char, number in Counter(text).items():
            if char.isalpha():
                counts[script_of(char) in self._scripts] += number
        return counts[True] > counts[False]

    @property
    def num_keys(self) -> int:
        """How many keys a document has; 0 where duplicates stay."""
        return {None: 0, "exact": 1, "near": NUM_BANDS}[self._rules.dedupe]

    def keys_of(self, texts: Sequence[bytes]) -> Keys:
        """(texts, num_keys): two documents of which one key is equal, in its place, are duplicates."""
        rows = [self._near_keys(text) if self._minhash is not None else [_key(text)] for text in texts]
        return np.array(rows, dtype=np.uint64).reshape(len(texts), self.num_keys)

    def _near_keys(self, data: bytes) -> list[int]:
        words = _WORD.findall(data.decode().lower())
        assert self._minhash is not None
        minhash = self._minhash(num_perm=NUM_BANDS * _BAND_ROWS, seed=_MINHASH_SEED)
        last = max(1, len(words) - _SHINGLE_WORDS + 1)
        minhash.update([" ".join(words[start : start + _SHINGLE_WORDS]) for start in range(last)])
        digest = np.array(minhash.digest(), dtype=np.uint64).reshape(NUM_BANDS, _BAND_ROWS)
        return [_key(row.tobytes()) for row in digest]


def _key(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _opened(name: str) -> Any:
    """The module of that name, of the extra `quality`."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError({"ftfy": "--normalize ftfy", "rensa": "--dedupe near"}[name], extra="quality") from error


@cache
def script_of(char: str) -> str:
    """The script of a letter, by the first word of its name in Unicode: LATIN, CYRILLIC, CJK, HIRAGANA, ..."""
    return unicodedata.name(char, "UNKNOWN").split(" ", 1)[0].split("-", 1)[0]


class _Overlap:
    """The runs of words of evaluation sets. Hashes are Python's own, since each process builds its set anew."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._grams: dict[int, set[int]] = {}
        for path in paths:
            for text in evaluation_texts(Path(path)):
                words = _WORD.findall(text.lower())
                length = min(len(words), _GRAM_WORDS)
                if length >= _SHORTEST_GRAM_WORDS:
                    found = self._grams.setdefault(length, set())
                    found.update(hash(tuple(words[start : start + length])) for start in range(len(words) - length + 1))
                    # Every run begins with eight words: those are looked up first, and mostly last.
                    self._grams.setdefault(0, set()).update(
                        hash(tuple(words[start : start + _SHORTEST_GRAM_WORDS])) for start in range(len(words) - length + 1)
                    )

    def is_in(self, text: str) -> bool:
        """Whether the text has one of the runs."""
        words = _WORD.findall(text.lower())
        begins = self._grams.get(0, set())
        for start in range(len(words) - _SHORTEST_GRAM_WORDS + 1):
            if hash(tuple(words[start : start + _SHORTEST_GRAM_WORDS])) in begins and self._begins_at(words, start):
                return True
        return False

    def _begins_at(self, words: list[str], start: int) -> bool:
        return any(length and hash(tuple(words[start : start + length])) in found for length, found in self._grams.items())


def evaluation_texts(path: Path) -> Iterator[str]:
    """The texts of an evaluation set: of JSON lines every string in every record, of any other file its lines."""
    from llmctl.core.data.documents import ReadRules, SplitRule, lines_of, read_pieces
    from llmctl.core.data.sources import find_sources

    for number, source in enumerate(find_sources([str(path)])):
        rules = ReadRules(split=SplitRule(kind="none"), max_line_bytes=1 << 26)
        lines = source if source.format == "jsonl" else type(source)(source.name, source.path, "lines", source.num_bytes)
        for piece, _ in read_pieces(lines, number, rules=rules):
            if piece.error is not None:
                raise InputError(f"--decontaminate {source.name}: {piece.error}")
            for line in lines_of(piece):
                try:
                    yield from _strings(json.loads(line.data)) if piece.form == "jsonl" else [line.data.decode()]
                except ValueError as error:
                    raise InputError(f"--decontaminate {source.name}: line {line.number}: {error}") from error


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)
