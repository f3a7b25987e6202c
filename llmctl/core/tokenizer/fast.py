"""Encoding by gigatoken, a second implementation of the same tokenizers that is some thirty times as fast. Knows ids and
`Tokenizer`; knows no corpus.

It is trusted nowhere: it opens only when its ids of a set of odd texts are those of `tokenizers`, and whoever encodes a
corpus with it compares a sample as it goes (core.data.encoders). What it does not take, `tokenizers` does.
"""

import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llmctl.core.memory import peak_bytes
from llmctl.core.tokenizer.odd_texts import odd_texts
from llmctl.core.tokenizer.parts import types_in

if TYPE_CHECKING:
    from llmctl.core.tokenizer.tokenizer import Tokenizer

TokenIds = npt.NDArray[np.uint32]
Lengths = npt.NDArray[np.int64]

_SMALL_BYTES = 2048
"""Texts shorter than this on average go in one batch, whose result takes `import awkward` (0.2 s once) and then costs
less a text than a call for each (2 us)."""
_MAX_GROWTH_BYTES = 192 << 20
"""gigatoken 0.10 remembers every word it has seen: when the process has grown by this much it is opened anew."""


class FastRefusedError(Exception):
    """gigatoken is not used for this tokenizer; the message says why."""


class FastEncoder:
    """gigatoken for one tokenizer, in the calling thread. Open it with `open_fast`."""

    def __init__(self, content: str) -> None:
        self._content = content
        self._backend = _load(content)
        self._ceiling = _resident_bytes() + _MAX_GROWTH_BYTES

    def encode(self, texts: Sequence[bytes]) -> tuple[TokenIds, Lengths]:
        """The ids of UTF-8 texts, one after another, and how many each has. Names of special tokens are text; nothing is added."""
        if _resident_bytes() > self._ceiling:
            del self._backend
            self._backend = _load(self._content)
            self._ceiling = _resident_bytes() + _MAX_GROWTH_BYTES
        if len(texts) > 1 and sum(map(len, texts)) < _SMALL_BYTES * len(texts):
            layout = self._backend.encode_batch(list(texts), parallel=False).layout
            offsets = np.asarray(layout.offsets.data)
            return np.asarray(layout.content.data)[offsets[0] : offsets[-1]], np.diff(offsets)
        parts = [self._backend.encode(text) for text in texts]
        lengths = np.fromiter(map(len, parts), dtype=np.int64, count=len(parts))
        return parts[0] if len(parts) == 1 else np.concatenate([*parts, np.empty(0, dtype=np.uint32)]), lengths


def open_fast(tokenizer: "Tokenizer") -> FastEncoder:
    """gigatoken for `tokenizer`, after its ids of odd texts were found equal. Raises FastRefusedError."""
    content = json.loads(tokenizer.to_json(pretty=False))
    if content["model"].get("dropout"):
        raise FastRefusedError("its merges are drawn by chance (dropout)")
    for part in ("truncation", "padding", "post_processor"):
        content[part] = None
    # Control tokens' names are text here, as with `encode_special_tokens`; whoever wants them otherwise asks `tokenizers`.
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["special"]]
    try:
        fast = FastEncoder(json.dumps(content, ensure_ascii=False))
    except ImportError as error:
        raise FastRefusedError("it is not installed (pip install 'llmctl[fast]')") from error
    except Exception as error:
        raise FastRefusedError(f"it does not take this tokenizer: {' '.join(str(error).split())[:200]}") from error
    probes = odd_texts(tokenizer)
    wanted = tokenizer.encode_batch(probes, add_bos=False)
    try:
        found = [fast.encode([text.encode()])[0].tolist() for text in probes]
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
