"""One text under way: its tokens, how much of them is in the cache, its random stream, its characters. Knows no slot."""

from collections.abc import Collection, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from llmctl.core.infer.constrain import ConstrainedText, DeadEndError
from llmctl.core.infer.events import Finished, FinishReason, Request
from llmctl.core.infer.logprobs import TokenLogprob, token_logprob
from llmctl.core.infer.penalties import History
from llmctl.core.infer.sampler import check_finite, sample, stream_key, uniform_at
from llmctl.core.infer.stopping import StopMatcher


class TextDecoder(Protocol):
    """Ids in, whole characters out."""

    def push(self, token_id: int, /) -> str:
        """The characters that became complete."""

    def finish(self) -> str:
        """What is left, with U+FFFD for an incomplete character."""


class TextTokenizer(Protocol):
    """The little that the engine asks of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Highest id + 1."""

    @property
    def special_ids(self) -> Collection[int]:
        """Ids of control tokens, which are no text."""

    def stream(self) -> TextDecoder:
        """A fresh decoder for one text."""


class TextUnderWay:
    """The state of one request. Sampling depends on it alone, never on its neighbours in a batch."""

    def __init__(
        self, request: Request, tokenizer: TextTokenizer, *, eos_ids: Collection[int], constrained: ConstrainedText | None = None
    ) -> None:
        self.request, self.constrained = request, constrained
        self.tokens = list(request.prompt_ids)
        """Prompt and answer."""
        self.num_fed = 0
        """How many of `tokens` are in the cache."""
        self._eos_ids, self._special_ids = eos_ids, tokenizer.special_ids
        self._key = stream_key(request.id, request.sample_index)
        self._history = History(request.prompt_ids)
        self._decoder, self._matcher = tokenizer.stream(), StopMatcher(request.stop)
        self._pieces: list[str] = []
        self._logprobs: list[TokenLogprob] = []

    @property
    def num_new(self) -> int:
        """Generated tokens so far."""
        return len(self.tokens) - len(self.request.prompt_ids)

    @property
    def num_unfed(self) -> int:
        """Tokens that the model has not seen yet."""
        return len(self.tokens) - self.num_fed

    @property
    def is_new(self) -> bool:
        """Whether no token has been generated yet."""
        return self.num_new == 0

    @property
    def max_length(self) -> int:
        """The most tokens that the text can come to."""
        return len(self.request.prompt_ids) + self.request.max_new_tokens

    @property
    def num_left(self) -> int:
        """The most tokens that may still come."""
        return self.max_length - len(self.tokens)

    def guess(self, logits: NDArray[np.float32], ahead: Sequence[int]) -> int:
        """What the text would choose from `logits` (V,), those of a draft model, after the drafts `ahead`. Changes nothing.

        Raises NonFiniteError.
        """
        params, index = self.request.params, self.num_new + len(ahead)
        uniform = 0.0 if params.is_greedy else uniform_at(self.request.seed, self._key, index)
        if index < self.request.min_new_tokens:
            logits = self._without_end(logits)
        return sample(logits, params, uniform, history=self._history.followed_by(ahead) if params.has_penalties else None)

    def choose(self, logits: NDArray[np.float32], allowed: NDArray[np.bool_] | None = None) -> tuple[int, str, FinishReason | None]:
        """Take the next token from `logits` (V,): the token, the text that became certain, and whether it was the last.

        `allowed` (V,) says what the grammar leaves, of a text that has one. Raises NonFiniteError and DeadEndError.
        """
        params = self.request.params
        uniform = 0.0 if params.is_greedy else uniform_at(self.request.seed, self._key, self.num_new)
        choices = logits if allowed is None else _masked(logits, allowed)
        if self.num_new < self.request.min_new_tokens:
            choices = self._without_end(choices)
        token = sample(choices, params, uniform, history=self._history)
        if self.request.num_logprobs is not None:
            self._logprobs.append(token_logprob(logits, token, self.request.num_logprobs))
        self.tokens.append(token)
        self._history.add(token)
        if token in self._eos_ids and not self.request.ignore_eos:
            return token, "", "eos"
        if self.constrained is not None and token not in self._eos_ids:
            self.constrained.take(token)
        is_text = token not in self._special_ids and token not in self._eos_ids
        piece = self._matcher.push(self._decoder.push(token)) if is_text else ""
        self._pieces.append(piece)
        if self._matcher.matched is not None:
            return token, piece, "stop"
        if self.constrained is not None and self.constrained.is_complete:
            return token, piece, "eos"
        return token, piece, "length" if self.num_new >= self.request.max_new_tokens else None

    @property
    def last_logprob(self) -> TokenLogprob | None:
        """That of the last token, where the request asked for it."""
        return self._logprobs[-1] if self._logprobs else None

    def _without_end(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits (V,) of which no end-of-sequence token can be chosen, unless nothing else can."""
        ends = [token for token in self._eos_ids if token < logits.shape[0]]
        if not ends:
            return logits
        check_finite(logits)  # a NaN must not be covered up
        others = logits.copy()
        others[ends] = -np.inf
        return logits if others.max() == -np.inf else others

    def finished(self, reason: FinishReason) -> Finished:
        """The result; gives out what had been held back."""
        if self._matcher.matched is None:
            self._pieces.append(self._matcher.push(self._decoder.finish()))
            self._pieces.append(self._matcher.finish())
        request = self.request
        return Finished(
            id=request.id,
            sample_index=request.sample_index,
            text="".join(self._pieces),
            finish=reason,
            token_ids=tuple(self.tokens[len(request.prompt_ids) :]),
            num_prompt_tokens=len(request.prompt_ids),
            num_new_tokens=self.num_new,
            seed=request.seed,
            stop=self._matcher.matched,
            logprobs=None if request.num_logprobs is None else tuple(self._logprobs),
        )


def _masked(logits: NDArray[np.float32], allowed: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Logits (V,) of which only what is allowed can be chosen. Raises DeadEndError when nothing is."""
    check_finite(logits)  # a NaN must not be covered up
    if not allowed.any():
        raise DeadEndError("no token of the model can go on here")
    return np.where(allowed, logits, np.float32(-np.inf))
