"""Stop strings over a text that arrives in pieces. Knows strings; knows no token and no model."""

from collections.abc import Sequence


class StopMatcher:
    """Finds the first stop string in a growing text and holds back what may be the beginning of one.

    "First" is the one that ends first, and of those the longest: what a reader who goes character by character would
    see, so the result does not depend on how the text is cut into pieces. The stop string itself is not given out.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if any(not stop for stop in stops):
            raise ValueError("a stop string is empty")
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None
        """The stop string that was found, if any."""

    def push(self, piece: str) -> str:
        """Take the next piece; give what is now certain to come before any stop string."""
        if self.matched is not None:
            return ""
        if not self._stops:
            return piece
        text = self._held + piece
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            _, start, self.matched = min(found)
            self._held = ""
            return text[:start]
        num_held = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def finish(self) -> str:
        """The text has ended: give what was held back."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
