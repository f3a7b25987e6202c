"""From prompts and texts to the token sequences that are scored. Knows a tokenizer; knows no model and no torch."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from llmctl.core.errors import InputError
from llmctl.core.evals.items import Item
from llmctl.core.tokenizer import Tokenizer

EntryT = TypeVar("EntryT")


@dataclass(frozen=True)
class Group:
    """Continuations of one context, as token ids. A context has at least one token, and so has a continuation."""

    context: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that the model reads: the last token of a continuation is only predicted."""
        return len(self.context) + max(len(ids) for ids in self.continuations) - 1


@dataclass(frozen=True)
class Question:
    """One item, ready for the model: groups that are scored together, and how much of the prompt did not fit.

    There is one group, except where the prompt had to be cut by another length for each continuation.
    """

    item: Item
    groups: tuple[Group, ...]
    num_cut_tokens: int
    """Tokens cut from the left of the prompt, for the continuation that lost most; 0 when all fit."""

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(group.longest for group in self.groups)

    @property
    def num_sequences(self) -> int:
        """Continuations of the item."""
        return sum(len(group.continuations) for group in self.groups)

    @property
    def digest(self) -> str:
        """16 hex digits of the ids: two questions with equal digests have equal scores."""
        ids = repr([(group.context, group.continuations) for group in self.groups])
        return hashlib.sha256(ids.encode()).hexdigest()[:16]


class Prefix:
    """What stands before every text: BOS, or nothing.

    `bos` is "auto" (as the model's own tokenizer does it), "yes" (BOS, or the end-of-text token where there is no BOS)
    or "no". Raises InputError when "yes" has nothing to put there.
    """

    def __init__(self, tokenizer: Tokenizer, bos: str) -> None:
        start = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
        wanted = bos == "yes" or (bos == "auto" and tokenizer.adds_bos)
        if wanted and start is None:
            raise InputError("--bos yes: the tokenizer has neither a BOS nor an EOS token; use --bos no")
        self.token_id: int | None = start if wanted else None
        self.start_id = start
        """What an empty context is replaced by, since the first token needs something before it."""

    @property
    def ids(self) -> tuple[int, ...]:
        """The tokens put before a text: one or none."""
        return () if self.token_id is None else (self.token_id,)


def encode_items(tokenizer: Tokenizer, items: Sequence[Item], *, prefix: Prefix, context_size: int) -> Iterator[Question]:
    """Questions of `items`, in order, each within `context_size` input tokens.

    As lm-evaluation-harness does it (`lm_eval/api/model.py`, `_encode_pair`): spaces at the prompt's end move to the
    continuation; prompt + continuation are encoded whole and split at the length of the prompt's own encoding; what does
    not fit is cut from the prompt's left. Raises InputError for a continuation that does not fit by itself.
    """
    prompts = [item.prompt.rstrip() for item in items]
    wholes = [item.prompt + text for item in items for text in item.continuations]
    encoded_prompts = tokenizer.encode_batch(prompts, add_bos=False)
    encoded = iter(tokenizer.encode_batch(wholes, add_bos=False))
    for item, prompt_ids in zip(items, encoded_prompts, strict=True):
        continuations = [tuple(next(encoded)[len(prompt_ids) :]) for _ in item.continuations]
        yield _fit(item, (*prefix.ids, *prompt_ids), continuations, prefix=prefix, context_size=context_size)


def _fit(item: Item, context: tuple[int, ...], continuations: list[tuple[int, ...]], *, prefix: Prefix, context_size: int) -> Question:
    where = f"item {item.index} (line {item.line})"
    if not context:
        if prefix.start_id is None:
            raise InputError(f"{where}: the prompt is empty and the tokenizer has no BOS or EOS to stand for it")
        context = (prefix.start_id,)
    for ids in continuations:
        if not ids:
            raise InputError(f"{where}: a continuation melts into the prompt's last token; nothing is left to score")
        if len(ids) > context_size:
            raise InputError(f"{where}: a continuation has {len(ids):,} tokens, more than the context of {context_size:,}")
    whole = Group(context, tuple(continuations))
    if whole.longest <= context_size:
        return Question(item, (whole,), 0)
    # Each continuation keeps as much of the prompt as fits before it, so the contexts differ in where they start.
    rooms = [min(len(context), context_size + 1 - len(ids)) for ids in continuations]
    groups = tuple(Group(context[len(context) - room :], (ids,)) for room, ids in zip(rooms, continuations, strict=True))
    return Question(item, groups, len(context) - min(rooms))


@dataclass(frozen=True)
class Window:
    """A stretch of a token sequence: [start, end), of which the last `num_scored` are scored given those before."""

    start: int
    end: int
    num_scored: int


def windows(num_tokens: int, *, context_size: int, stride: int) -> Iterator[Window]:
    """Cut a sequence so that every token but the first is scored once, with at most `context_size` tokens before it.

    The first window scores up to `context_size` tokens, each later one `stride` more, read with a full context. So a token
    is preceded by at least min(its position, context_size - stride + 1) tokens of its text. With stride = context_size
    this is lm-evaluation-harness's rolling log-likelihood; with a smaller one, the strided perplexity of the
    transformers documentation.
    """
    done = 1
    while done < num_tokens:
        end = min(done + (context_size if done == 1 else stride), num_tokens)
        yield Window(max(0, end - 1 - context_size), end, end - done)
        done = end


@dataclass(frozen=True)
class BatchLimit:
    """How much the model is given at once: sequences, and tokens with their padding (None: as many as the sequences have)."""

    num_sequences: int
    num_tokens: int | None = None

    def cut(
        self, entries: Sequence[EntryT], *, longest: Callable[[EntryT], int], num_sequences: Callable[[EntryT], int]
    ) -> list[list[EntryT]]:
        """Batches of `entries`, which come longest first and are never split: one that is over the limit goes alone."""
        batches: list[list[EntryT]] = []
        used = room = 0
        for entry in entries:
            if not batches or used + num_sequences(entry) > room:
                batches.append([])
                used, room = 0, self.num_sequences
                if self.num_tokens is not None:
                    room = min(room, self.num_tokens // longest(entry))
            batches[-1].append(entry)
            used += num_sequences(entry)
        return batches
