"""What the engine asks of a model: one small protocol, behind which torch or native code computes.

Legend: B rows of a call, T tokens a row, V vocabulary size.
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Executor(Protocol):
    """A model with a cache of slots, each holding the keys and values of one text."""

    @property
    def vocab_size(self) -> int:
        """Length of a row of logits."""

    @property
    def max_positions(self) -> int:
        """The longest text, prompt and answer together, in tokens."""

    def reserve(self, *, num_slots: int, capacity: int) -> None:
        """Have at least `num_slots` slots of at least `capacity` tokens; texts in slots stay where they are.

        Raises MemoryError when there is no room; the slots are then as they were.
        """

    def release(self) -> None:
        """Give all slots back, texts and memory."""

    def step(
        self,
        tokens: NDArray[np.int64],
        positions: NDArray[np.int64],
        slots: NDArray[np.int64],
        *,
        lengths: NDArray[np.int64] | None = None,
        all_logits: bool = False,
    ) -> NDArray[np.float32]:
        """Feed `tokens` (B, T): row b goes to positions[b], positions[b] + 1, ... of slot slots[b] and sees what lies before.

        `positions` and `slots` are (B,), slots distinct. `lengths` (B,) says how many tokens of each row count, from 1 to
        T; the rest is padding that leaves no trace. What a slot holds from positions[b] on is forgotten, so a smaller
        position takes tokens back. Returns the logits after each row's last token, (B, V) float32, or after each token,
        (B, T, V), where those of padding mean nothing. Raises MemoryError when there is no room to compute.
        """

    def copy_slot(self, source: int, *, to: int, length: int) -> None:
        """Make slot `to` hold the first `length` tokens of slot `source`."""
