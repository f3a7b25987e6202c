"""Models in and out: Hugging Face directories and GGUF files. Knows families and files; knows no training and no command.

Names are resolved on first use: finding a model, reading its config and its tokenizer need no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmctl.core.checkpoint.folder import (
        check_tokenizer,
        check_trainable,
        load_config,
        load_tokenizer,
        own_layout,
        read_generation,
        stated_license,
        token_ids,
        unknown_architecture,
    )
    from llmctl.core.checkpoint.load import LoadedModel, assemble, load_model, load_model_and_tokenizer
    from llmctl.core.checkpoint.quantised import save_quantised
    from llmctl.core.checkpoint.resolve import resolve_adapted, resolve_model
    from llmctl.core.checkpoint.save import MAX_SHARD_BYTES, hf_tensors, save_adapter, save_model
    from llmctl.core.checkpoint.stored import stored_arrays, stored_tensors

__all__ = [
    "MAX_SHARD_BYTES",
    "LoadedModel",
    "assemble",
    "check_tokenizer",
    "check_trainable",
    "hf_tensors",
    "load_config",
    "load_model",
    "load_model_and_tokenizer",
    "load_tokenizer",
    "own_layout",
    "read_generation",
    "resolve_adapted",
    "resolve_model",
    "save_adapter",
    "save_model",
    "save_quantised",
    "stated_license",
    "stored_arrays",
    "stored_tensors",
    "token_ids",
    "unknown_architecture",
]

_HOMES = {
    "folder": (
        "check_tokenizer",
        "check_trainable",
        "load_config",
        "load_tokenizer",
        "own_layout",
        "read_generation",
        "stated_license",
        "token_ids",
        "unknown_architecture",
    ),
    "load": ("LoadedModel", "assemble", "load_model", "load_model_and_tokenizer"),
    "quantised": ("save_quantised",),
    "resolve": ("resolve_adapted", "resolve_model"),
    "save": ("MAX_SHARD_BYTES", "hf_tensors", "save_adapter", "save_model"),
    "stored": ("stored_arrays", "stored_tensors"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
