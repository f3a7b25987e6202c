"""What `--tokenizer` may name: what `--model` may, and a tokenizer.json. Loads no torch: a tokenizer needs none."""

from pathlib import Path
from typing import TYPE_CHECKING

from llmctl.core.errors import NotFoundError

if TYPE_CHECKING:
    from llmctl.core.tokenizer import Tokenizer


def open_tokenizer(reference: str) -> "Tokenizer":
    """The tokenizer of a folder, a tokenizer.json, or of whatever `--model` takes.

    Raises NotFoundError and InputError as Tokenizer.load and checkpoint.resolve_model do.
    """
    from llmctl.core.tokenizer import Tokenizer

    path = Path(reference)
    if path.suffix == ".json" and not path.exists():
        raise NotFoundError(f"--tokenizer {reference}: no such file")
    if path.is_dir() or path.suffix == ".json":
        return Tokenizer.load(path)
    from llmctl.core.checkpoint import load_tokenizer, resolve_model

    return load_tokenizer(resolve_model(reference))
