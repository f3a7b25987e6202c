"""Structured answers: which tokens may come next under a JSON schema, a regular expression, a choice or a grammar.

Knows llguidance, which is an extra, and the tokenizer's file; knows no model and no request.

Legend: V ids that may be chosen.
"""

import json
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from llmctl.core.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

ConstraintKind = Literal["json_schema", "regex", "choice", "grammar"]
KINDS: tuple[ConstraintKind, ...] = get_args(ConstraintKind)

_END = "<|end of the structured answer|>"
"""A token of its own, which no model has, marks where an answer may end: models end with any of several tokens, or with none."""
_JSON_STYLE = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
"""As json.dumps writes. With white space left free, small models fill answers with it; a schema's x-guidance may say otherwise."""
_MAX_KEPT = 64

Masks = list[list[NDArray[np.bool_]]]
"""For each text, what may be chosen (V,) after its last token and after each draft."""


class DeadEndError(Exception):
    """No token can go on: the grammar became too complex, or the tokenizer lacks what it asks for."""


@dataclass(frozen=True)
class Constraint:
    """What an answer must be. `text` is the schema, expression or grammar; of a choice a JSON list of strings."""

    kind: ConstraintKind
    text: str

    @classmethod
    def of(cls, kind: ConstraintKind, value: Any) -> "Constraint":
        """From a value as JSON gives it: a schema may be an object, and a choice is a list. Raises InputError."""
        if kind == "choice":
            if not isinstance(value, list | tuple) or not value or not all(isinstance(item, str) and item for item in value):
                raise InputError("choice: a list of strings, none empty, is wanted")
            return cls(kind, json.dumps(list(value)))
        if kind == "json_schema" and isinstance(value, dict | bool):
            return cls(kind, json.dumps(value))
        if not isinstance(value, str):
            raise InputError(f"{kind}: {'an object or ' if kind == 'json_schema' else ''}a string is wanted")
        return cls(kind, value)


class Constrainer:
    """Starts constrained texts for one tokenizer, and computes their masks in a thread, beside the model.

    `tokenizer_json` gives the content of tokenizer.json, when it is first needed. Ids from `num_choices` on are never
    allowed, and any of `eos_ids` where the answer may end.
    """

    def __init__(self, tokenizer_json: Callable[[], str], *, num_choices: int, eos_ids: Collection[int]) -> None:
        self._tokenizer_json, self.num_choices = tokenizer_json, num_choices
        self.eos_ids = [token for token in sorted(eos_ids) if token < num_choices]
        self._started: OrderedDict[Constraint, Any] = OrderedDict()

    def start(self, constraint: Constraint) -> "ConstrainedText":
        """The state of a text that follows `constraint`. Raises InputError when it is malformed, MissingExtraError."""
        matcher = self._started.get(constraint)
        if matcher is None:
            matcher = self._started[constraint] = self._compiled(constraint)
            if len(self._started) > _MAX_KEPT:
                self._started.popitem(last=False)
        self._started.move_to_end(constraint)
        return ConstrainedText(matcher.deep_copy(), self, self._tokenizer[1])

    def masks(self, texts: Sequence[tuple["ConstrainedText | None", Sequence[int]]]) -> "Future[Masks]":
        """Begin to compute what may follow the last token and each draft of texts, whose drafts must be `valid`."""
        return self._pool.submit(lambda: [[] if text is None else text.masks(drafts) for text, drafts in texts])

    @cached_property
    def _pool(self) -> "ThreadPoolExecutor":
        from concurrent.futures import ThreadPoolExecutor

        return ThreadPoolExecutor(1, thread_name_prefix="masks")

    @cached_property
    def _tokenizer(self) -> tuple[Any, int]:
        """llguidance's view of the tokenizer, and the id of the end."""
        import tokenizers

        guidance = _llguidance()
        backend = tokenizers.Tokenizer.from_str(self._tokenizer_json())
        backend.add_special_tokens([tokenizers.AddedToken(_END, special=True, normalized=False)])
        end = backend.token_to_id(_END)
        assert end is not None, "it has just been added"
        try:
            return guidance.LLTokenizer(backend.to_str(), n_vocab=end + 1, eos_token=[end]), end
        except ValueError as error:
            raise InputError(f"this model's tokenizer cannot be used for structured answers: {_one_line(error)}") from error

    def _compiled(self, constraint: Constraint) -> Any:
        grammar = _grammar(constraint)
        tokenizer, _ = self._tokenizer
        guidance = _llguidance()
        is_error, messages = guidance.LLMatcher.validate_grammar_with_warnings(grammar, tokenizer)
        if is_error:
            raise InputError(f"{constraint.kind}: {_one_line(messages[0])}")
        matcher = guidance.LLMatcher(tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise InputError(f"{constraint.kind}: {_one_line(matcher.get_error())}")
        return matcher


class ConstrainedText:
    """How far one text has come in its grammar."""

    def __init__(self, matcher: Any, owner: Constrainer, end: int) -> None:
        self._matcher, self._owner, self._end = matcher, owner, end

    @property
    def is_complete(self) -> bool:
        """Whether nothing can follow."""
        return bool(self._matcher.is_stopped())

    def take(self, token: int) -> None:
        """The text goes on with `token`. Raises DeadEndError when that was not allowed."""
        if not self._matcher.consume_token(token):
            raise DeadEndError(_one_line(self._matcher.get_error()))

    def forced(self) -> list[int]:
        """Tokens that most likely follow, since the grammar leaves no other characters; often none."""
        tokens: list[int] = self._matcher.compute_ff_tokens()
        return tokens

    def num_valid(self, drafts: Sequence[int]) -> int:
        """How many of the drafts, from the first, the grammar allows."""
        return int(self._matcher.validate_tokens(list(drafts)))

    def masks(self, drafts: Sequence[int]) -> list[NDArray[np.bool_]]:
        """What may follow (V,) now and after each of the drafts. Leaves the text where it is."""
        masks = [self._mask()]
        num_taken = 0
        for draft in drafts:
            if not self._matcher.try_consume_tokens([draft]):
                break
            num_taken += 1
            masks.append(self._mask())
        if num_taken:
            self._matcher.rollback(num_taken)
        return masks

    def _mask(self) -> NDArray[np.bool_]:
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
        mask: NDArray[np.bool_] = bits[: self._owner.num_choices].astype(np.bool_)
        if bits[self._end]:
            mask[self._owner.eos_ids] = True
        return mask


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise MissingExtraError(
            "a structured answer (a JSON schema, a regular expression, a choice or a grammar)", extra="grammar"
        ) from error
    return llguidance


def _grammar(constraint: Constraint) -> str:
    """llguidance's form of a constraint. Raises InputError for what is no JSON or no GBNF."""
    guidance = _llguidance()
    if constraint.kind == "regex":
        return str(guidance.LLMatcher.grammar_from_regex(constraint.text))
    if constraint.kind == "choice":
        choices = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in json.loads(constraint.text))
        return str(guidance.LLMatcher.grammar_from_lark(f"start: {choices}"))
    try:
        if constraint.kind == "json_schema":
            schema = json.loads(constraint.text)
            if not isinstance(schema, dict):  # true allows everything; llguidance wants an object to add its options to
                schema = {"allOf": [schema]}
            return str(guidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=_JSON_STYLE))
        if "::=" in constraint.text:
            from llguidance.gbnf_to_lark import any_to_lark

            return str(guidance.LLMatcher.grammar_from_lark(any_to_lark(constraint.text)))
    except json.JSONDecodeError as error:
        raise InputError(f"json_schema: not JSON, {error.msg} at line {error.lineno} column {error.colno}") from error
    except Exception as error:  # GbnfToLarkError and ValueError, and whatever a parser in another package may raise
        raise InputError(f"{constraint.kind}: {_one_line(error)}") from error
    return str(guidance.LLMatcher.grammar_from_lark(constraint.text))


def _one_line(message: object) -> str:
    """What a parser says, without the picture of the place that it draws."""
    lines = [" ".join(line.split()) for line in str(message).splitlines()]
    lines = [line for line in lines if line and line.strip("^ ") and not (line[0].isdigit() and " | " in line)]
    text = "; ".join(lines)
    return text if len(text) <= 300 else text[:297] + "..."
