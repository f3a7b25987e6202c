"""The byte alphabet of byte-level BPE: one printable character for each of the 256 bytes. Knows no tokenizer.

Source: GPT-2's `bytes_to_unicode` (openai/gpt-2, src/encoder.py); `tokenizers` uses the same table.
"""

from functools import cache


@cache
def byte_to_char() -> tuple[str, ...]:
    """Entry b is the character that stands for byte b."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = [""] * 256
    for byte in printable:
        table[byte] = chr(byte)
    shifted = (byte for byte in range(256) if not table[byte])
    for offset, byte in enumerate(shifted):
        table[byte] = chr(0x100 + offset)
    return tuple(table)


@cache
def char_to_byte() -> dict[str, int]:
    """The inverse of `byte_to_char`."""
    return {char: byte for byte, char in enumerate(byte_to_char())}


def token_to_bytes(token: str) -> bytes:
    """The bytes that a byte-level token stands for.

    A token with a character outside the alphabet (an added token such as "你好") stands for its own UTF-8, whole, as
    the ByteLevel decoder of `tokenizers` has it.
    """
    table = char_to_byte()
    try:
        return bytes([table[char] for char in token])
    except KeyError:
        return token.encode("utf-8")
