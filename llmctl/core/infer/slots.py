"""The slots of a cache: how many of which length fit, what they hold, which one a text gets. Knows an executor; chooses no token."""

from collections.abc import Mapping, Sequence

from llmctl.core.infer.executor import Executor
from llmctl.core.infer.prefixes import common_length
from llmctl.core.infer.sequence import TextUnderWay


class Slots:
    """Slots of one length, `num_slots` of them at most, and no more than `num_tokens` in all of them where that is given.

    They grow in number and length while texts are in them. To become fewer or shorter they must be empty, so a text that
    the budget leaves no room for waits until those under way are done; one that is longer than the budget gets a single slot.
    """

    def __init__(self, executor: Executor, *, num_slots: int, num_tokens: int | None, share_prefixes: bool) -> None:
        self._executor, self._share_prefixes = executor, share_prefixes
        self.num_slots, self._num_tokens = num_slots, num_tokens
        self._reserved = self._capacity = 0  # slots, and tokens in each
        self._attempted = num_slots  # slots that were reserved last, or could not be
        self.cached: list[list[int]] = []
        """For each slot the tokens whose keys and values it holds."""

    def give(self, text: TextUnderWay, active: Mapping[int, TextUnderWay]) -> int | None:
        """A free slot of which `num_fed` tokens are the text's: the one that holds most of its beginning, else the lowest.

        None when texts of `active` must end first. Raises MemoryError.
        """
        if not self._make_room(text.max_length, active):
            return None
        free = [slot for slot in range(self._reserved) if slot not in active]
        shared = {slot: common_length(self.cached[slot], text.tokens) for slot in free} if self._share_prefixes else {}
        slot = max(free, key=lambda s: (shared.get(s, 0), -s))
        text.num_fed = min(shared.get(slot, 0), len(text.tokens) - 1)  # the last token is always fed: its logits are needed
        del self.cached[slot][text.num_fed :]
        return slot

    def longest_beginning(self, slot: int, tokens: Sequence[int], limit: int) -> tuple[int, int]:
        """The other slot that holds most of the first `limit` tokens, and how many."""
        others = ((s, common_length(held, list(tokens), limit)) for s, held in enumerate(self.cached) if s != slot)
        return max(others, key=lambda found: found[1], default=(slot, 0))

    def copy(self, source: int, *, to: int, length: int) -> None:
        """Make a slot hold the beginning of another."""
        self._executor.copy_slot(source, to=to, length=length)
        self.cached[to] = self.cached[source][:length]

    def halve(self) -> tuple[int, int]:
        """After memory ran out: empty all slots and allow half as many; how many it were and are."""
        before = self._attempted
        self._release()
        self.num_slots = max(1, before // 2)
        return before, self.num_slots

    def _release(self) -> None:
        self._executor.release()
        self.cached, self._reserved, self._capacity = [], 0, 0

    def _allowed(self, capacity: int) -> int:
        """How many slots of that length there may be."""
        return self.num_slots if self._num_tokens is None else max(1, min(self.num_slots, self._num_tokens // capacity))

    def _make_room(self, length: int, active: Mapping[int, TextUnderWay]) -> bool:
        """Have a free slot of `length` tokens; False when there is none before texts end."""
        needed = max(length, *(text.max_length for text in active.values())) if active else length
        if 2 * needed <= self._capacity and self._allowed(needed) >= 2 * self._reserved:
            if active:  # slots made for a long text leave room for few: start anew once they are empty
                return False
            self._release()
        if length <= self._capacity and len(active) < self._reserved:
            return True
        capacity = max(length, self._capacity)
        if capacity > self._capacity > 0:  # doubling keeps the copies of a growing batch few
            doubled = min(max(length, 2 * self._capacity), self._executor.max_positions)
            capacity = doubled if self._num_tokens is None or self._reserved * doubled <= self._num_tokens else length
        if self._reserved > self._allowed(capacity):
            if active:
                return False
            self._release()
            capacity = length
        wanted = max(self._reserved, self._allowed(capacity))
        if wanted == self._reserved and capacity == self._capacity:
            return False
        self._attempted = wanted
        self._executor.reserve(num_slots=wanted, capacity=capacity)
        self.cached += [[] for _ in range(wanted - len(self.cached))]
        self._reserved, self._capacity = wanted, capacity
        return len(active) < wanted
