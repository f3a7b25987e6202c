"""Encoding by gigatoken, a second implementation of the same tokenizers that is some thirty times as fast. Knows ids and
`Tokenizer`; knows no corpus.

It is trusted nowhere: it opens only when its ids of a set of odd texts are those of `tokenizers`, and whoever encodes a
corpus with it compares a sample as it goes (core.data.encoders). What it does not take, `tokenizers` does.
"""

import importlib.util
import os
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llmctl.core.memory import peak_bytes
from llmctl.core.tokenizer.odd_texts import odd_texts
from llmctl.core.tokenizer.parts import json_text, parsed, types_in

if TYPE_CHECKING:
    from llmctl.core.tokenizer.tokenizer import Tokenizer

TokenIds = npt.NDArray[np.uint32]
Lengths = npt.NDArray[np.int64]

_SEPARATOR = "\x00\x01llmctl\x01"
"""An added token of our own between texts: one call then takes a whole batch, without the interpreter's lock, and gives one array.
gigatoken's own batch gives an awkward array, and `import awkward` alone takes 0.3 s on a Zen 1. It begins as none of its ends does,
so that none comes about where a text meets it."""
_MAX_GROWTH_BYTES = 192 << 20
"""gigatoken 0.10 remembers every word it has seen: when the process has grown by this much it is opened anew."""


class FastRefusedError(Exception):
    """gigatoken is not used for this tokenizer; the message says why."""


class FastEncoder:
    """gigatoken for one tokenizer, in the calling thread, from any number of threads at once. Open it with `open_fast`.

    `content` is a tokenizer.json, and `separator_id` an id that it does not give.
    """

    def __init__(self, content: dict[str, Any], *, separator_id: int) -> None:
        from gigatoken.gigatoken_rs import BytesSource, PadTruncate

        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        separator = {"id": separator_id, "content": _SEPARATOR, **flags}
        self._content = json_text({**content, "added_tokens": [*content["added_tokens"], separator]})
        self._separator_id = separator_id
        self.takes_joined = True
        """Whether texts that follow a separator are encoded as if they were alone: not where only the very first word gets a blank."""
        self._source, self._unpadded = BytesSource, PadTruncate(0)
        self._lock = threading.Lock()
        self._backend = _load(self._content)
        self._ceiling = _resident_bytes() + _MAX_GROWTH_BYTES

    def encode(self, texts: Sequence[bytes]) -> tuple[TokenIds, Lengths]:
        """The ids of UTF-8 texts, one after another, and how many each has. Names of special tokens are text; nothing is added."""
        if not texts:
            return np.empty(0, dtype=np.uint32), np.empty(0, dtype=np.int64)
        backend = self._bounded()
        if not self.takes_joined and len(texts) > 1:
            parts = [self._together(backend, [text]) for text in texts]
            return np.concatenate([ids for ids, _ in parts]), np.concatenate([lengths for _, lengths in parts])
        return self._together(backend, texts)

    def _together(self, backend: Any, texts: Sequence[bytes]) -> tuple[TokenIds, Lengths]:
        ids = self._row(backend, texts[0] if len(texts) == 1 else _SEPARATOR.encode().join(texts))
        is_separator = ids == self._separator_id
        places = np.flatnonzero(is_separator)
        if len(places) != len(texts) - 1:  # the separator stands in a text
            content = parsed(self._content)
            backend = _load(json_text({**content, "added_tokens": content["added_tokens"][:-1]}))
            rows = [self._row(backend, text) for text in texts]
            return np.concatenate(rows), np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
        lengths = np.diff(places, prepend=-1, append=len(ids)) - 1
        return (ids[~is_separator] if len(places) else ids), lengths

    def _row(self, backend: Any, text: bytes) -> TokenIds:
        # A matrix of one row. `encode` keeps the interpreter's lock, and any other way in or out than these imports awkward.
        matrix: TokenIds = backend.encode_batch_padded(self._source(text), self._unpadded, parallel=False)[0]
        return matrix.reshape(-1)

    def _bounded(self) -> Any:
        """The backend, opened anew when it has grown too much; who is at work with the old one goes on with it."""
        with self._lock:
            if _resident_bytes() > self._ceiling:
                self._backend = None
                self._backend = _load(self._content)
                self._ceiling = _resident_bytes() + _MAX_GROWTH_BYTES
            return self._backend


def open_fast(tokenizer: "Tokenizer") -> FastEncoder:
    """gigatoken for `tokenizer`, after its ids of odd texts were found equal. Raises FastRefusedError."""
    if importlib.util.find_spec("gigatoken") is None:
        raise FastRefusedError("it is not installed (pip install 'llmctl[fast]')")
    content = parsed(tokenizer.to_json(pretty=False))
    if content["model"].get("dropout"):
        raise FastRefusedError("its merges are drawn by chance (dropout)")
    for part in ("truncation", "padding", "post_processor"):
        content[part] = None
    # Control tokens' names are text here, as with `encode_special_tokens`; whoever wants them otherwise asks `tokenizers`.
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["special"]]
    try:
        fast = FastEncoder(content, separator_id=tokenizer.vocab_size)
    except ImportError as error:
        raise FastRefusedError(f"it cannot be imported: {error}") from error
    except Exception as error:
        raise FastRefusedError(f"it does not take this tokenizer: {' '.join(str(error).split())[:200]}") from error
    probes = odd_texts(tokenizer)
    wanted = tokenizer.encode_batch(probes, add_bos=False)
    texts = [text.encode() for text in probes]
    try:
        fast.takes_joined = _rows(fast.encode(texts)) == wanted
        found = wanted if fast.takes_joined else _rows(fast.encode(texts))
    except Exception as error:
        raise FastRefusedError(f"it fails on an odd text: {error}") from error
    for text, a, b in zip(probes, wanted, found, strict=True):
        if a != b:
            raise FastRefusedError(f"its ids differ from those of tokenizers, for instance on {text[:60]!r}")
    return fast


def rewrites_text(tokenizer: "Tokenizer") -> bool:
    """Whether a normaliser other than NFC comes before, so that special tokens' names cannot be looked for in the text itself."""
    normalizer = tokenizer.structure["normalizer"]
    return normalizer is not None and not types_in(normalizer) <= {"NFC", "Sequence"}


def _rows(encoded: tuple[TokenIds, Lengths]) -> list[list[int]]:
    ids, lengths = encoded
    return [row.tolist() for row in np.split(ids, np.cumsum(lengths)[:-1])]


def _load(content: str) -> Any:
    from gigatoken.gigatoken_rs import load_hf_json

    return load_hf_json(content)


def _resident_bytes() -> int:
    """Memory of this process; where /proc is missing, the most it ever had."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_bytes()
