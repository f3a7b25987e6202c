"""Beam search: the most probable text rather than a drawn one. Knows the executor; knows no tokenizer and no terminal.

Step for step what `transformers` does in `generate(num_beams=k, do_sample=False)` with one prompt, its heuristics
for stopping included, so that the token ids are equal (generation/utils.py, `_beam_search`).

Legend: k beams, V vocabulary size, n candidates of a step: (1 + number of end tokens, at least 2) * k.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from llmctl.core.errors import NonFiniteError
from llmctl.core.infer.executor import Executor
from llmctl.core.infer.penalties import History, penalise
from llmctl.core.infer.sampler import check_finite, log_softmax

_NEVER = np.float32(-1e9)
"""The score of what must not be chosen, as in `transformers`."""


@dataclass(frozen=True, kw_only=True)
class BeamParams:
    """length_penalty: a finished text's score is the sum of its log-probabilities divided by its length to this power.

    early_stopping: "true" ends with k finished texts; "false" when the best open beam cannot beat them at its present
    length; "never" when it cannot at any length.
    """

    num_beams: int
    length_penalty: float = 1.0
    early_stopping: Literal["true", "false", "never"] = "false"
    repetition_penalty: float = 1.0


@dataclass(frozen=True)
class Beam:
    """A text of the search: its generated tokens, an end token included, and its score."""

    tokens: tuple[int, ...]
    score: float


@dataclass(frozen=True)
class BeamStep:
    """A step is done; `best` is the most probable open text, which a later step may abandon."""

    num_new_tokens: int
    best: tuple[int, ...]


@dataclass
class _Search:
    """k open beams and the k best finished ones, each list sorted by score."""

    params: BeamParams
    max_new_tokens: int
    eos_ids: frozenset[int]
    open_tokens: list[tuple[int, ...]]
    open_scores: NDArray[np.float32]
    done: list[tuple[tuple[int, ...], np.float32, bool]] = field(default_factory=list)  # tokens, score, really finished
    can_improve: bool = True

    def advance(self, log_probs: NDArray[np.float32]) -> tuple[list[int], bool]:
        """Take log-probabilities (k, V); give the parent of each new open beam, and whether the search goes on."""
        k, vocab_size = log_probs.shape
        length = len(self.open_tokens[0])
        totals = (log_probs + self.open_scores[:, None]).reshape(-1)
        best = _top(totals, max(2, 1 + len(self.eos_ids)) * k)
        scores, parents = totals[best], (best // vocab_size).tolist()
        texts = [(*self.open_tokens[parent], token) for parent, token in zip(parents, (best % vocab_size).tolist(), strict=True)]
        over = np.array([text[-1] in self.eos_ids or length + 1 >= self.max_new_tokens for text in texts])
        self._finish(texts, scores, over, length)
        open_scores = scores + over.astype(np.float32) * _NEVER
        chosen = _top(open_scores, k)
        self.open_tokens, self.open_scores = [texts[i] for i in chosen], open_scores[chosen]
        self._judge(length + 1)
        full = self.params.early_stopping == "true" and all(finished for _, _, finished in self.done)
        return [parents[i] for i in chosen], self.can_improve and not full and not bool(over.all())

    def _finish(self, texts: list[tuple[int, ...]], scores: NDArray[np.float32], over: NDArray[np.bool_], length: int) -> None:
        """Merge the candidates that have ended, if they stand among the first k, into the finished texts."""
        k = self.params.num_beams
        ended = over & (np.arange(len(texts)) < k)
        final = scores / np.float32((length + 1) ** self.params.length_penalty)
        if self.params.early_stopping == "true" and all(finished for _, _, finished in self.done):
            final = final + _NEVER
        if not self.can_improve:
            final = final + _NEVER
        final = final + (~ended).astype(np.float32) * _NEVER
        merged = self.done + [(text, score, bool(end)) for text, score, end in zip(texts, final, ended, strict=True)]
        order = _top(np.array([score for _, score, _ in merged], dtype=np.float32), k)
        self.done = [merged[i] for i in order]

    def _judge(self, length: int) -> None:
        """Whether the best open beam may still beat the worst finished text."""
        penalty = self.params.length_penalty
        hoped = self.max_new_tokens if self.params.early_stopping == "never" and penalty > 0 else length
        best_open = self.open_scores[0] / np.float32(hoped**penalty)
        worst = min(score for _, score, _ in self.done)
        self.can_improve = self.can_improve and any(best_open > (worst if finished else _NEVER) for _, _, finished in self.done)


def beam_search(
    executor: Executor,
    prompt_ids: tuple[int, ...],
    params: BeamParams,
    *,
    max_new_tokens: int,
    eos_ids: frozenset[int] = frozenset(),
    num_choices: int | None = None,
    chunk_tokens: int = 512,
    stop: Callable[[], int | None] = lambda: None,
) -> Iterator[BeamStep | tuple[Beam, ...]]:
    """Search; yields a BeamStep for each token and at last the finished texts, best first, `num_beams` at most.

    Ids from `num_choices` on (padding of the embedding matrix) are never chosen. When `stop` gives a number, the best
    open text is the result. Raises NonFiniteError.
    """
    k, num_prompt = params.num_beams, len(prompt_ids)
    executor.reserve(num_slots=k, capacity=num_prompt + max_new_tokens)
    search = _Search(
        params=params,
        max_new_tokens=max_new_tokens,
        eos_ids=eos_ids,
        open_tokens=[()] * k,
        # only the first counts at first, or all beams would be the same text
        open_scores=np.array([0.0] + [_NEVER] * (k - 1), dtype=np.float32),
        done=[((), _NEVER, False)] * k,
    )
    logits = np.repeat(_feed(executor, prompt_ids, chunk_tokens), k, axis=0)  # (k, V)
    slots = list(range(k))
    while True:
        log_probs = _log_probs(logits[:, :num_choices], prompt_ids, search.open_tokens, params)
        parents, goes_on = search.advance(log_probs)
        num_new = len(search.open_tokens[0])
        yield BeamStep(num_new, search.open_tokens[0])
        if stop() is not None:
            yield (Beam(search.open_tokens[0], float(search.open_scores[0])),)
            return
        if not goes_on:
            yield tuple(Beam(tokens, float(score)) for tokens, score, finished in search.done if finished)
            return
        slots = _follow(executor, slots, parents, length=num_prompt + num_new - 1)
        order = np.argsort(slots)  # rows in the order of their slots lie side by side in the cache
        tokens = np.array([[search.open_tokens[i][-1]] for i in order], dtype=np.int64)
        positions = np.full(k, num_prompt + num_new - 1, dtype=np.int64)
        stepped = executor.step(tokens, positions, np.array(slots, dtype=np.int64)[order])
        logits = np.empty_like(stepped)
        logits[order] = stepped


def _feed(executor: Executor, prompt_ids: tuple[int, ...], chunk_tokens: int) -> NDArray[np.float32]:
    """The prompt into slot 0; the logits after it, (1, V)."""
    logits: NDArray[np.float32] | None = None
    for start in range(0, len(prompt_ids), chunk_tokens):
        chunk = np.array([prompt_ids[start : start + chunk_tokens]], dtype=np.int64)
        logits = executor.step(chunk, np.array([start], dtype=np.int64), np.array([0], dtype=np.int64))
    assert logits is not None, "an empty prompt is refused by the caller"
    return logits


def _log_probs(
    logits: NDArray[np.float32], prompt_ids: tuple[int, ...], texts: list[tuple[int, ...]], params: BeamParams
) -> NDArray[np.float32]:
    """Log-probabilities (k, V) after the repetition penalty, which `transformers` applies to them, not to the logits."""
    for row, text in enumerate(texts):
        try:
            check_finite(logits[row])
        except NonFiniteError as error:
            raise NonFiniteError(f"the model produced NaN or infinity at token {len(text)}: {error}; check its weights") from error
    log_probs = log_softmax(logits)
    if params.repetition_penalty != 1:
        rows = [
            penalise(row, params.repetition_penalty, 0.0, 0.0, History((*prompt_ids, *text)))
            for row, text in zip(log_probs, texts, strict=True)
        ]
        log_probs = np.stack(rows)
    return log_probs.astype(np.float32, copy=False)


def _follow(executor: Executor, slots: list[int], parents: list[int], *, length: int) -> list[int]:
    """Slots of the new beams: a parent's first child stays where it is, the others are copied to the slots set free."""
    free = [slots[i] for i in range(len(slots)) if i not in set(parents)]
    taken: set[int] = set()
    result = []
    for parent in parents:
        slot = slots[parent]
        if parent in taken:
            slot = free.pop()
            executor.copy_slot(slots[parent], to=slot, length=length)
        taken.add(parent)
        result.append(slot)
    return result


def _top(values: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Indices of the `count` largest values, largest first; ties in the order of their indices."""
    count = min(count, values.shape[0])
    if count < values.shape[0]:
        threshold = np.partition(values, values.shape[0] - count)[values.shape[0] - count]
        candidates = np.flatnonzero(values >= threshold)
    else:
        candidates = np.arange(values.shape[0])
    order = np.argsort(-values[candidates], kind="stable")[:count]
    return np.asarray(candidates[order], dtype=np.int64)
