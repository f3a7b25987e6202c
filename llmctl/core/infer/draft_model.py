"""Drafts from a smaller model with the same tokenizer. Knows an executor and its slots; knows no target model.

The small model chooses with the parameters and the uniform numbers of the text it drafts for: where its distribution is
near the target's, the same uniform number mostly falls on the same token, also at high temperatures.
"""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import numpy as np

from llmctl.core.errors import NonFiniteError
from llmctl.core.infer.executor import Executor
from llmctl.core.infer.prefixes import common_length
from llmctl.core.infer.sequence import TextUnderWay
from llmctl.core.infer.speculate import Group, Share

_EXPECTED_SHARE = 0.7
_FEW = 8
"""Texts that lack no more tokens than this are fed together; more are fed alone, without padding."""


class DraftModel:
    """See `Drafter`. `relative_cost` is the small model's size as a share of the target's. `num_choices` bounds the ids."""

    def __init__(self, executor: Executor, *, relative_cost: float, num_choices: int, chunk_tokens: int = 512) -> None:
        self._executor, self._relative_cost = executor, relative_cost
        self._num_choices, self._chunk_tokens = min(num_choices, executor.vocab_size), chunk_tokens
        self._cached: dict[int, list[int]] = {}  # slot -> the tokens whose keys and values it holds
        self._shares: WeakKeyDictionary[TextUnderWay, Share] = WeakKeyDictionary()

    def cost(self, num_texts: int) -> float:
        """A call of the small model, shared by the texts."""
        return self._relative_cost / num_texts

    def chances(self, text: TextUnderWay, limit: int) -> list[float]:
        """Powers of the measured share."""
        share = self._shares.get(text)
        if share is None:
            share = self._shares[text] = Share(_EXPECTED_SHARE)
        share.fade()
        room = self._executor.max_positions - len(text.tokens)
        return [share.value ** (i + 1) for i in range(min(limit, room))]

    def drafts(self, group: Group, lengths: Sequence[int]) -> list[list[int]]:
        """Tokens of the small model. Raises MemoryError and NonFiniteError."""
        found: list[list[int]] = [[] for _ in group]
        wanted = [(row, *group[row]) for row, length in enumerate(lengths) if length]
        if not wanted:
            return found
        capacity = min(max(text.max_length for _, _, text in wanted), self._executor.max_positions)
        self._executor.reserve(num_slots=max(slot for _, slot, _ in wanted) + 1, capacity=capacity)
        feeds = {row: self._lacking(slot, text) for row, slot, text in wanted}
        for num_made in range(max(lengths)):
            rows = [(row, slot, text) for row, slot, text in wanted if lengths[row] > num_made]
            counts = np.array([len(feeds[row]) for row, _, _ in rows], dtype=np.int64)
            tokens = np.zeros((len(rows), int(counts.max())), dtype=np.int64)
            for i, (row, _, _) in enumerate(rows):
                tokens[i, : counts[i]] = feeds[row]
            positions = np.array([len(self._cached[slot]) for _, slot, _ in rows], dtype=np.int64)
            slots = np.array([slot for _, slot, _ in rows], dtype=np.int64)
            logits = self._executor.step(tokens, positions, slots, lengths=counts if int(counts.min()) < tokens.shape[1] else None)
            for i, (row, slot, text) in enumerate(rows):
                self._cached[slot].extend(feeds[row])
                try:
                    found[row].append(text.guess(logits[i, : self._num_choices], found[row]))
                except NonFiniteError as error:
                    raise NonFiniteError(f"the draft model produced NaN or infinity: {error}; leave --draft-model out") from error
                feeds[row] = found[row][-1:]
        return found

    def _lacking(self, slot: int, text: TextUnderWay) -> list[int]:
        """The tokens of a text that its slot lacks; when they are many, all but the last few are fed."""
        cached = self._cached.setdefault(slot, [])
        del cached[common_length(cached, text.tokens, len(text.tokens) - 1) :]
        while len(text.tokens) - len(cached) > _FEW:
            chunk = text.tokens[len(cached) : min(len(cached) + self._chunk_tokens, len(text.tokens) - 1)]
            self._executor.step(np.array([chunk], dtype=np.int64), np.array([len(cached)]), np.array([slot]))
            cached.extend(chunk)
        return text.tokens[len(cached) :]

    def note(self, text: TextUnderWay, num_drafted: int, num_accepted: int) -> None:
        """Measure the share of the text."""
        for i in range(min(num_drafted, num_accepted + 1)):
            self._shares[text].note(came_true=i < num_accepted)

    def release(self) -> None:
        """Forget the cache."""
        self._executor.release()
        self._cached.clear()
