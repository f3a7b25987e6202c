"""Loss on held-out data while a model trains. Knows a decoder and a source of samples; knows no loop.

Shapes: B rows, T tokens a row.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llmctl.core.data.loader import IGNORE, SampleSource, batch_at
from llmctl.core.distributed.ranks import Ranks
from llmctl.core.model import Decoder
from llmctl.core.train.objectives import token_losses


@dataclass(frozen=True)
class HeldOut:
    """What to evaluate on. `token_bytes` (V,) gives the bytes of text of each id, for bits per byte; None leaves that out."""

    source: SampleSource
    batch_size: int
    token_bytes: Tensor | None = None


@dataclass(frozen=True)
class HeldOutLoss:
    """Mean loss in nats a token, bits a byte (None without byte counts), and what was counted."""

    loss: float
    bits_per_byte: float | None
    num_tokens: int
    num_bytes: int | None
    elapsed_s: float


class Stopped(Exception):
    """A stop signal came during an evaluation."""


@torch.no_grad()
def evaluate(
    model: Decoder, held_out: HeldOut, *, max_tokens: int, stop: Callable[[], int | None], ranks: Ranks | None = None
) -> HeldOutLoss:
    """Evaluate on whole samples from the first on, until all are done or `max_tokens` are reached (one sample at least).

    Sums are float64. The ranks take batches in turn and add up in the order of batches, so that any number of them gives
    the same numbers. Raises Stopped when `stop`, on which they agree, gives a signal between batches.
    """
    started, ranks = time.perf_counter(), ranks or Ranks()
    spans = list(_spans(held_out, max_tokens))
    found = torch.zeros(len(spans), 3, dtype=torch.float64)  # sum of losses, tokens, bytes of each batch
    for start in range(0, len(spans), ranks.data_size):
        if stop() is not None:
            raise Stopped
        number = start + ranks.data_rank
        first, rows = spans[min(number, len(spans) - 1)]  # one with nothing left must still help where a model is spread
        batch = batch_at(held_out.source, first, rows)
        targets = batch.targets.to(model.device)
        hidden = model.hidden(batch.tokens.to(model.device), document_lengths=batch.document_lengths)
        loss = token_losses(model, hidden, targets).double().sum()
        if number >= len(spans):
            continue
        found[number, 0] = loss
        counted = batch.targets[batch.targets != IGNORE]
        found[number, 1] = counted.numel()
        if held_out.token_bytes is not None:
            found[number, 2] = held_out.token_bytes[counted].sum()
    losses, tokens, sizes = ranks.sum(found).T.tolist()
    total, num_tokens, num_bytes = sum(losses), int(sum(tokens)), int(sum(sizes))
    bits = total / math.log(2) / num_bytes if num_bytes else None
    return HeldOutLoss(
        total / max(1, num_tokens),
        bits,
        num_tokens,
        num_bytes if held_out.token_bytes is not None else None,
        time.perf_counter() - started,
    )


def _spans(held_out: HeldOut, max_tokens: int) -> Iterator[tuple[int, int]]:
    """(first sample, rows) of each batch."""
    num_samples = held_out.source.samples_per_epoch
    if num_samples is None:
        raise ValueError("a held-out source has an end")
    num_samples = min(num_samples, max(1, max_tokens // held_out.source.seq_len))
    for first in range(0, num_samples, held_out.batch_size):
        yield first, min(held_out.batch_size, num_samples - first)
