"""What identifies a model's scores: a hash over its files. Knows files; loads nothing."""

import hashlib
from pathlib import Path

from llmctl.core.files import sha256_file
from llmctl.core.tokenizer import Tokenizer


def model_sha256(path: Path, tokenizer: Tokenizer, *, adapter: Path | None = None) -> str:
    """64 hex digits over weights, config.json, adapter and the tokenizer used. Reads the files whole: a file's date proves nothing."""
    digest = hashlib.sha256(tokenizer.fingerprint.encode())
    files = [path]
    if path.is_dir():
        files = sorted([path / "config.json", *path.glob("*.safetensors"), *path.glob("*.safetensors.index.json")])
    if adapter is not None:
        files += [adapter / "adapter_config.json", adapter / "adapter_model.safetensors"]
    for file in files:
        if file.is_file():
            digest.update(f"\n{file.name if path.is_dir() else ''} {sha256_file(file)}".encode())
    return digest.hexdigest()
