"""Streaming decoders: ids in, whole characters out. Know bytes and a decode function; know no model and no terminal."""

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class StreamDecoder(Protocol):
    """Turns ids, one at a time, into text that never ends inside a character.

    The pieces joined equal `Tokenizer.decode` of all the ids; a sequence of bytes that is not UTF-8 gives the same
    U+FFFD as there.
    """

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; empty while a character is incomplete."""

    def finish(self) -> str:
        """What is left at the end: U+FFFD for a character that never became complete, else nothing."""


class ByteStreamDecoder:
    """For tokenizers whose every id stands for a fixed run of bytes. `bytes_of` gives them, empty for a skipped id."""

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        self._bytes_of = bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """See StreamDecoder."""
        return self._decoder.decode(self._bytes_of(token_id))

    def finish(self) -> str:
        """See StreamDecoder."""
        return self._decoder.decode(b"", final=True)


class WindowStreamDecoder:
    """For any other tokenizer, where the text of an id depends on its neighbours (SentencePiece, WordPiece).

    Decodes a short window twice, without and with the new ids, and gives the difference; text that ends in U+FFFD waits
    for the bytes that may complete it. The window starts at ids whose text is already out, so that a decoder that
    treats the first token differently (it strips a space) does so in both.
    """

    _LONGEST_CHARACTER = 4
    """Bytes of a UTF-8 character, so ids that can stand for one: after as many, U+FFFD is final."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._num_shown = 0  # ids of the window whose text is out

    def push(self, token_id: int) -> str:
        """See StreamDecoder."""
        self._ids.append(token_id)
        return self._advance(final=False)

    def finish(self) -> str:
        """See StreamDecoder."""
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> str:
        shown = self._decode(self._ids[: self._num_shown])
        whole = self._decode(self._ids)
        num_waiting = len(self._ids) - self._num_shown
        if whole.endswith(REPLACEMENT) and not final and num_waiting < self._LONGEST_CHARACTER:
            return ""
        if not whole.startswith(shown):
            return ""
        self._ids = self._ids[self._num_shown :] or self._ids
        self._num_shown = len(self._ids)
        return whole[len(shown) :]
