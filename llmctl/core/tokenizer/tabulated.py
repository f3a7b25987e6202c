"""A tokenizer whose common answers come from tables. Knows PlainEncoder; opens the tokenizer behind it only when that is needed."""

import threading
from collections.abc import Callable, Mapping
from typing import Any

from llmctl.core.tokenizer.plain import PlainEncoder
from llmctl.core.tokenizer.tokenizer import Tokenizer


class TabulatedTokenizer(Tokenizer):
    """What `tabulate` made of a tokenizer, and `reopen`, which gives that tokenizer where the tables do not answer."""

    def __init__(self, facts: Mapping[str, Any], tables: Mapping[str, memoryview], *, reopen: Callable[[], Tokenizer]) -> None:
        self._reopen = reopen
        self._plain = PlainEncoder(facts, tables)
        self._lock = threading.Lock()
        named = facts["named"]
        self.bos_token, self.eos_token, self.pad_token = named["bos"], named["eos"], named["pad"]
        self.chat_template, self.model_max_length = named["chat_template"], named["model_max_length"]
        specials: dict[str, int] = facts["specials"]
        vars(self).update(  # where cached properties look first
            vocab_size=facts["vocab_size"],
            special_tokens=specials,
            special_ids=frozenset(specials.values()),
            is_byte_level=True,
            reaches_control=facts["reaches_control"],
        )

    def __getattr__(self, name: str) -> Any:
        if name != "_backend":
            raise AttributeError(name)
        self._backend = self._reopen().backend
        return self._backend

    def token_id(self, token: str | None) -> int | None:
        """See Tokenizer.token_id."""
        return self.special_tokens[token] if token in self.special_tokens else super().token_id(token)

    def _encode_one(self, text: str, *, special: bool, post: bool) -> list[int]:
        ids = self._plain.encode(text, special=special, post=post)
        return super()._encode_one(text, special=special, post=post) if ids is None else ids

    def _bytes_of(self, token_id: int, *, skip_special: bool) -> bytes:
        return b"" if skip_special and token_id in self.special_ids else self._plain.bytes_of(token_id)
