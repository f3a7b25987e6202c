"""Tables of tokenizers kept in files (core/cachefiles.py), so that a start need not read a tokenizer.json. Knows folders and files."""

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmctl.core.cachefiles import FILLER, directory, identity, keep, name_of, sha256_of
from llmctl.core.errors import LlmctlError
from llmctl.core.tensorfile import TensorFile
from llmctl.core.tokenizer import Tokenizer

Named = dict[str, Any]

SMALLEST_BYTES = 512 << 10
"""A smaller tokenizer.json is read in less time than makes the trouble of a second file worth it."""
_FORMAT = 1
_READ = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
)
"""What a tokenizer is read from. One that appears or goes makes another tokenizer too."""


def key_of(folder: Path, *, smallest_bytes: int = SMALLEST_BYTES) -> str | None:
    """The name of the file for the tokenizer of a model directory; None where none is kept."""
    try:
        if directory() is None or (folder / _READ[0]).stat().st_size < smallest_bytes:
            return None
        files = [identity(folder / name) if (folder / name).exists() else None for name in _READ]
    except OSError:
        return None
    return name_of({"tokenizer": _FORMAT, "files": files})


def load_kept(key: str, *, reopen: Callable[[], Tokenizer]) -> Tokenizer | None:
    """The tokenizer of a key, by its tables; None when there are none, or none that are whole. `reopen` reads it from its files."""
    import numpy as np

    from llmctl.core.tokenizer.tabulated import TabulatedTokenizer

    folder = directory()
    if folder is None:
        return None
    path = folder / key
    try:
        file = TensorFile(path)
        entries = [entry for entry in file.entries.values() if not entry.name.startswith(FILLER)]
        tables = {entry.name: np.frombuffer(file.buffer, np.uint8, entry.num_bytes, entry.start) for entry in entries}
        facts = file.metadata["facts"]
        if sha256_of({facts: np.empty(0, np.uint8), **tables}) != file.metadata["sha256"]:
            return None
        os.utime(path)
        return TabulatedTokenizer(json.loads(facts), {name: table.data for name, table in tables.items()}, reopen=reopen)
    except (LlmctlError, OSError, ValueError, KeyError, TypeError):
        return None


def keep_tokenizer(key: str, tokenizer: Tokenizer, *, named: Named) -> str | None:
    """Make tables of a tokenizer that was just read from its files, and keep them. Gives why they are not kept, or None.

    A tokenizer that there are no tables for is remembered as well, so that it is not tried at each start.
    """
    import numpy as np

    from llmctl.core.tokenizer.tabulate import NotTabulatedError, tabulate

    folder = directory()
    if folder is None or (folder / key).exists():
        return None
    refused = None
    try:
        made, tables = tabulate(tokenizer)
        facts = json.dumps({**made, "named": named})
    except (NotTabulatedError, LlmctlError, KeyError, ValueError, TypeError) as error:
        refused, tables = f"{type(error).__name__}: {error}", {}
        facts = json.dumps({"refused": refused})
    metadata = {"facts": facts, "sha256": sha256_of({facts: np.empty(0, np.uint8), **tables})}
    num_bytes = sum(table.nbytes for table in tables.values())
    return keep(key, lambda: (dict(tables), metadata), num_bytes=num_bytes, what="tables of a tokenizer") or refused


def _named(tokenizer: Tokenizer) -> Named:
    """What the configs beside tokenizer.json say. Taken before anybody puts another chat template there."""
    return {
        "bos": tokenizer.bos_token,
        "eos": tokenizer.eos_token,
        "pad": tokenizer.pad_token,
        "chat_template": tokenizer.chat_template,
        "model_max_length": tokenizer.model_max_length,
    }


def tokenizer_of(folder: Path, *, smallest_bytes: int = SMALLEST_BYTES) -> Tokenizer:
    """The tokenizer of a model directory, by its tables where they are kept. Else they are made beside what comes next; the process
    ends when both are done. Raises what Tokenizer.load does.
    """
    key = key_of(folder, smallest_bytes=smallest_bytes)
    found = None if key is None else load_kept(key, reopen=lambda: Tokenizer.load(folder))
    if found is not None:
        return found
    tokenizer = Tokenizer.load(folder)
    if key is not None:
        how = {"named": _named(tokenizer)}
        threading.Thread(target=keep_tokenizer, args=(key, tokenizer), kwargs=how, name="llmctl tokenizer", daemon=False).start()
    return tokenizer
