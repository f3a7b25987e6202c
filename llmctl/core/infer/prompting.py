"""From what a person wrote to the ids that a model reads: chat template, length, truncation. Knows tokenizers; no model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from llmctl.core.errors import InputError
from llmctl.core.infer.defaults import MAX_NEW_TOKENS

if TYPE_CHECKING:
    from llmctl.core.infer.preset import Preset
    from llmctl.core.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Ids that are ready for the engine, and how many tokens were cut off to make them fit."""

    ids: tuple[int, ...]
    max_new_tokens: int
    num_cut: int = 0


class Prompter:
    """Makes prompts for one model.

    `chat` True puts every prompt into the tokenizer's chat template, False never, None where there is one. `context` is
    the model's, in tokens. `truncate` says at which end a prompt that is too long is cut; None makes it an error. A
    `preset` is put around plain text, not around messages; `system` goes before its system message.
    """

    def __init__(
        self,
        tokenizer: "Tokenizer",
        *,
        context: int,
        chat: bool | None = None,
        system: str | None = None,
        allow_special: bool = False,
        truncate: Literal["left", "right"] | None = None,
        preset: "Preset | None" = None,
    ) -> None:
        has_template = tokenizer.chat_template is not None
        if chat and not has_template:
            raise InputError("the model has no chat template; give one with --chat-template FILE, or use --raw")
        if system is not None and not has_template:
            raise InputError("a system message needs a chat template, and the model has none; give --chat-template FILE")
        self._tokenizer, self.context, self.preset = tokenizer, context, preset
        self.uses_chat = has_template if chat is None else chat
        self._system, self._allow_special, self._truncate = system, allow_special, truncate

    def from_text(self, text: str, *, system: str | None = None, max_new_tokens: int | None = None, raw: bool = False) -> Prompt:
        """A prompt from plain text; `system` replaces the Prompter's. Raises InputError when it is empty or too long.

        With `raw` the text is all that the model reads: no chat template, no system message, no preset.
        """
        if not text:
            raise InputError("the prompt is empty")
        if raw:
            return self._fitted(self.encode_text(text), max_new_tokens)
        if self.preset is not None:
            text = self.preset.user_text(text) if self.uses_chat else self.preset.plain_text(text)
        if self.uses_chat:
            system = self.system if system is None else system
            messages = [{"role": "system", "content": system}] if system is not None else []
            return self._from_messages([*messages, {"role": "user", "content": text}], max_new_tokens)
        if system is not None:
            raise InputError("a system message needs the chat template, which is not used here")
        return self._fitted(self.encode_text(text), max_new_tokens)

    def encode_text(self, text: str) -> list[int]:
        """The ids of a text that is taken as it is, however long."""
        return self._tokenizer.encode(text, allow_special=self._allow_special)

    def encode_messages(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The ids of messages in the chat template, up to where the answer begins, however long. Raises InputError."""
        return self._tokenizer.encode_chat(messages, add_generation_prompt=True)

    @property
    def system(self) -> str | None:
        """The system message of a chat that brings none."""
        return self._system if self._system is not None or self.preset is None else self.preset.system_text()

    def from_messages(self, messages: Any, *, max_new_tokens: int | None = None) -> Prompt:
        """A prompt from [{"role": ..., "content": ...}, ...], the last being the one to answer. Raises InputError."""
        if not self.uses_chat:
            raise InputError("messages need a chat template, and none is used here; give a prompt instead")
        if not isinstance(messages, list) or not messages:
            raise InputError("messages: a list of objects with role and content is wanted")
        for number, message in enumerate(messages):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
                raise InputError(f"messages[{number}]: an object with role and content, both strings, is wanted")
        if self._system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self._system}, *messages]
        return self._from_messages(messages, max_new_tokens)

    def _from_messages(self, messages: Sequence[Mapping[str, Any]], max_new_tokens: int | None) -> Prompt:
        return self._fitted(self.encode_messages(messages), max_new_tokens)

    def _fitted(self, ids: list[int], max_new_tokens: int | None) -> Prompt:
        """The prompt with room for its answer: without a wish, 256 tokens or what is left."""
        if not ids:
            raise InputError("the prompt is empty (no tokens)")
        context, num_ids = self.context, len(ids)
        least = 1 if max_new_tokens is None else max_new_tokens
        if num_ids + least <= context:
            return Prompt(ids=tuple(ids), max_new_tokens=max_new_tokens or min(MAX_NEW_TOKENS, context - num_ids))
        wish = f"and {max_new_tokens:,} new ones exceed" if max_new_tokens is not None else "fill"
        if self._truncate is None or least >= context:
            advice = "shorten it, ask for fewer tokens, or use --truncate left|right" if least < context else "ask for fewer tokens"
            raise InputError(f"{num_ids:,} prompt tokens {wish} the model's context of {context:,}; {advice}")
        if max_new_tokens is None:
            max_new_tokens = max(1, min(MAX_NEW_TOKENS, context // 2))
        room = context - max_new_tokens
        return Prompt(ids=tuple(self._cut(ids, room)), max_new_tokens=max_new_tokens, num_cut=num_ids - room)

    def _cut(self, ids: list[int], room: int) -> list[int]:
        if self._truncate == "right":
            return ids[:room]
        starts_with_bos = self._tokenizer.bos_id is not None and ids[0] == self._tokenizer.bos_id
        return [ids[0], *ids[len(ids) - room + 1 :]] if starts_with_bos and room > 1 else ids[len(ids) - room :]
