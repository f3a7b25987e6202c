"""The torch decoder and the arithmetic about it. Knows ModelConfig; knows no family, file or tokenizer.

Names are resolved on first use, so that `llmctl.core.model.facts` and `.shapes` can be imported without torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmctl.core.model.cache import KVCache
    from llmctl.core.model.decoder import Decoder

__all__ = ["Decoder", "KVCache"]


def __getattr__(name: str) -> Any:
    if name == "Decoder":
        from llmctl.core.model.decoder import Decoder

        return Decoder
    if name == "KVCache":
        from llmctl.core.model.cache import KVCache

        return KVCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
