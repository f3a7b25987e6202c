"""Text to ids and back, chat templates, and the training of new tokenizers. Knows no model.

Names are resolved on first use: who only encodes needs no trainer.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmctl.core.tokenizer.chatml import CHATML_TEMPLATE, CHATML_TOKENS
    from llmctl.core.tokenizer.intake import CorpusRead
    from llmctl.core.tokenizer.stream import StreamDecoder
    from llmctl.core.tokenizer.tokenizer import Tokenizer
    from llmctl.core.tokenizer.train import TokenizerTrained, train_tokenizer

__all__ = ["CHATML_TEMPLATE", "CHATML_TOKENS", "CorpusRead", "StreamDecoder", "Tokenizer", "TokenizerTrained", "train_tokenizer"]

_HOMES = {
    "chatml": ("CHATML_TEMPLATE", "CHATML_TOKENS"),
    "intake": ("CorpusRead",),
    "stream": ("StreamDecoder",),
    "tokenizer": ("Tokenizer",),
    "train": ("TokenizerTrained", "train_tokenizer"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
