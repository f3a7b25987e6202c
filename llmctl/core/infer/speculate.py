"""Lossless speculation: guesses of the tokens that come next, and when they pay. Knows tokens and chances; knows no model.

A guess, a draft, is fed together with the last token of its text. The text then chooses token by token from the logits
that come back, with its own uniform numbers, as it would have without drafts: a draft that is what was chosen has saved a
call, and the first one that is not ends the row. So drafts change the number of calls and never the text.

Prompt lookup (Saxena 2023; Yang et al. 2023, arXiv 2304.04487) guesses that what followed the last tokens where they stood
before, in the prompt or the answer, follows again.
"""

from collections.abc import Sequence
from typing import Protocol
from weakref import WeakKeyDictionary

from llmctl.core.infer.sequence import TextUnderWay

MAX_DRAFTS = 15
"""So many drafts of one text are fed at once at most, unless a number is asked for."""

_SHORTEST_MATCH, _LONGEST_MATCH = 2, 16
_NUM_PLACES = 8
"""So many of the latest places where the last two tokens stood before are looked at."""
_GRADES = ((10, 0.85), (6, 0.75), (4, 0.6), (3, 0.45), (2, 0.3))
"""(tokens that match, at least; share of drafts taken to come true until it was measured)."""
_FORCED_SHARE = 0.95
"""What a grammar forces comes true, unless the model cuts the characters into other tokens."""
_WEIGHT, _FORGETTING = 0.15, 0.005
"""What one draft moves a measured share, and what time brings it back, so that what did not pay is tried again at times."""

Group = Sequence[tuple[int, TextUnderWay]]
"""Texts to be decoded together, each with its slot."""


class Drafter(Protocol):
    """Where drafts come from."""

    def cost(self, num_texts: int) -> float:
        """What making one draft costs where so many texts are decoded, in units of the model's call for one token."""

    def chances(self, text: TextUnderWay, limit: int) -> list[float]:
        """For each draft that can be had, `limit` at most: the chance that it and all before it come true."""

    def drafts(self, group: Group, lengths: Sequence[int]) -> list[list[int]]:
        """So many drafts for each text, or fewer."""

    def note(self, text: TextUnderWay, num_drafted: int, num_accepted: int) -> None:
        """Learn how the last drafts of a text fared."""

    def release(self) -> None:
        """Give memory back."""


class Speculator:
    """Decides how many drafts each text gets.

    `num_tokens` None: as many as pay, by what came true so far and by `token_cost`, what one more token in a call costs in
    units of a call for one token. A number: so many, wherever there are drafts.
    """

    def __init__(self, drafter: Drafter, *, token_cost: float, num_tokens: int | None = None) -> None:
        self._drafter, self._token_cost, self._num_tokens = drafter, token_cost, num_tokens
        self.num_drafted = self.num_accepted = 0
        """Drafts that were fed, and those that came true."""
        self._forced: set[TextUnderWay] = set()  # texts whose last drafts came from their grammar

    def drafts(self, group: Group) -> list[list[int]]:
        """Drafts for each text of a group whose last tokens are to be fed; an empty list is none."""
        most = MAX_DRAFTS if self._num_tokens is None else self._num_tokens
        limits = [min(most, text.num_left - 1) for _, text in group]
        forced = [
            text.constrained.forced()[:limit] if text.constrained is not None and limit > 0 else []
            for (_, text), limit in zip(group, limits, strict=True)
        ]
        chances = [
            [_FORCED_SHARE ** (i + 1) for i in range(len(tokens))] if tokens else self._drafter.chances(text, limit) if limit > 0 else []
            for (_, text), tokens, limit in zip(group, forced, limits, strict=True)
        ]
        if self._num_tokens is None:
            lengths = draft_lengths(chances, token_cost=self._token_cost, draft_cost=self._drafter.cost(len(group)))
        else:
            lengths = [len(row) for row in chances]
        if not any(lengths):
            return [[]] * len(group)
        self._forced = {text for (_, text), tokens in zip(group, forced, strict=True) if tokens}
        guessed = self._drafter.drafts(group, [0 if tokens else length for tokens, length in zip(forced, lengths, strict=True)])
        drafts = [tokens[:length] if tokens else row for tokens, length, row in zip(forced, lengths, guessed, strict=True)]
        return [
            row if text.constrained is None or not row else row[: text.constrained.num_valid(row)]
            for row, (_, text) in zip(drafts, group, strict=True)
        ]

    def note(self, text: TextUnderWay, num_drafted: int, num_accepted: int) -> None:
        """Count how drafts fared."""
        self.num_drafted += num_drafted
        self.num_accepted += num_accepted
        if text not in self._forced:
            self._drafter.note(text, num_drafted, num_accepted)

    def release(self) -> None:
        """Give memory back."""
        self._drafter.release()


def draft_lengths(chances: Sequence[Sequence[float]], *, token_cost: float, draft_cost: float = 0.0) -> list[int]:
    """How many drafts of each row give the most tokens a time. `chances[r][i]`: that drafts 0 to i of row r all come true.

    A call of n tokens is taken to cost 1 + (n - 1) * token_cost, and each draft draft_cost before it. Drafts are taken in
    the order of their chances, as long as one more raises the ratio of expected tokens to cost.
    """
    lengths = [0] * len(chances)
    tokens, cost = float(len(chances)), 1 + (len(chances) - 1) * token_cost
    one_more = token_cost + draft_cost
    for chance, _, row in sorted(((c, -i, r) for r, of_row in enumerate(chances) for i, c in enumerate(of_row)), reverse=True):
        if chance * cost <= one_more * tokens:
            break
        lengths[row] += 1
        tokens, cost = tokens + chance, cost + one_more
    return lengths


class Share:
    """The share of drafts that come true, measured, later ones counting more."""

    def __init__(self, expected: float) -> None:
        self._expected = self.value = expected

    def note(self, *, came_true: bool) -> None:
        """One draft more."""
        self.value += _WEIGHT * (came_true - self.value)

    def fade(self) -> None:
        """Time passes."""
        self.value += _FORGETTING * (self._expected - self.value)


class PromptLookup:
    """Drafts from the text itself: what followed the longest match of its last tokens. See `Drafter`."""

    def __init__(self) -> None:
        self._indices: WeakKeyDictionary[TextUnderWay, _Index] = WeakKeyDictionary()

    def cost(self, num_texts: int) -> float:
        """Next to nothing."""
        return 0.0

    def chances(self, text: TextUnderWay, limit: int) -> list[float]:
        """Chances by the length of the match, which grows with each draft that comes true."""
        index = self._indices.get(text)
        if index is None:
            index = self._indices[text] = _Index()
        return index.chances(text.tokens, limit)

    def drafts(self, group: Group, lengths: Sequence[int]) -> list[list[int]]:
        """What stands behind the matches that `chances` found."""
        return [self._indices[text].drafts(text.tokens, length) if length else [] for (_, text), length in zip(group, lengths, strict=True)]

    def note(self, text: TextUnderWay, num_drafted: int, num_accepted: int) -> None:
        """Measure the shares of the text."""
        self._indices[text].note(num_drafted, num_accepted)

    def release(self) -> None:
        """There is nothing to give back."""


class _Index:
    """Where each pair of tokens stands in one text, and how drafts from matches of each length fared."""

    def __init__(self) -> None:
        self._ends: dict[tuple[int, int], list[int]] = {}
        self._num_indexed = 1
        self._shares = [Share(expected) for _, expected in _GRADES]
        self._end = self._matched = 0

    def chances(self, tokens: list[int], limit: int) -> list[float]:
        places = self._places(tokens)
        self._end, self._matched = self._longest(tokens, places)
        if not self._matched:
            return []
        self._share(0).fade()
        chance, chances = 1.0, []
        for i in range(limit):
            chance *= self._share(i).value
            chances.append(chance)
        return chances

    def drafts(self, tokens: list[int], length: int) -> list[int]:
        drafts: list[int] = []
        for place in range(self._end + 1, self._end + 1 + length):
            # beyond the end of the text its continuation is read: what repeats itself goes on doing so
            drafts.append(tokens[place] if place < len(tokens) else drafts[place - len(tokens)])
        return drafts

    def note(self, num_drafted: int, num_accepted: int) -> None:
        for i in range(min(num_drafted, num_accepted + 1)):
            self._share(i).note(came_true=i < num_accepted)

    def _share(self, num_ahead: int) -> Share:
        matched = self._matched + num_ahead
        return next(share for share, (least, _) in zip(self._shares, _GRADES, strict=True) if matched >= least)

    def _places(self, tokens: list[int]) -> list[int]:
        """Where the last two tokens stood before, by the place of the second; the text's new tokens are entered afterwards."""
        for i in range(self._num_indexed, len(tokens) - 1):
            self._ends.setdefault((tokens[i - 1], tokens[i]), []).append(i)
        self._num_indexed = max(self._num_indexed, len(tokens) - 1)
        return self._ends.get((tokens[-2], tokens[-1]), [])[-_NUM_PLACES:] if len(tokens) > 1 else []

    @staticmethod
    def _longest(tokens: list[int], places: list[int]) -> tuple[int, int]:
        """The place where the longest match ends, the latest of equals, and its length; 0 is none."""
        end, best = 0, 0
        for place in reversed(places):
            length, last = _SHORTEST_MATCH, len(tokens) - 1
            while length < _LONGEST_MATCH and length <= place and tokens[place - length] == tokens[last - length]:
                length += 1
            if length > best:
                end, best = place, length
        return end, best
