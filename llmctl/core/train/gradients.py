"""The gradients of one step, micro-batch after micro-batch, with less memory when there is not enough. Knows no schedule."""

from collections.abc import Callable

import torch
from torch import Tensor

from llmctl.core.data.loader import Batch
from llmctl.core.distributed.ranks import Ranks
from llmctl.core.errors import LlmctlError
from llmctl.core.train.job import largest_part
from llmctl.core.train.objectives import Objective
from llmctl.core.train.optim import MasterOptimizer
from llmctl.core.train.parallel import Parallel
from llmctl.core.train.profile import Profile
from llmctl.core.train.sharded import ShardedOptimizer

_CPU_SAYS = ("can't allocate memory", "not enough memory", "cannot allocate memory")
"""How torch's allocator on a CPU, which raises a plain RuntimeError, says that memory is out."""


class Gradients:
    """Fills the optimizer's gradients with those of the mean loss over a batch.

    Each token's loss is divided by the count of the whole batch, so the split into micro-batches changes the result by
    rounding only. That is why a process that runs out of memory may go on with half the micro-batch.
    """

    def __init__(
        self,
        parallel: Parallel,
        objective: Objective,
        optimizer: MasterOptimizer | ShardedOptimizer,
        *,
        ranks: Ranks,
        device: torch.device,
        micro_batch_size: int,
        profile: Profile,
    ) -> None:
        self.micro_batch_size = micro_batch_size
        self._parallel, self._objective, self._optimizer, self._ranks = parallel, objective, optimizer, ranks
        self._device, self._profile = device, profile
        self._notice: str | None = None

    def take_notice(self) -> str | None:
        """What a person should know, once."""
        notice, self._notice = self._notice, None
        return notice

    def of(self, batch: Batch, stop: Callable[[], int | None]) -> tuple[Tensor, int] | None:
        """The mean loss and the number of tokens with a loss; None when a signal came between micro-batches.

        Raises LlmctlError when memory does not suffice for one sequence.
        """
        while True:
            try:
                return self._over(batch, stop)
            except (RuntimeError, MemoryError) as error:
                if not _is_out_of_memory(error):
                    raise
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            self._halve(batch, reason)  # outside of `except`, whose traceback keeps the failed attempt's tensors alive

    def _halve(self, batch: Batch, reason: str) -> None:
        size = min(self.micro_batch_size, batch.tokens.size(0))
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        if size == 1 or self._ranks.size > 1:
            means = "one sequence at a time" if size == 1 else f"micro-batches of {size}, and one of several ranks cannot go on with less"
            raise LlmctlError(
                f"out of memory with {means} ({reason}); give --gradient-checkpointing, a smaller --micro-batch-size or a shorter --seq-len"
            )
        self.micro_batch_size = size // 2
        self._notice = (
            f"out of memory with micro-batches of {size} sequences; going on with {self.micro_batch_size} at a time,"
            " the batch of a step stays the same"
        )

    def _over(self, batch: Batch, stop: Callable[[], int | None]) -> tuple[Tensor, int] | None:
        rows = batch.tokens.size(0)
        size = largest_part(rows, self.micro_batch_size)
        with self._profile.phase("data"):
            parts = [_rows_of(batch, start, min(rows, start + size), self._device) for start in range(0, rows, size)]
            total_weight = self._ranks.total(sum(self._objective.weight_of(part) for part in parts))
        self._optimizer.zero_gradients()
        loss: Tensor | None = None
        for part in parts:
            if stop() is not None:
                return None
            with self._parallel.micro_batch(last=part is parts[-1]):
                with self._profile.phase("forward"):
                    part_loss = self._parallel.loss(part, total_weight=max(1.0, total_weight))
                with self._profile.phase("backward"):
                    part_loss.backward()  # type: ignore[no-untyped-call]
            self._optimizer.collect()
            loss = part_loss.detach() if loss is None else loss + part_loss.detach()
        assert loss is not None
        return self._ranks.sum(loss), int(total_weight)


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in str(error).lower() for words in _CPU_SAYS)


def _rows_of(batch: Batch, start: int, end: int, device: torch.device) -> Batch:
    lengths = batch.document_lengths[start:end] if batch.document_lengths is not None else None
    return Batch(batch.tokens[start:end].to(device), batch.targets[start:end].to(device), lengths, batch.first_sample + start)
