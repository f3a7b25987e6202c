"""Text to ids and back. Knows `tokenizers` and the special tokens; knows no model, no file layout (see load) and no chat (see chat).

Special tokens in a text are plain text unless the caller says `allow_special`: a user who types `<|endoftext|>` must
not end a document.
"""

import contextlib
import json
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmctl.core.errors import InputError
from llmctl.core.tokenizer.byte_level import byte_to_char, token_to_bytes
from llmctl.core.tokenizer.parts import (
    backend_errors,
    fingerprint_of,
    is_special,
    looks_up_words,
    measured_bytes,
    parts_of,
    state_of,
    types_in,
    unknown_id,
)
from llmctl.core.tokenizer.stream import ByteStreamDecoder, StreamDecoder, WindowStreamDecoder

if TYPE_CHECKING:  # reading the tables of a plain encoder needs no `tokenizers`
    import tokenizers

    from llmctl.core.tokenizer.chat import ChatEncoder

MAX_VOCAB_SIZE = 1 << 24


class Tokenizer:
    """A tokenizer of any Hugging Face model, loaded without transformers. Make one with `load` or `from_parts`.

    Ids are ints below `vocab_size`. Everything here is safe to call from several threads.
    """

    def __init__(
        self,
        backend: "tokenizers.Tokenizer",
        *,
        bos: str | None,
        eos: str | None,
        pad: str | None,
        chat_template: str | None,
        model_max_length: int | None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        named = [token for token in (bos, eos, pad) if token is not None]
        for token in named:
            if backend.token_to_id(token) is None:
                raise InputError(f"the tokenizer has no token {token!r}, but its config names it as bos, eos or pad")
        missing = [t for t in dict.fromkeys(named) if not is_special(backend, t)]
        if missing:  # transformers marks them too, so that decoding can skip them
            import tokenizers

            backend.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in missing])
        backend.encode_special_tokens = True
        self._backend = backend
        self._lock = threading.Lock()
        self.bos_token, self.eos_token, self.pad_token = bos, eos, pad
        self.chat_template = chat_template
        self.model_max_length = model_max_length

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """The tokenizer of a model directory, or of a tokenizer.json with the configs beside it.

        Raises NotFoundError when there is none, InputError when a file is malformed or of a kind that only
        transformers' slow tokenizers read.
        """
        from llmctl.core.tokenizer.load import load

        return load(Path(path))

    @classmethod
    def from_parts(
        cls,
        tokenizer: "tokenizers.Tokenizer",
        *,
        bos: str | None,
        eos: str | None,
        pad: str | None,
        chat_template: str | None = None,
        model_max_length: int | None = None,
    ) -> "Tokenizer":
        """Wrap a `tokenizers.Tokenizer` (which then belongs to the result), for GGUF files and for training.

        Raises InputError when it lacks one of the named tokens.
        """
        return cls(tokenizer, bos=bos, eos=eos, pad=pad, chat_template=chat_template, model_max_length=model_max_length)

    @property
    def backend(self) -> "tokenizers.Tokenizer":
        """The tokenizer of `tokenizers` that this one stands on. Who takes it must not change it."""
        return self._backend

    def __reduce__(self) -> Any:
        parts = (self.bos_token, self.eos_token, self.pad_token, self.chat_template, self.model_max_length)
        return _unpickle, (self._backend.to_str(), *parts)

    # facts

    @cached_property
    def vocab_size(self) -> int:
        """The highest id + 1, added tokens included."""
        size = max(self._ids.values(), default=-1) + 1
        if size > MAX_VOCAB_SIZE:
            raise InputError(f"the tokenizer has an id {size - 1:,}; more than {MAX_VOCAB_SIZE:,} ids are not a vocabulary")
        return size

    @cached_property
    def _ids(self) -> dict[str, int]:
        return self._backend.get_vocab(with_added_tokens=True)

    @cached_property
    def _tokens(self) -> dict[int, str]:
        return {token_id: token for token, token_id in self._ids.items()}

    def tokens_by_id(self) -> dict[int, str]:
        """Id -> token as the vocabulary writes it, added tokens included."""
        return dict(self._tokens)

    @cached_property
    def _added(self) -> "dict[int, tokenizers.AddedToken]":
        return self._backend.get_added_tokens_decoder()

    @property
    def bos_id(self) -> int | None:
        """Id of the token that starts a text, if the tokenizer has one."""
        return self.token_id(self.bos_token)

    @property
    def eos_id(self) -> int | None:
        """Id of the token that ends a text, if the tokenizer has one."""
        return self.token_id(self.eos_token)

    @property
    def pad_id(self) -> int | None:
        """Id of the token that fills up a batch, if the tokenizer has one."""
        return self.token_id(self.pad_token)

    def token_id(self, token: str | None) -> int | None:
        """The id of exactly this token, or None."""
        return None if token is None else self._backend.token_to_id(token)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids of control tokens: those that a decoder may skip and that plain text never gives."""
        return frozenset(token_id for token_id, token in self._added.items() if token.special)

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Content -> id of the control tokens, in the order of their ids."""
        return {token.content: token_id for token_id, token in sorted(self._added.items()) if token.special}

    def special_flags(self, token: str) -> "tokenizers.AddedToken":
        """How the special token `token` is matched (lstrip, rstrip, ...)."""
        return self._added[self.special_tokens[token]]

    @cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """Matches a control token in a text, the longest one first."""
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    @cached_property
    def special_parts(self) -> tuple[frozenset[str], frozenset[str], int]:
        """The proper beginnings and the proper ends, of two characters or more, of control tokens, and the longest length."""
        names = list(self.special_tokens)
        starts = frozenset(name[:length] for name in names for length in range(2, len(name)))
        ends = frozenset(name[-length:] for name in names for length in range(2, len(name)))
        return starts, ends, max(map(len, names), default=0)

    @cached_property
    def adds_bos(self) -> bool:
        """Whether the reference tokenizer puts BOS before every text by itself."""
        return self.bos_id is not None and self._encode_one("", special=False, post=True)[:1] == [self.bos_id]

    @cached_property
    def is_byte_level(self) -> bool:
        """Whether every ordinary id stands for a fixed run of bytes (the GPT-2 alphabet)."""
        return "ByteLevel" in types_in(state_of(self._backend.decoder))

    @cached_property
    def missing_bytes(self) -> bytes:
        """The bytes that a byte-level tokenizer, or one with byte fallback, has no id for, in order."""
        if self.is_byte_level:
            return bytes(byte for byte, char in enumerate(byte_to_char()) if char not in self._ids)
        return bytes(byte for byte in range(256) if f"<0x{byte:02X}>" not in self._ids)

    @cached_property
    def is_byte_complete(self) -> bool:
        """Whether all 256 bytes have ids, so that no text is beyond the tokenizer."""
        return not self.missing_bytes

    @cached_property
    def is_lossless(self) -> bool:
        """Whether decode(encode(text)) is `text` for every text: byte-level, byte-complete, and nothing rewritten before."""
        prefix = any(part.get("add_prefix_space") for part in parts_of(state_of(self._backend.pre_tokenizer)))
        return self.is_byte_level and self.is_byte_complete and self._backend.normalizer is None and not prefix

    @cached_property
    def structure(self) -> dict[str, Any]:
        """What tokenizer.json says of the normalizer, the pre-tokeniser and the added tokens, without the vocabulary."""
        flags = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
        return {
            "normalizer": state_of(self._backend.normalizer) or None,
            "pre_tokenizer": state_of(self._backend.pre_tokenizer) or None,
            "added_tokens": [{"id": i, **{flag: getattr(token, flag) for flag in flags}} for i, token in sorted(self._added.items())],
        }

    @cached_property
    def fingerprint(self) -> str:
        """64 hex digits: sha256 of everything that decides ids, and of bos and eos, independent of how JSON is written.

        The chat template and the padding token do not count: they change no id of a text.
        """
        return fingerprint_of(self._backend, bos=self.bos_token, eos=self.eos_token)

    # text to ids

    def encode(self, text: str, *, allow_special: bool = False, add_bos: bool | None = None) -> list[int]:
        """The ids of `text`.

        `allow_special` turns the names of special tokens in the text into those tokens. `add_bos` None does as the
        reference does, True puts BOS first, False adds nothing. Raises InputError for lone surrogates, and when BOS is
        asked for and there is none.
        """
        ids = self._encode_one(text, special=allow_special, post=add_bos is None)
        return [self._need_bos(), *ids] if add_bos else ids

    def encode_batch(self, texts: Sequence[str], *, allow_special: bool = False, add_bos: bool | None = None) -> list[list[int]]:
        """`encode` of each text, in several threads (RAYON_NUM_THREADS bounds them)."""
        with self._backend_for(special=allow_special) as backend:
            batch = [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=add_bos is None)]
        if not allow_special:
            batch = [self._without_control(text, ids, post=add_bos is None) for text, ids in zip(texts, batch, strict=True)]
        return [[self._need_bos(), *ids] for ids in batch] if add_bos else batch

    def encode_with_offsets(self, text: str, *, allow_special: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of `text`, nothing added, and for each the (start, end) of its characters in `text`."""
        with self._backend_for(special=allow_special) as backend:
            encoding = backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def encode_piece(self, text: str, *, is_first: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids and offsets of plain text that stands between control tokens, or (`is_first`) at the start of all."""
        inner = self if is_first else self._continuation
        ids, offsets = inner.encode_with_offsets(text)
        if self.reaches_control and not (self.special_ids - {self._unknown_id}).isdisjoint(ids):
            ids = inner._without_control(text, ids, post=False)
            offsets = [(0, len(text))] * len(ids)
        return ids, offsets

    @cached_property
    def _continuation(self) -> "Tokenizer":
        """This tokenizer without the space that SentencePiece puts before the first word of a text, and only there."""
        state = state_of(self._backend.pre_tokenizer)
        first = [part for part in parts_of(state) if part.get("type") == "Metaspace" and part.get("prepend_scheme") == "first"]
        if not first:
            return self
        content = json.loads(self._backend.to_str())
        for part in parts_of(content["pre_tokenizer"]):
            if part.get("type") == "Metaspace":
                part["prepend_scheme"] = "never"
        return _unpickle(json.dumps(content), self.bos_token, self.eos_token, self.pad_token, None, None)

    def count_special(self, text: str) -> int:
        """How many names of special tokens stand in `text`."""
        return sum(1 for _ in self.special_pattern.finditer(text)) if self.special_tokens else 0

    def count_lost(self, text: str) -> int:
        """How many characters of `text` its ids cannot give back: a byte without an id, or the unknown token."""
        if self.is_byte_level:
            if not self.missing_bytes:
                return 0
            table = bytes.maketrans(self.missing_bytes, b"\xff" * len(self.missing_bytes))
            if b"\xff" not in text.encode("utf-8").translate(table):  # 0xFF never occurs in UTF-8
                return 0
            lost = set(self.missing_bytes)
            return sum(1 for char in text if not lost.isdisjoint(char.encode("utf-8")))
        unknown = self._unknown_id
        if unknown is None:
            return 0
        ids, offsets = self.encode_with_offsets(text)
        return sum(end - start for token_id, (start, end) in zip(ids, offsets, strict=True) if token_id == unknown)

    @cached_property
    def _unknown_id(self) -> int | None:
        """The id that the model itself gives for what it does not know."""
        return unknown_id(self._backend)

    def _need_bos(self) -> int:
        if self.bos_id is None:
            raise InputError("this tokenizer has no BOS token, so none can be put before a text")
        return self.bos_id

    def _encode_one(self, text: str, *, special: bool, post: bool) -> list[int]:
        with self._backend_for(special=special) as backend:
            ids: list[int] = backend.encode(text, add_special_tokens=post).ids
        return ids if special else self._without_control(text, ids, post=post)

    @cached_property
    def reaches_control(self) -> bool:
        """Whether the model, with added tokens left out of account, can still give a control id."""
        if looks_up_words(self._backend):
            return True
        return any(token_id in self._encode_raw(name) for name, token_id in self.special_tokens.items())

    def _without_control(self, text: str, ids: list[int], *, post: bool) -> list[int]:
        """`ids`, or ids of the same text cut inside each control token's name when the model found one by itself."""
        if not self.reaches_control or not self.special_pattern.search(text):
            return ids
        plain = self.special_ids - {self._unknown_id}
        core = self._encode_raw(text)
        if plain.isdisjoint(core):
            return ids
        pieces, start = [], 0
        for match in self.special_pattern.finditer(text):
            pieces.append(text[start : match.start() + 1])
            start = match.start() + 1
        inner = [token_id for piece in [*pieces, text[start:]] for token_id in self._encode_raw(piece)]
        frame = self._encode_one("", special=False, post=True) if post else []
        num_before = len(ids) - len(core) if not frame else next((n for n in range(len(frame) + 1) if ids[n : n + len(core)] == core), 0)
        return [*frame[:num_before], *inner, *frame[num_before:]] if post else inner

    def _encode_raw(self, text: str) -> list[int]:
        with self._backend_for(special=False) as backend:
            ids: list[int] = backend.encode(text, add_special_tokens=False).ids
        return ids

    @contextlib.contextmanager
    def _backend_for(self, *, special: bool) -> "Iterator[tokenizers.Tokenizer]":
        """The backend, for one caller at a time, set to see the names of special tokens or not.

        What it raises (bare Exception, or PanicException where Rust gave up) becomes InputError.
        """
        with self._lock:
            self._backend.encode_special_tokens = not special
            try:
                with backend_errors("this tokenizer cannot encode the text"):
                    yield self._backend
            except TypeError as error:
                raise InputError(f"cannot encode: the text holds a lone surrogate or is no text ({error})") from error

    # ids to text

    def is_known(self, token_id: int) -> bool:
        """Whether `token_id` stands for anything here. A model may have more rows than its tokenizer has ids."""
        return token_id in self._tokens

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """The text of `ids`. Bytes that are not UTF-8 become U+FFFD; unknown ids give nothing."""
        with backend_errors("this tokenizer cannot decode the ids"):
            return str(self._backend.decode([i for i in ids if 0 <= i < self.vocab_size], skip_special_tokens=skip_special))

    def decode_bytes(self, ids: Sequence[int], *, skip_special: bool = False) -> bytes:
        """The bytes of `ids`, exactly, also where they are not UTF-8. A tokenizer that is not byte-level gives decode's UTF-8."""
        if not self.is_byte_level:
            return self.decode(ids, skip_special=skip_special).encode("utf-8")
        return b"".join(self._bytes_of(i, skip_special=skip_special) for i in ids)

    def _bytes_of(self, token_id: int, *, skip_special: bool) -> bytes:
        token = self._backend.id_to_token(token_id) if token_id >= 0 else None  # a table of all would cost the first token 10 ms
        if token is None or (skip_special and token_id in self.special_ids):
            return b""
        return token_to_bytes(token)

    def token_text(self, token_id: int) -> str:
        """The text of one id, for showing; part of a character shows as U+FFFD. Empty for an unknown id."""
        if token_id in self._added:
            return self._added[token_id].content
        return self.decode([token_id])

    def token_bytes(self) -> "np.ndarray[Any, np.dtype[np.int32]]":
        """(vocab_size,) int32: how many bytes of text each id stands for; 0 for special tokens and unused ids.

        Summed over the ids of a text this is its length in UTF-8, for byte-level tokenizers exactly.
        """
        lengths = np.zeros(self.vocab_size, dtype=np.int32)
        ordinary = {i: token for i, token in self._tokens.items() if i not in self.special_ids}
        if self.is_byte_level:
            for token_id, token in ordinary.items():
                lengths[token_id] = len(token_to_bytes(token))
            return lengths
        for token_id, length in measured_bytes(self._backend, ordinary).items():
            lengths[token_id] = length
        return lengths

    def stream(self, *, skip_special: bool = False) -> StreamDecoder:
        """A decoder that takes ids one at a time and gives only whole characters."""
        if self.is_byte_level:
            return ByteStreamDecoder(lambda token_id: self._bytes_of(token_id, skip_special=skip_special))
        return WindowStreamDecoder(lambda ids: self.decode(ids, skip_special=skip_special))

    # chat

    @cached_property
    def _chat(self) -> "ChatEncoder":
        from llmctl.core.tokenizer.chat import ChatEncoder

        return ChatEncoder(self)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> str:
        """The text that the chat template makes of `messages`. Raises InputError, also past 2 s or 10 MB."""
        return self._chat.render(messages, add_generation_prompt=add_generation_prompt)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> list[int]:
        """The ids of the rendered chat. Control ids stand only where the template put them, whatever the messages say."""
        return self._chat.encode(messages, add_generation_prompt=add_generation_prompt)

    def encode_chat_turns(self, messages: Sequence[Mapping[str, Any]]) -> list[tuple[list[int], bool]]:
        """The whole chat as segments (ids, is_answer), in order; joined they equal `encode_chat` without a prompt.

        An answer is what the assistant must produce: its content and the token that ends the turn. Where a token would
        span the end of a prompt and white space at the start of the answer, the text is cut between them, so the ids
        before an answer are those of its prompt alone.
        """
        return self._chat.encode_turns(messages)

    @property
    def end_of_turn_ids(self) -> frozenset[int]:
        """The special ids that the template puts right after an assistant's answer; empty without a template."""
        return self._chat.end_of_turn_ids if self.chat_template is not None else frozenset()

    # files

    def to_json(self, *, pretty: bool = True) -> str:
        """The content of tokenizer.json."""
        return str(self._backend.to_str(pretty=pretty)) + "\n"

    def save(self, directory: Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and, with a template, chat_template.jinja into a folder that exists.

        transformers loads them as PreTrainedTokenizerFast. Raises WriteError and UsageError as files.atomic_write does.
        """
        from llmctl.core.tokenizer.load import save

        save(self, Path(directory))


def _unpickle(content: str, bos: str | None, eos: str | None, pad: str | None, template: str | None, length: int | None) -> Tokenizer:
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(content)
    return Tokenizer(backend, bos=bos, eos=eos, pad=pad, chat_template=template, model_max_length=length)
