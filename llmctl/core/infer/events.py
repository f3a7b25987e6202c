"""What goes into the engine and what comes out of it: frozen dataclasses with plain numbers and text."""

from dataclasses import dataclass, field
from typing import Literal

from llmctl.core.infer.sampler import SamplingParams

FinishReason = Literal["eos", "stop", "length", "interrupted"]
"""An end-of-sequence token, a stop string, the limit of tokens or of the context, a signal."""


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


@dataclass(frozen=True, kw_only=True)
class TokenOut:
    """A token was chosen. `text` is what became certain with it: whole characters, no stop string; often empty."""

    id: int | str
    sample_index: int
    token_index: int
    token_id: int
    text: str


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
