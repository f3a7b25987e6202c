"""Texts that take two implementations of a tokenizer apart. Knows characters and special tokens' names; knows no ids."""

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmctl.core.tokenizer.tokenizer import Tokenizer


def odd_texts(tokenizer: "Tokenizer") -> list[str]:
    """Texts that take implementations apart: runs of blanks, contractions, every kind of character, long words, and
    random mixtures of them, always the same."""
    atoms = [
        *(
            "a",
            "Zed",
            " the",
            "'s",
            "'LL",
            "'t'",
            " 'd",
            "don't",
            "I'VE",
            "ſ",
            "'ſ",
            "1",
            "12345",
            "٣٤",
            "½",
            "²",
            "Ⅷ",
            "_",
            "-",
            "...",
            "!?",
            "</s>",
        ),
        *("\n", "\r\n", "\r", "\t", " ", "  ", "     ", "\u00a0", "\u3000", "\u2028", "\u0085", "\u200b", "\ufeff", "\x00", "\x1c", "\x7f"),
        *(
            "é",
            "e\u0301",
            "ü",
            "ß",
            "İ",
            "Ångström",
            "ﬁ",
            "Ω",
            "привет",
            "שלום",
            "مرحبا",
            "हिन्दी",
            "ไทย",
            "國王",
            "かな",
            "カナ",
            "한국어",
            "ᄒ\u1161\u11ab",
        ),
        *(
            "🦊",
            "👩‍👩‍👧",
            "🇩🇪",
            "\u0301",
            "𝔘",
            "𐍈",
            "\U000e0041",
            "\ufffd",
            "№",
            "€",
            "“”",
            "—",
            "/path",
            "#tag",
            "{}",
            "();",
            "==",
            "\\n",
            "<|",
            "|>",
        ),
    ]
    generator = random.Random(0)
    mixed = ["".join(generator.choices(atoms, k=generator.choice((2, 3, 5, 9, 40)))) for _ in range(400)]
    names = [f"a{name}b {name}" for name in list(tokenizer.special_tokens)[:20]]
    tables = ["".join(map(chr, range(start, start + 64))) for start in (*range(0, 0x400, 64), 0x2000, 0x3000, 0x4E00, 0xAC00, 0xFF00)]
    texts = [*atoms, *mixed, *tables, "a" * 3000, " " * 3000, "é" * 500, "ab" * 700, "\n" * 300, "國" * 300]
    # A model that looks words up may find a control token's whole name; those texts are never given to another.
    return [*texts, *(() if tokenizer.reaches_control else names)]
