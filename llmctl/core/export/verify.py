"""Reads a result back, with the program that it is for where that is at hand, and compares logits. Knows readers; writes nothing."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmctl.core.checkpoint import load_model, load_tokenizer
from llmctl.core.errors import LlmctlError
from llmctl.core.model import Decoder
from llmctl.core.tokenizer import Tokenizer

NUM_TOKENS = 64
_TOLERANCE = 2e-4
"""Of the largest logit: float32 sums in another order differ by less, a wrong weight by far more."""
_TEXTS = ("The quick brown fox jumps over the lazy dog.", "  Zwölf Boxkämpfer: 3,14 € \n\tjagen 'Viktor'!", "日本語 😀 def f(x): return x")


@dataclass(frozen=True)
class Compared:
    """Largest differences of a logit, and the share of places with the same most likely token."""

    largest: float
    rounding: float
    same_argmax: float


def probe(vocab_size: int, max_positions: int) -> Tensor:
    """(1, T) ids to compare logits on: a fixed choice among all."""
    length = min(NUM_TOKENS, max_positions)
    return torch.from_numpy(np.random.Generator(np.random.Philox(0)).integers(0, vocab_size, (1, length)))


def logits_of(model: Decoder, tokens: Tensor) -> Tensor:
    """(1, T, V) float32."""
    with torch.inference_mode():
        logits: Tensor = model(tokens).float()
    return logits


def compare(found: Tensor, intended: Tensor, source: Tensor, *, reader: str) -> Compared:
    """Raises LlmctlError when what was read back is not what was meant to be written."""
    largest = float((found - intended).abs().max())
    scale = max(1.0, float(intended.abs().max()))
    if not largest <= _TOLERANCE * scale:
        raise LlmctlError(
            f"verification failed: {reader} reads the result back with logits that differ by up to {largest:.3g}"
            f" (they reach {scale:.3g}); nothing was kept. This is a fault of llmctl: please report it"
        )
    same = float((found.argmax(-1) == source.argmax(-1)).float().mean())
    return Compared(largest, float((intended - source).abs().max()), same)


def read_by_transformers(folder: Path, tokens: Tensor, tokenizer: Tokenizer | None) -> Tensor:
    """Logits (1, T, V) float32 of transformers' model; its tokenizer must give our ids. Raises LlmctlError when not."""
    with _quiet_transformers():
        import transformers

        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        model.eval()
        with torch.inference_mode():
            logits: Tensor = model(tokens).logits.float()
        if tokenizer is not None:
            theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            check_ids(tokenizer, [theirs(text)["input_ids"] for text in _TEXTS], reader="transformers")
    return logits


def read_by_us(path: Path, tokens: Tensor, tokenizer: Tokenizer | None) -> Tensor:
    """Logits (1, T, V) float32 of our own reader; the tokenizer that it reads must give the same ids and chats."""
    logits = logits_of(load_model(path, dtype=torch.float32).model, tokens)
    if tokenizer is not None:
        again = load_tokenizer(path)
        check_ids(tokenizer, again.encode_batch(_TEXTS), reader="llmctl")
        if again.chat_template != tokenizer.chat_template:
            raise LlmctlError("verification failed: the chat template did not come back as it was; nothing was kept")
    return logits


def check_ids(tokenizer: Tokenizer, found: Sequence[Sequence[int]], *, reader: str) -> None:
    """Raises LlmctlError when `found` are not the ids of the sample texts."""
    for text, ids, wanted in zip(_TEXTS, found, tokenizer.encode_batch(_TEXTS), strict=True):
        if list(ids) != wanted:
            raise LlmctlError(f"verification failed: {reader}'s tokenizer gives other ids for {text!r}; nothing was kept")


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """transformers without its bars and notes on stderr."""
    before = os.environ.get("TRANSFORMERS_VERBOSITY")
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    try:
        from transformers.utils import logging

        chatter: Any = logging
        level = chatter.get_verbosity()
        chatter.set_verbosity_error()
        chatter.disable_progress_bar()
        try:
            yield
        finally:
            chatter.set_verbosity(level)
            chatter.enable_progress_bar()
    finally:
        if before is None:
            os.environ.pop("TRANSFORMERS_VERBOSITY", None)
        else:
            os.environ["TRANSFORMERS_VERBOSITY"] = before
