"""Examples as token ids with a mark on each token to be learned, fitted to a sequence length. Knows the tokenizer; no model.

A conversation goes through the chat template, turn by turn as the tokenizer's `encode_chat_turns` gives it, so the ids
before an answer are those that `generate` feeds for the same messages. A completion without a template is plain
concatenation: the prompt's ids as `generate --raw` makes them, the completion's, and the end-of-text token.
"""

import array
import hashlib
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from llmctl.core.data.chat import BadRow, Completion, Conversation, Example, read_rows
from llmctl.core.data.packing import EncodedRows
from llmctl.core.errors import InputError, Interrupted
from llmctl.core.tokenizer import CHATML_TEMPLATE, CHATML_TOKENS

if TYPE_CHECKING:
    from llmctl.core.tokenizer import Tokenizer

TooLong = Literal["cut-end", "cut-start", "drop", "error"]

DEFAULT_SEQ_LENS = (256, 1024)
_SEQ_LEN_STEP = 64
_TEMPLATE_TRIALS = 10
"""So many first examples that the template refuses, and none that it takes, say that the template is wrong, not the rows."""

_POLL_EVERY_ROWS = 64
_TELL_EVERY_ROWS = 1024

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
    "{% else %}{{ '### Response:\\n' + message['content'] + eos_token + '\\n\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)
"""The default for any other tokenizer: headings in plain text (Alpaca's words), the end-of-text token after an answer."""


def default_chat_template(tokenizer: "Tokenizer") -> str:
    """The template for conversations on a model that has none; see CHATML_TEMPLATE and PLAIN_TEMPLATE.

    Raises InputError when the tokenizer has neither ChatML's tokens nor an end-of-text token.
    """
    if all(_is_special(tokenizer, text) for text in CHATML_TOKENS):
        template = CHATML_TEMPLATE
    elif tokenizer.eos_id is None:
        raise InputError(
            "the tokenizer has no end-of-text token to put after an answer, and the model no chat template; "
            "give --chat-template FILE with a token that ends an answer"
        )
    else:
        template = PLAIN_TEMPLATE
    return "{{ bos_token }}" + template if tokenizer.adds_bos else template


def with_template(tokenizer: "Tokenizer", template: str) -> "Tokenizer":
    """The same tokenizer with another chat template."""
    import tokenizers

    return type(tokenizer).from_parts(
        tokenizers.Tokenizer.from_str(tokenizer.to_json()),
        bos=tokenizer.bos_token,
        eos=tokenizer.eos_token,
        pad=tokenizer.pad_token,
        chat_template=template,
        model_max_length=tokenizer.model_max_length,
    )


def _is_special(tokenizer: "Tokenizer", text: str) -> bool:
    return tokenizer.token_id(text) in tokenizer.special_ids


class ExampleEncoder:
    """Turns examples into ids and marks. `mask_prompt` leaves the loss to the answers and the token that ends each.

    `chat` has the template that conversations go through; `templated` says that completions go through it too.
    """

    def __init__(self, *, plain: "Tokenizer", chat: "Tokenizer", templated: bool, mask_prompt: bool) -> None:
        self._plain = plain
        self._chat = chat
        self._templated = templated
        self._mask_prompt = mask_prompt

    def encode(self, example: Example) -> tuple[list[int], list[bool]]:
        """(ids, whether each is to be learned). Raises InputError when the template refuses the turns."""
        if isinstance(example, Completion) and self._templated:
            example = example.as_conversation()
        ids: list[int] = []
        learn: list[bool] = []
        for part, is_answer in self._segments(example):
            ids += part
            learn += [is_answer or not self._mask_prompt] * len(part)
        return ids, learn

    def _segments(self, example: Example) -> list[tuple[list[int], bool]]:
        if isinstance(example, Conversation):
            return self._chat.encode_chat_turns([{"role": m.role, "content": m.content} for m in example.messages])
        end = self._plain.eos_id
        if end is None:
            raise InputError("the tokenizer has no end-of-text token to put after a completion; give --chat-template FILE")
        completion = self._plain.encode(example.completion, add_bos=False)
        return [(self._plain.encode(example.prompt, add_bos=self._plain.adds_bos), False), ([*completion, end], True)]


@dataclass(frozen=True)
class EncodedExamples:
    """Examples at full length, and where each came from: files[file_of[i]], row number_of[i]."""

    rows: EncodedRows
    files: tuple[Path, ...]
    file_of: NDArray[np.int32]
    number_of: NDArray[np.int64]

    def name(self, index: int) -> str:
        """How messages call example `index`."""
        return f"{self.files[int(self.file_of[index])]}: row {int(self.number_of[index])}"


class _Collector:
    """Grows EncodedExamples; five bytes a token."""

    def __init__(self, files: tuple[Path, ...]) -> None:
        self._files = files
        self._ids, self._learn = array.array("i"), bytearray()
        self._ends, self._file_of, self._number_of = array.array("q"), array.array("i"), array.array("q")

    def add(self, ids: list[int], learn: list[bool], *, file: int, number: int) -> None:
        self._ids.extend(ids)
        self._learn.extend(learn)
        self._ends.append(len(self._ids))
        self._file_of.append(file)
        self._number_of.append(number)

    def done(self) -> EncodedExamples:
        rows = EncodedRows(
            ids=np.array(self._ids, dtype=np.int32),
            learn=np.frombuffer(bytes(self._learn), dtype=np.uint8).astype(np.bool_),
            ends=np.array(self._ends, dtype=np.int64),
        )
        return EncodedExamples(rows, self._files, np.array(self._file_of, dtype=np.int32), np.array(self._number_of, dtype=np.int64))


@dataclass(frozen=True)
class Loaded:
    """What the files held. `digest` is over the examples of all of them, in order; ids and template have hashes of their own."""

    train: EncodedExamples
    held_out: EncodedExamples
    bad_rows: tuple[BadRow, ...]
    num_rows: int
    uses_conversations: bool
    digest: str


def load_examples(
    files: Iterable[Path],
    encoder: ExampleEncoder,
    *,
    skip_bad: bool,
    held_out_fraction: float = 0.0,
    stop: Callable[[], int | None] = lambda: None,
) -> Generator[int, None, Loaded]:
    """Read, check and encode every row of `files`, in order; yields the number of rows read now and then, returns them all.

    An example is held out when the hash of its text falls below `held_out_fraction`, so equal examples stay together and
    a file that grows moves none. Raises InputError naming the row and the rule for a bad row (unless `skip_bad`), and when
    no row is good; Interrupted when `stop` gives a signal's number.
    """
    paths = tuple(files)
    train, held_out = _Collector(paths), _Collector(paths)
    digest = hashlib.sha256()
    bad: list[BadRow] = []
    num_rows = num_encoded = 0
    uses_conversations = False
    for place, path in enumerate(paths):
        for row in read_rows(path):
            num_rows += 1
            if num_rows % _POLL_EVERY_ROWS == 0 and (number := stop()) is not None:
                raise Interrupted("stopped while reading the rows; nothing was written", signal_number=number)
            if num_rows % _TELL_EVERY_ROWS == 0:
                yield num_rows
            problem = row if isinstance(row, BadRow) else None
            if not isinstance(row, BadRow):
                try:
                    encoded = [(example, *encoder.encode(example)) for example in row.examples]
                except InputError as error:
                    problem = BadRow(row.file, row.number, str(error))
                    if num_encoded == 0 and len(bad) >= _TEMPLATE_TRIALS:
                        raise InputError(f"{problem}; the {len(bad)} rows before it failed too") from error
                else:
                    for example, ids, learn in encoded:
                        text = example.canonical().encode("utf-8")
                        digest.update(len(text).to_bytes(8, "little") + text)
                        side = held_out if _hash_fraction(text) < held_out_fraction else train
                        side.add(ids, learn, file=place, number=row.number)
                        uses_conversations |= isinstance(example, Conversation)
                    num_encoded += len(encoded)
            if problem is not None:
                if not skip_bad:
                    raise InputError(f"{problem}; mend the row, or leave out such rows with --on-error skip")
                bad.append(problem)
    if not num_encoded:
        names = ", ".join(map(str, paths))
        raise InputError(f"{names}: none of {num_rows} rows is good, the first: {bad[0]}" if bad else f"{names}: no rows")
    return Loaded(train.done(), held_out.done(), tuple(bad), num_rows, uses_conversations, digest.hexdigest())


def _hash_fraction(text: bytes) -> float:
    """A number in [0, 1) that follows from the text alone."""
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") / 2**64


def default_seq_len(examples: EncodedExamples, *, max_positions: int) -> int:
    """What holds the longest example, from 256 to 1024; less where the model sees less or all examples fill less.

    A few times the usual row is enough to pack well, and short sequences leave small data enough of them for steps.
    """
    sizes = examples.rows.lengths - 1
    wanted = min(DEFAULT_SEQ_LENS[1], max(DEFAULT_SEQ_LENS[0], _rounded(int(sizes.max()))))
    return min(wanted, max_positions, _rounded(int(sizes.sum())))


def _rounded(num_tokens: int) -> int:
    return -(-num_tokens // _SEQ_LEN_STEP) * _SEQ_LEN_STEP


@dataclass(frozen=True)
class Fitted:
    """Examples that fit a sequence and teach something, and how many did not."""

    rows: EncodedRows
    num_examples: int
    num_cut: int
    num_too_long: int
    """Examples longer than a sequence: cut or dropped."""
    num_empty: int
    """Examples dropped because no token to learn was left."""
    num_tokens: int
    num_learned: int
    """Tokens with a loss."""


def fit_examples(examples: EncodedExamples, *, seq_len: int, too_long: TooLong, drop_empty: bool) -> Fitted:
    """Bring every example to at most seq_len + 1 tokens (seq_len next-token places).

    `too_long`: cut-end keeps the beginning, cut-start the end, drop leaves the example out, error refuses. An example that
    then has no token to learn is an error unless `drop_empty`: a loss over nothing would read as 0.0 and teach nothing.
    Raises InputError naming the first such row, or when nothing is left.
    """
    limit = seq_len + 1
    kept: list[slice] = []
    num_cut = num_too_long = num_empty = 0
    first_empty: int | None = None
    start = 0
    for index, end in enumerate(examples.rows.ends.tolist()):
        part = slice(start, end)
        start = end
        if part.stop - part.start > limit:
            num_too_long += 1
            if too_long == "error":
                length = part.stop - part.start
                raise InputError(
                    f"{examples.name(index)} has {length:,} tokens, more than the {limit:,} that --seq-len {seq_len} takes; "
                    "raise --seq-len or choose --too-long cut-end, cut-start or drop"
                )
            if too_long == "drop":
                continue
            num_cut += 1
            part = slice(part.start, part.start + limit) if too_long == "cut-end" else slice(part.stop - limit, part.stop)
        if not examples.rows.learn[part.start + 1 : part.stop].any():
            num_empty += 1
            first_empty = index if first_empty is None else first_empty
            continue
        kept.append(part)
    if first_empty is not None and not drop_empty:
        raise InputError(
            f"{num_empty:,} of {len(examples.rows):,} rows have no answer token within --seq-len {seq_len}, the first: "
            f"{examples.name(first_empty)}; raise --seq-len, or leave such rows out with --drop-empty"
        )
    if not kept:
        raise InputError(f"none of {len(examples.rows):,} rows fits --seq-len {seq_len} with an answer to learn; raise --seq-len")
    rows = _select(examples.rows, kept)
    learned = int(rows.learn.sum()) - int(rows.learn[np.concatenate(([0], rows.ends[:-1]))].sum())
    return Fitted(
        rows=rows,
        num_examples=len(kept),
        num_cut=num_cut,
        num_too_long=num_too_long,
        num_empty=num_empty,
        num_tokens=len(rows.ids),
        num_learned=learned,
    )


def _select(rows: EncodedRows, parts: list[slice]) -> EncodedRows:
    if len(parts) == len(rows) and sum(p.stop - p.start for p in parts) == len(rows.ids):
        return rows
    return EncodedRows(
        ids=np.concatenate([rows.ids[p] for p in parts]),
        learn=np.concatenate([rows.learn[p] for p in parts]),
        ends=np.cumsum([p.stop - p.start for p in parts], dtype=np.int64),
    )
