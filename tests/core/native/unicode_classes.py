"""Writes native/unicode_classes.h: what the regular expressions of `tokenizers` take for a letter, a number and white space.

    python -m tests.core.native.unicode_classes

Asked of `tokenizers` itself, since Python's `unicodedata` may know another version of Unicode. A test compares.
"""

from pathlib import Path

from tokenizers import Regex, pre_tokenizers

HEADER = Path(__file__).parents[3] / "llmctl" / "core" / "native" / "unicode_classes.h"
CLASSES = {"letters": r"\p{L}+", "numbers": r"\p{N}+", "spaces": r"\s+"}
_CHUNK = 1024
"""`pre_tokenize_str` takes quadratic time."""


def ranges_of(pattern: str) -> list[tuple[int, int]]:
    """The code points that match, as (first, last); surrogates do not."""
    splitter = pre_tokenizers.Split(Regex(pattern), behavior="removed")
    found: list[tuple[int, int]] = []
    for start in range(0, 0x110000, _CHUNK):
        if 0xD800 <= start < 0xE000:
            continue
        matches = bytearray(b"\1" * _CHUNK)
        for _, (first, end) in splitter.pre_tokenize_str("".join(map(chr, range(start, start + _CHUNK)))):
            matches[first:end] = bytes(end - first)
        for code in (start + place for place in range(_CHUNK) if matches[place]):
            if found and found[-1][1] == code - 1:
                found[-1] = (found[-1][0], code)
            else:
                found.append((code, code))
    return found


def header() -> str:
    """The text of the header."""
    lines = [
        "// Code points by class as the regular expressions of huggingface/tokenizers see them, first and last of each range.",
        "// Written by `python -m tests.core.native.unicode_classes`; do not edit.",
        "",
        "#include <cstdint>",
    ]
    for name, pattern in CLASSES.items():
        cells = [f"{{{first:#x}, {last:#x}}}" for first, last in ranges_of(pattern)]
        rows = [", ".join(cells[start : start + 6]) for start in range(0, len(cells), 6)]
        lines += ["", f"constexpr std::uint32_t {name}[][2] = {{", *(f"    {row}," for row in rows), "};"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    HEADER.write_text(header(), encoding="utf-8")
