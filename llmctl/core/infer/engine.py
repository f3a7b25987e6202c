"""The one generate loop: requests in, events out. Knows slots and scheduling; knows no model, terminal or file.

Every text under way holds a slot of the executor's cache. A round of the loop admits requests into free slots, feeds one
chunk of prompt tokens, and then decodes one token for all texts that are ready, in one call, or several where a
speculator's guesses come true. A finished text leaves its slot to the next request at once. The stream of requests may be
endless: it is read only when a slot is free.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from llmctl.core.errors import InputError, NonFiniteError
from llmctl.core.infer.constrain import Constrainer, DeadEndError, Masks
from llmctl.core.infer.events import Event, Failed, Request, TokenOut, Warned
from llmctl.core.infer.executor import Executor
from llmctl.core.infer.prefixes import MIN_SHARED, common_length
from llmctl.core.infer.sequence import TextTokenizer, TextUnderWay
from llmctl.core.infer.slots import Slots
from llmctl.core.infer.speculate import Speculator


class _End:
    """The end of the requests."""


_END = _End()


class StopQuestion(Protocol):
    """Asked between steps: the number of the signal that wants the work to end, or None."""

    def __call__(self) -> int | None: ...


def never_stop() -> int | None:
    """The StopQuestion of those who do not ask."""
    return None


class Engine:
    """Generates texts with an Executor. One engine runs one stream of requests at a time.

    `num_slots` texts are under way at most, of `batch_tokens` tokens in all, counting each as long as the longest one may
    become; when memory is short the engine halves the number of texts, says so, and goes on.
    `chunk_tokens` bounds how many prompt tokens are fed between two rounds of decoding. `share_prefixes` copies the
    keys and values of a beginning that another text in the cache has too (a system prompt, samples of one prompt)
    instead of computing them again. `speculator` guesses tokens ahead, which changes no text.
    `constrainer` is for requests with constraints.
    """

    def __init__(
        self,
        executor: Executor,
        tokenizer: TextTokenizer,
        *,
        eos_ids: Iterable[int] = (),
        num_slots: int = 1,
        batch_tokens: int | None = None,
        chunk_tokens: int = 512,
        share_prefixes: bool = True,
        speculator: Speculator | None = None,
        constrainer: Constrainer | None = None,
    ) -> None:
        if min(num_slots, chunk_tokens, 1 if batch_tokens is None else batch_tokens) < 1:
            raise ValueError("num_slots, batch_tokens and chunk_tokens must be at least 1")
        self._executor, self._tokenizer, self._constrainer = executor, tokenizer, constrainer
        self._eos_ids = frozenset(eos_ids)
        self._chunk_tokens, self._share_prefixes = chunk_tokens, share_prefixes
        self._slots = Slots(executor, num_slots=num_slots, num_tokens=batch_tokens, share_prefixes=share_prefixes)
        self.speculator = speculator
        """Who guesses tokens, and how many came true; None when nobody does."""
        # ids beyond the tokenizer's are padding of the embedding matrix: they mean nothing and are never chosen
        self._num_choices = min(executor.vocab_size, tokenizer.vocab_size)
        self._active: dict[int, TextUnderWay] = {}  # slot -> its text
        self._waiting: deque[TextUnderWay] = deque()  # for a slot; those put back when memory ran short go first
        self._is_full = False  # whether the first of them must wait until another text ends

    def run(self, requests: Iterable[Request | Failed | None], *, stop: Callable[[], int | None] = never_stop) -> Iterator[Event]:
        """Answer `requests`; a Failed among them is passed on, and None says that the next one is not there yet.

        Events of different requests are interleaved. When `stop` gives a number, every text under way is closed as
        "interrupted" and the run ends. Raises NonFiniteError that names the token at which logits were NaN or infinite.
        """
        source = iter(requests)
        exhausted = False
        try:
            while True:
                if stop() is not None:
                    yield from (text.finished("interrupted") for text in [*self._active.values(), *self._waiting])
                    return
                self._is_full = False
                while not self._is_full and len(self._active) < self._slots.num_slots:
                    if self._waiting:
                        yield from self._admit()
                        continue
                    request = _END if exhausted else next(source, _END)
                    if request is None:
                        break
                    if isinstance(request, _End):
                        exhausted = True
                        break
                    if isinstance(request, Failed):
                        yield request
                    else:
                        yield from self._begin(request)
                if not self._active:
                    if exhausted and not self._waiting:
                        return
                    continue
                try:
                    yield from self._feed_prompts()
                    yield from self._decode()
                except MemoryError:
                    yield self._shrink()
        finally:
            self._active.clear()
            self._waiting.clear()

    def _begin(self, request: Request) -> Iterator[Event]:
        """Let a new request wait for a slot, or say why it cannot be answered."""
        problem, constrained = self._problem(request), None
        if problem is None and request.constraint is not None:
            assert self._constrainer is not None, "requests with constraints need a Constrainer"
            try:
                constrained = self._constrainer.start(request.constraint)
            except InputError as error:
                problem = str(error)
        if problem is not None:
            yield Failed(id=request.id, sample_index=request.sample_index, error=problem)
            return
        self._waiting.append(TextUnderWay(request, self._tokenizer, eos_ids=self._eos_ids, constrained=constrained))

    def _problem(self, request: Request) -> str | None:
        """Why a request cannot be answered, or None."""
        num_prompt, context = len(request.prompt_ids), self._executor.max_positions
        if num_prompt == 0:
            return "the prompt is empty (no tokens)"
        if max(request.prompt_ids) >= self._executor.vocab_size or min(request.prompt_ids) < 0:
            return f"the prompt holds a token id that the model of {self._executor.vocab_size:,} tokens lacks"
        if request.max_new_tokens < 1:
            return f"max_new_tokens is {request.max_new_tokens}, at least 1 is wanted"
        if request.min_new_tokens > request.max_new_tokens:
            return f"min_new_tokens is {request.min_new_tokens:,}, more than the {request.max_new_tokens:,} tokens that may come at most"
        if num_prompt + request.max_new_tokens > context:
            return f"{num_prompt:,} prompt tokens and {request.max_new_tokens:,} new ones exceed the model's context of {context:,}"
        return None

    def _admit(self) -> Iterator[Event]:
        """Give the first of the waiting texts a slot, if there is one; else it goes on waiting."""
        try:
            slot = self._slots.give(self._waiting[0], self._active)
        except MemoryError:
            yield self._shrink()
            return
        self._is_full = slot is None
        if slot is not None:
            self._active[slot] = self._waiting.popleft()

    def _feed_prompts(self) -> Iterator[Event]:
        """Feed one chunk of the texts whose prompts are not in the cache yet."""
        pending = [(slot, text) for slot, text in self._active.items() if text.num_unfed > 1 or text.is_new]
        group: list[tuple[int, TextUnderWay]] = []
        width = 0
        for slot, text in pending:
            if self._share_prefixes and self._copy_or_wait(slot, text, [other for _, other in group]):
                continue
            length = min(text.num_unfed, self._chunk_tokens)
            if not group:
                width = length
            # rows of one call have one width: a text joins where at most half of its row is padding
            elif length > width or 2 * length < width or (len(group) + 1) * width > self._chunk_tokens:
                continue
            group.append((slot, text))
        if not group:
            return
        group.sort()
        lengths = np.array([min(text.num_unfed, width) for _, text in group], dtype=np.int64)
        tokens = np.zeros((len(group), width), dtype=np.int64)
        for row, (_, text) in enumerate(group):
            tokens[row, : lengths[row]] = text.tokens[text.num_fed : text.num_fed + int(lengths[row])]
        chosen = [text if text.num_unfed == lengths[row] else None for row, (_, text) in enumerate(group)]
        with self._masks(chosen) as masks:
            logits = self._step(group, tokens, lengths if bool((lengths < width).any()) else None)
        allowed = masks()
        for row, (slot, text) in enumerate(group):
            self._note_fed(slot, text, int(lengths[row]))
            if text.num_unfed == 0:
                yield from self._choose(slot, text, logits[row], *allowed[row])

    def _copy_or_wait(self, slot: int, text: TextUnderWay, group: list[TextUnderWay]) -> bool:
        """Take over a cached beginning from another slot; True when the text had better wait for one being computed."""
        limit = len(text.tokens) - 1
        source, length = self._slots.longest_beginning(slot, text.tokens, limit)
        if length >= text.num_fed + MIN_SHARED or (length == limit > text.num_fed):
            self._slots.copy(source, to=slot, length=length)
            text.num_fed = length
        return any(
            common_length(other.tokens, text.tokens, limit) >= min(limit, text.num_fed + MIN_SHARED) > text.num_fed for other in group
        )

    def _decode(self) -> Iterator[Event]:
        """One more token, or several, for every text whose prompt is in the cache."""
        group = sorted((slot, text) for slot, text in self._active.items() if text.num_unfed == 1 and not text.is_new)
        if not group:
            return
        drafts: list[list[int]] = [[]] * len(group)
        if self.speculator is not None:
            try:
                drafts = self.speculator.drafts(group)
            except MemoryError:
                self.speculator.release()
                self.speculator = None
                yield Warned(message="not enough memory for the draft model; going on without it")
        lengths = np.array([1 + len(row) for row in drafts], dtype=np.int64)
        tokens = np.zeros((len(group), int(lengths.max())), dtype=np.int64)
        for row, (_, text) in enumerate(group):
            tokens[row, : lengths[row]] = text.tokens[-1], *drafts[row]
        ragged = bool((lengths < tokens.shape[1]).any())
        with self._masks([text for _, text in group], drafts) as masks:
            logits = self._step(group, tokens, lengths if ragged else None, all_logits=tokens.shape[1] > 1)
        if logits.ndim == 2:
            logits = logits[:, None]  # (B, 1, V)
        allowed = masks()
        for row, (slot, text) in enumerate(group):
            yield from self._verify(slot, text, drafts[row], logits[row], allowed[row])

    @contextlib.contextmanager
    def _masks(self, texts: list[TextUnderWay | None], drafts: list[list[int]] | None = None) -> Iterator[Callable[[], Masks]]:
        """Compute in a thread what the texts' grammars allow, while the model computes inside; an empty list is everything."""
        constrained = [None if text is None else text.constrained for text in texts]
        nothing: Masks = [[] for _ in texts]
        if self._constrainer is None or not any(constrained):
            yield lambda: nothing
            return
        from concurrent.futures import wait  # brings logging, which most texts do without

        future = self._constrainer.masks(list(zip(constrained, drafts or [[]] * len(texts), strict=True)))
        try:
            yield future.result
        finally:
            wait([future])  # also when the model fails: the thread moves the texts' grammars to and fro

    def _verify(
        self, slot: int, text: TextUnderWay, drafts: list[int], logits: NDArray[np.float32], allowed: list[NDArray[np.bool_]]
    ) -> Iterator[Event]:
        """Choose after the last token and after each draft that proves right; `logits` (1 + drafts, V) or longer."""
        num_accepted = 0
        for index in range(1 + len(drafts)):
            self._note_fed(slot, text, 1)
            yield from self._choose(slot, text, logits[index], *allowed[index : index + 1])
            if slot not in self._active or index == len(drafts) or text.tokens[-1] != drafts[index]:
                break
            num_accepted += 1
        if drafts and self.speculator is not None:
            self.speculator.note(text, len(drafts), num_accepted)

    def _step(
        self,
        group: list[tuple[int, TextUnderWay]],
        tokens: NDArray[np.int64],
        lengths: NDArray[np.int64] | None,
        *,
        all_logits: bool = False,
    ) -> NDArray[np.float32]:
        positions = np.array([text.num_fed for _, text in group], dtype=np.int64)
        slots = np.array([slot for slot, _ in group], dtype=np.int64)
        return self._executor.step(tokens, positions, slots, lengths=lengths, all_logits=all_logits)

    def _note_fed(self, slot: int, text: TextUnderWay, count: int) -> None:
        self._slots.cached[slot].extend(text.tokens[text.num_fed : text.num_fed + count])
        text.num_fed += count

    def _choose(
        self, slot: int, text: TextUnderWay, logits: NDArray[np.float32], allowed: NDArray[np.bool_] | None = None
    ) -> Iterator[Event]:
        try:
            token, piece, reason = text.choose(logits[: self._num_choices], allowed)
        except DeadEndError as error:
            del self._active[slot]
            yield Failed(
                id=text.request.id,
                sample_index=text.request.sample_index,
                error=f"the structured answer cannot be continued after {text.num_new:,} tokens: {error}",
            )
            return
        except NonFiniteError as error:
            where = f"token {text.num_new} of item {text.request.id}"
            raise NonFiniteError(
                f"the model produced NaN or infinity at {where}: {error}; check its weights, or try --dtype float32"
            ) from error
        yield TokenOut(
            id=text.request.id,
            sample_index=text.request.sample_index,
            token_index=text.num_new - 1,
            token_id=token,
            text=piece,
            logprob=text.last_logprob,
        )
        if reason is not None:
            del self._active[slot]
            yield text.finished(reason)

    def _shrink(self) -> Warned | Failed:
        """Halve the slots after memory ran out. The texts under way keep their tokens and are fed again.

        With one slot, its text fails; another, shorter one may still fit.
        """
        self._waiting.extendleft(reversed(list(self._active.values())))
        self._active.clear()
        for text in self._waiting:
            text.num_fed = 0
        if self.speculator is not None:
            self.speculator.release()
        before, now = self._slots.halve()
        if before == 1:
            request = self._waiting.popleft().request
            error = f"out of memory for one text of {len(request.prompt_ids):,} prompt tokens and up to {request.max_new_tokens:,} new ones"
            return Failed(id=request.id, sample_index=request.sample_index, error=error)
        return Warned(message=f"not enough memory for {before} texts at once; going on with {now}")
