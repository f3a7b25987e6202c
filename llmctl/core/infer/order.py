"""Things that come in any order, given out in their own. Knows nothing of what they are."""

from typing import Generic, TypeVar

ItemT = TypeVar("ItemT")


class InOrder(Generic[ItemT]):
    """Holds items back until all before them have come."""

    def __init__(self) -> None:
        self._held: dict[int, ItemT] = {}
        self._next = 0

    def put(self, place: int, item: ItemT) -> list[ItemT]:
        """Take the item of `place` (0, 1, 2, ..., each once); give those whose turn has come, this one among them or not."""
        self._held[place] = item
        due = []
        while self._next in self._held:
            due.append(self._held.pop(self._next))
            self._next += 1
        return due
