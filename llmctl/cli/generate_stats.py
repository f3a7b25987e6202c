"""`--stats`: how fast it went and how much memory it took. Knows clocks and the process; knows no model."""

import sys
import time
from typing import TYPE_CHECKING

from llmctl.cli.shell import stderr_line
from llmctl.core.memory import peak_bytes

if TYPE_CHECKING:
    from llmctl.core.infer.speculate import Speculator


class Stats:
    """Times of one command, from its making on. Everything is told on stderr, by `tell`."""

    def __init__(self) -> None:
        self._made_s = time.monotonic()
        self._started_s = self._first_s = self._last_s = self._made_s
        self._num_prompt_tokens = self._num_new_tokens = 0

    def start(self, *, num_prompt_tokens: int = 0) -> None:
        """The model is loaded, the work on the prompt begins."""
        self._started_s = time.monotonic()
        self._num_prompt_tokens = num_prompt_tokens

    def token(self) -> None:
        """A token came."""
        self._last_s = time.monotonic()
        if self._num_new_tokens == 0:
            self._first_s = self._last_s
        self._num_new_tokens += 1

    def tell(self, speculator: "Speculator | None" = None) -> None:
        """Three lines for one prompt: the prompt's speed is that up to the first token, the other's after it."""
        if self._num_new_tokens:
            first_s = self._first_s - self._started_s
            stderr_line(f"prompt: {self._num_prompt_tokens:,} tokens{_rate(self._num_prompt_tokens, first_s)}")
            rate = _rate(self._num_new_tokens - 1, self._last_s - self._first_s)
            stderr_line(f"answer: {self._num_new_tokens:,} tokens{rate}")
            stderr_line(f"first token: {first_s:.3f} s, after {self._started_s - self._made_s:.3f} s of loading")
        _tell_drafts(speculator)
        stderr_line(f"peak memory: {peak_memory()}")

    def tell_turn(self) -> None:
        """Two lines for one answer of a talk, whose prompt was mostly read before."""
        if self._num_new_tokens:
            rate = _rate(self._num_new_tokens - 1, self._last_s - self._first_s)
            stderr_line(f"answer: {self._num_new_tokens:,} tokens{rate}; the first after {self._first_s - self._started_s:.3f} s")
        stderr_line(f"peak memory: {peak_memory()}")

    def tell_batch(self, *, num_prompt_tokens: int, num_new_tokens: int, speculator: "Speculator | None" = None) -> None:
        """The same of many rows, whose prompts and answers were computed side by side: speeds over the whole time."""
        elapsed_s = time.monotonic() - self._started_s
        stderr_line(f"prompts: {num_prompt_tokens:,} tokens{_rate(num_prompt_tokens, elapsed_s)}")
        stderr_line(f"answers: {num_new_tokens:,} tokens{_rate(num_new_tokens, elapsed_s)}")
        stderr_line(f"time: {elapsed_s:.3f} s, after {self._started_s - self._made_s:.3f} s of loading")
        _tell_drafts(speculator)
        stderr_line(f"peak memory: {peak_memory()}")


def _tell_drafts(speculator: "Speculator | None") -> None:
    """How many guessed tokens came true, where any were made."""
    if speculator is not None and speculator.num_drafted:
        share = speculator.num_accepted / speculator.num_drafted
        stderr_line(f"guessed ahead: {speculator.num_drafted:,} tokens, {speculator.num_accepted:,} came true ({share:.0%})")


def _rate(num_tokens: int, elapsed_s: float) -> str:
    return f", {num_tokens / elapsed_s:,.1f} tokens/s" if num_tokens > 0 and elapsed_s > 0 else ""


def peak_memory() -> str:
    """The most memory that the process held at once, and of a GPU's if one was used, in MB of a million bytes."""
    text = f"{peak_bytes() / 1e6:,.0f} MB"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        text += f", {torch.cuda.max_memory_allocated() / 1e6:,.0f} MB on the GPU"
    return text
