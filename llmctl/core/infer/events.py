"""What goes into the engine and what comes out of it: frozen dataclasses with plain numbers and text."""

from dataclasses import dataclass, field
from typing import Literal

from llmctl.core.infer.constrain import Constraint
from llmctl.core.infer.logprobs import TokenLogprob
from llmctl.core.infer.sampler import SamplingParams

FinishReason = Literal["eos", "stop", "length", "interrupted"]
"""An end-of-sequence token, or a structured answer that nothing can follow; a stop string; the limit of tokens; a signal."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One text to generate. `id` and `sample_index` name its random stream, so they decide its text, not its place in a batch.

    `prompt_ids` must not be empty and, with `max_new_tokens`, must fit the context; the engine answers Failed otherwise.
    """

    id: int | str
    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    params: SamplingParams = field(default_factory=SamplingParams)
    sample_index: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()
    num_logprobs: int | None = None
    """Tell each token's log-probability and those of so many most likely ones; None tells nothing, which costs nothing."""
    ignore_eos: bool = False
    """Go on after an end-of-sequence token, which is a token without text then."""
    min_new_tokens: int = 0
    """No end-of-sequence token is chosen before so many tokens are there."""
    constraint: Constraint | None = None
    """What the answer must be; only an answer that ends as "eos" is whole."""


@dataclass(frozen=True, kw_only=True)
class TokenOut:
    """A token was chosen. `text` is what became certain with it: whole characters, no stop string; often empty."""

    id: int | str
    sample_index: int
    token_index: int
    token_id: int
    text: str
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A text is done. It starts with the TokenOut texts and may be longer: the end of what had been held back.

    `token_ids` are the generated ones, an end-of-sequence token included; `text` leaves special tokens out.
    """

    id: int | str
    sample_index: int
    text: str
    finish: FinishReason
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    num_new_tokens: int
    seed: int
    stop: str | None = None
    """The stop string that ended it."""
    score: float | None = None
    """Beam search: sum of log-probabilities divided by length ** length_penalty."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    """One for each of `token_ids`, where the request asked for them."""

    @property
    def mean_logprob(self) -> float:
        """Mean log-probability of the tokens, by which the best of several texts is chosen. Needs `logprobs`."""
        assert self.logprobs is not None, "the request did not ask for log-probabilities"
        return sum(item.logprob for item in self.logprobs) / max(len(self.logprobs), 1)


@dataclass(frozen=True, kw_only=True)
class Failed:
    """A request that cannot be answered. The others go on."""

    id: int | str
    sample_index: int
    error: str
    line: int | None = None
    """Where it came from, for one that failed before it was a request."""


@dataclass(frozen=True, kw_only=True)
class Warned:
    """Something a person should know, which does not stop the work."""

    message: str


Event = TokenOut | Finished | Failed | Warned
