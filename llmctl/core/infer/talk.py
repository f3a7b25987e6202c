"""A conversation with a model: its turns, what the model reads of them, its answers. Knows prompts; knows no terminal or file.

With a chat template, a turn is a message and its answer. Without one, the talk is one growing text: a message that begins
after white space follows the text directly, any other on a new line, and an empty one lets the model go on.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from llmctl.core.errors import InputError, UsageError
from llmctl.core.infer.defaults import MAX_NEW_TOKENS
from llmctl.core.infer.engine import never_stop
from llmctl.core.infer.events import Event, Finished, Warned
from llmctl.core.infer.generator import Generator
from llmctl.core.infer.prompting import Prompt
from llmctl.core.infer.sampler import SamplingParams


@dataclass(kw_only=True)
class Turn:
    """What was said, and what the model said to it: None while there is no answer. `num_retries` picks another answer."""

    message: str
    answer: str | None = None
    num_retries: int = 0


@dataclass(frozen=True, kw_only=True)
class TalkSettings:
    """What holds for every answer."""

    params: SamplingParams
    seed: int
    stop: tuple[str, ...] = ()
    max_new_tokens: int | None = None
    ignore_eos: bool = False
    min_new_tokens: int = 0


class Talk:
    """A conversation under way. The engine's cache keeps what was read, so that a turn costs its own tokens only.

    An answer depends on the seed, the number of its turn and of its retry, and the text before it, on nothing else.
    """

    def __init__(self, generator: Generator, settings: TalkSettings, *, system: str | None = None) -> None:
        """Raises InputError for a system message without a chat template, UsageError for more new tokens than can fit."""
        self._generator, self._settings = generator, settings
        self.turns: list[Turn] = []
        self.num_left_out = 0
        """So many turns, the oldest, are not read any more: they would not fit the context."""
        context = generator.prompter.context
        if settings.max_new_tokens is not None and settings.max_new_tokens >= context:
            raise UsageError(f"{settings.max_new_tokens:,} new tokens leave nothing of the model's context of {context:,}; ask for fewer")
        self._system: str | None = None
        self.system = system

    @property
    def uses_chat(self) -> bool:
        """Whether there is a chat template."""
        return self._generator.prompter.uses_chat

    @property
    def system(self) -> str | None:
        """The system message."""
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        if text is not None and not self.uses_chat:
            raise InputError("a system message needs a chat template, and none is used here")
        self._system = text

    @property
    def is_unanswered(self) -> bool:
        """Whether the last message waits for its answer."""
        return bool(self.turns) and self.turns[-1].answer is None

    def say(self, message: str) -> None:
        """Add a message; it takes the place of one that has no answer. Raises InputError for an empty one that means nothing."""
        if not message and (self.uses_chat or not any(turn.message or turn.answer for turn in self.turns)):
            raise InputError("the message is empty")
        if self.is_unanswered:
            self.turns.pop()
        self.turns.append(Turn(message=message))

    def undo(self) -> Turn | None:
        """Take the last turn back, if there is one, and give it."""
        if not self.turns:
            return None
        turn = self.turns.pop()
        self.num_left_out = min(self.num_left_out, max(len(self.turns) - 1, 0))
        return turn

    def retry(self) -> bool:
        """Forget the last answer, so that `answer` gives another one; False when nothing has been said."""
        if not self.turns:
            return False
        self.turns[-1].answer = None
        self.turns[-1].num_retries += 1
        return True

    def clear(self) -> None:
        """Forget all turns; the system message stays."""
        self.turns.clear()
        self.num_left_out = 0

    def answer(self, *, stop: Callable[[], int | None] = never_stop) -> Iterator[Event]:
        """Answer the last message: the engine's events, and a Warned before them when turns are left out from now on.

        An answer that `stop` ended is kept as far as it came; one without any text leaves the message unanswered. Raises
        InputError when the message alone does not fit the context, NonFiniteError.
        """
        before = self.num_left_out
        prompt = self._prompt()
        if before < self.num_left_out:
            context = self._generator.prompter.context
            found = f"the talk is longer than the model's context of {context:,} tokens"
            yield Warned(message=f"{found}: its oldest turns are left out from here on")
        settings, turn = self._settings, self.turns[-1]
        request = self._generator.request_for(
            prompt,
            id=len(self.turns),
            sample_index=turn.num_retries,
            seed=settings.seed,
            stop=settings.stop,
            params=settings.params,
            ignore_eos=settings.ignore_eos,
            min_new_tokens=settings.min_new_tokens,
        )
        for event in self._generator.engine.run([request], stop=stop):
            if isinstance(event, Finished) and (event.text or event.finish != "interrupted"):
                turn.answer = event.text
            yield event

    def _prompt(self) -> Prompt:
        """What the model reads, with room for the answer. Leaves turns out, some more than needed, so that it is done rarely."""
        context, wish = self._generator.prompter.context, self._settings.max_new_tokens
        room = context - (min(MAX_NEW_TOKENS, context // 4) if wish is None else wish)
        first, limit, last = self.num_left_out, room, len(self.turns) - 1
        if last and not self.turns[last].message:  # "go on" needs the text to go on with
            last -= 1
        ids = self._ids(first)
        while len(ids) > limit and first < last:
            first, limit = first + 1, room * 3 // 4
            ids = self._ids(first)
        if len(ids) > room:
            raise InputError(
                f"the message comes to {len(ids):,} tokens, and with room for the answer {room:,} fit the model's context of {context:,}; "
                "shorten it"
            )
        self.num_left_out = first
        return Prompt(ids=tuple(ids), max_new_tokens=min(MAX_NEW_TOKENS, context - len(ids)) if wish is None else wish)

    def _ids(self, first: int) -> list[int]:
        """The ids of the turns from `first` on."""
        prompter, turns = self._generator.prompter, self.turns[first:]
        if not self.uses_chat:
            return prompter.encode_text(grown_text(turns))
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        for turn in turns:
            text = turn.message if prompter.preset is None else prompter.preset.user_text(turn.message)
            messages.append({"role": "user", "content": text})
            if turn.answer is not None:
                messages.append({"role": "assistant", "content": turn.answer})
        return prompter.encode_messages(messages)


def grown_text(turns: list[Turn]) -> str:
    """The one text that turns without a chat template are."""
    text = ""
    for turn in turns:
        if turn.message:
            joins = not text or text[-1].isspace() or turn.message[0].isspace()
            text += turn.message if joins else "\n" + turn.message
        text += turn.answer or ""
    return text
