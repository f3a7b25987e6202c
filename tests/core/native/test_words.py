"""Words cut by hand-written code beside the regular expressions of `tokenizers`, on random Unicode and on the hard cases."""

import ctypes
import random

import numpy as np
import pytest
import tokenizers.pre_tokenizers

from llmctl.core.tokenizer.byte_level import token_to_bytes
from llmctl.core.tokenizer.train import pre_tokenizer_of
from llmctl.core.tokenizer.words import PATTERNS, _library
from tests.core.native.models import runnable_kernels
from tests.core.native.unicode_classes import HEADER, header

pytestmark = pytest.mark.skipif(not runnable_kernels(), reason="the native library was not built")

ODD = [
    *"aZsStTrReEvVmMlLdD''''\u017f019٣½Ⅷ_-.!?\n\n\r\t    \u00a0\u3000\u2028\u0085\u200b\ufeff\x00\x1c\x7fé国かᄒ🦊\u0301𝔘",
    "\r\n",
    "  ",
    "abc",
]


def cut(pattern: str, text: str) -> list[bytes]:
    """The words that the native library finds."""
    library, data = _library(), text.encode()
    library.llmctl_words_cut.restype = ctypes.c_int64
    library.llmctl_words_cut.argtypes = [ctypes.c_int32, ctypes.c_char_p, ctypes.c_int64, ctypes.c_void_p]
    ends = np.zeros(len(data) + 1, dtype=np.int64)
    number = library.llmctl_words_cut(PATTERNS.index(pattern), data, len(data), ends.ctypes.data)
    return [data[start:end] for start, end in zip([0, *ends[:number]], ends[:number], strict=False)]


def wanted(splitter: tokenizers.pre_tokenizers.PreTokenizer, text: str) -> list[bytes]:
    return [token_to_bytes(word) for word, _ in splitter.pre_tokenize_str(text)]


def any_char(generator: random.Random) -> str:
    first = generator.choice([generator.randrange(0x80), generator.randrange(0x800), generator.randrange(0xD800)])
    return chr(generator.choice([first, first, generator.randrange(0xE000, 0x110000)]))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_words_are_those_of_the_regular_expression(pattern: str) -> None:
    generator, splitter = random.Random(0), pre_tokenizer_of(pattern)
    for number in range(3000):
        length = generator.randrange(1, 30)
        text = "".join(generator.choices(ODD, k=length)) if number % 3 else "".join(any_char(generator) for _ in range(length))
        assert cut(pattern, text) == wanted(splitter, text), repr(text)


def test_the_classes_of_unicode_are_those_of_tokenizers() -> None:
    assert HEADER.read_text(encoding="utf-8") == header()
