"""The batch job: rows in, one result row for each, whatever happens on the way. Knows rows and results; no terminal."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from llmctl.core.errors import InputError, LlmctlError
from llmctl.core.infer.best import best_of
from llmctl.core.infer.constrain import Constraint
from llmctl.core.infer.defaults import merged
from llmctl.core.infer.engine import never_stop
from llmctl.core.infer.events import Failed, Finished, Request, Warned
from llmctl.core.infer.generator import Generator
from llmctl.core.infer.logprobs import logprob_rows
from llmctl.core.infer.openai_rows import Reply, answer, refusal
from llmctl.core.infer.order import InOrder
from llmctl.core.infer.results import ResultFile, result_key
from llmctl.core.infer.rows import BadRow, Row, id_key
from llmctl.core.infer.sampler import SamplingParams

_WHOLE_BYTES = 8 << 20
_SAMPLE_BYTES, _NUM_SAMPLES = 1 << 18, 32
_HASHED = (".safetensors", ".json", ".jinja", ".gguf", ".txt", ".model")


@dataclass(frozen=True, kw_only=True)
class RowDone:
    """A result is there (and in the result file, if there is one)."""

    row: Mapping[str, Any]
    num_prompt_tokens: int
    num_new_tokens: int
    num_texts: int = 1
    """How many of the texts that a job of so many rows and samples comes to."""


@dataclass(frozen=True, kw_only=True)
class RowFailed:
    """A row has no result (and stands in the errors file, if there is one). `error` names its line."""

    row: Mapping[str, Any]
    error: str
    num_texts: int = 1


@dataclass(frozen=True, kw_only=True)
class BatchFinished:
    """The job has ended; counts of results, those of earlier runs apart. `interrupted` says that rows are left."""

    num_done: int
    num_failed: int
    num_skipped: int
    num_cut: int
    num_new_tokens: int
    interrupted: bool


BatchEvent = RowDone | RowFailed | Warned | BatchFinished


@dataclass(frozen=True, kw_only=True)
class BatchSettings:
    """What holds for every row that does not say otherwise."""

    params: SamplingParams
    seed: int
    stop: tuple[str, ...] = ()
    max_new_tokens: int | None = None
    num_samples: int = 1
    best_of: int | None = None
    """Make so many texts of each row and keep the `num_samples` best, see `best`."""
    num_logprobs: int | None = None
    ignore_eos: bool = False
    min_new_tokens: int = 0
    constraint: Constraint | None = None
    ordered: bool = False
    """Give results in the order of the rows: one that is finished early waits for those before it."""
    tell_line: bool = False
    """Put the line of the input into each result, by which shards are joined in order."""


@dataclass
class _Choices:
    """The texts of a row that is answered by one result."""

    reply: Reply
    num_wanted: int
    texts: dict[int, Finished] = field(default_factory=dict)


@dataclass
class _Pending:
    """What a result needs of its row. Kept while the row is under way."""

    row: Row
    num_cut: int
    is_greedy: bool
    place: int
    choices: _Choices | None = None


def run_batch(
    rows: Iterable[Row | BadRow | None],
    generator: Generator,
    settings: BatchSettings,
    *,
    results: ResultFile | None = None,
    stop: Callable[[], int | None] = never_stop,
) -> Iterator[BatchEvent]:
    """Answer the rows (None: there is none yet) and append each result to `results` as it is finished.

    Rows whose results are there are skipped. A bad row is an error row; the others go on. When `stop` gives a number,
    texts under way are dropped: they are made again by the next run. Raises WriteError and NonFiniteError.
    """
    job = _Job(generator, settings, results)
    events = generator.engine.run(job.requests(rows), stop=stop)
    for event in best_of(events, job.take_counts):
        if isinstance(event, Finished):
            if event.finish != "interrupted" and job.awaits(event):
                yield from job.done(event)
        elif isinstance(event, Failed):
            if job.awaits(event):
                yield from job.failed(event)
        elif isinstance(event, Warned):
            yield event
        if results is not None:
            results.sync_if_due()
    if results is not None:
        results.sync()
    yield job.summary(interrupted=stop() is not None)


class _Job:
    def __init__(self, generator: Generator, settings: BatchSettings, results: ResultFile | None) -> None:
        self._generator, self._settings, self._results = generator, settings, results
        self._pending: dict[str, _Pending] = {}
        self._refused_rows: dict[int, tuple[Row | BadRow, int]] = {}
        self._order: InOrder[RowDone | RowFailed] | None = InOrder() if settings.ordered else None
        self._counts: dict[int | str, tuple[int, int]] = {}  # of ids whose samples are compared: made, kept
        self._num_places = 0
        self._seen: set[str] = set()
        self._num_done = self._num_failed = self._num_skipped = self._num_cut = self._num_new_tokens = 0

    def requests(self, rows: Iterable[Row | BadRow | None]) -> Iterator[Request | Failed | None]:
        """Requests for the rows, made when the engine asks for them."""
        for row in rows:
            if row is None:
                yield None
            else:
                yield from self._requests_of(row)

    def _requests_of(self, row: Row | BadRow) -> Iterator[Request | Failed]:
        if isinstance(row, Row) and id_key(row.id) in self._seen:
            error = f"line {row.line}: the id {id_key(row.id)} has been used before"
            row = BadRow(line=row.line, id=row.id, error=error, is_openai=row.reply is not None)
        elif isinstance(row, Row):
            self._seen.add(id_key(row.id))
        if isinstance(row, BadRow):
            yield self._refused(row, row.error)
            return
        done = self._results.done if self._results is not None else ()
        num_samples = self._num_results(row)
        if row.reply is not None:
            samples = [] if result_key(row.id, 0) in done else list(range(num_samples))
            self._num_skipped += not samples
        else:
            samples = [s for s in range(num_samples) if result_key(row.id, s) not in done]
            self._num_skipped += num_samples - len(samples)
        if not samples:
            return
        try:
            requests, num_cut = self._made(row, samples)
        except LlmctlError as error:
            yield self._refused(row, f"line {row.line}: {error}")
            return
        self._num_cut += bool(num_cut)
        is_greedy = requests[0].params.is_greedy
        if row.reply is not None:
            choices = _Choices(replace(row.reply, num_logprobs=self._num_logprobs(row)), num_samples)
            pending = _Pending(row, num_cut, is_greedy, self._place(), choices)
            self._pending |= {result_key(row.id, sample): pending for sample in samples}
        else:
            self._pending |= {result_key(row.id, sample): _Pending(row, num_cut, is_greedy, self._place()) for sample in samples}
        yield from requests

    def _num_results(self, row: Row) -> int:
        """How many texts of a row are wanted."""
        said = None if row.reply is None else row.reply.num_choices
        return self._settings.num_samples if said is None else said

    def take_counts(self, id: int | str) -> tuple[int, int] | None:
        """How many samples of a row are made and kept, when they are compared; asked once."""
        return self._counts.pop(id, None)

    def _num_logprobs(self, row: Row) -> int | None:
        """How many log-probabilities the result of a row tells."""
        said = row.num_logprobs if row.reply is None else row.reply.num_logprobs
        return self._settings.num_logprobs if said is None else said

    def _made(self, row: Row, samples: list[int]) -> tuple[list[Request], int]:
        settings, prompter = self._settings, self._generator.prompter
        max_new_tokens = settings.max_new_tokens if row.max_new_tokens is None else row.max_new_tokens
        num_made = settings.best_of if row.best_of is None else row.best_of
        num_kept = self._num_results(row)
        if num_made is not None and num_made < num_kept:
            raise InputError(f"best_of is {num_made:,}, less than the {num_kept:,} texts that are to be kept")
        num_logprobs = self._num_logprobs(row)
        if row.prompt is not None:
            is_raw = row.reply is not None
            prompt = prompter.from_text(row.prompt, system=row.system, max_new_tokens=max_new_tokens, raw=is_raw)
        else:
            prompt = prompter.from_messages(row.messages, max_new_tokens=max_new_tokens)
        if num_made is not None:
            self._counts[row.id] = num_made, num_kept
        params = merged(settings.params, row.sampling)
        requests = [
            self._generator.request_for(
                prompt,
                id=row.id,
                sample_index=sample,
                seed=settings.seed if row.seed is None else row.seed,
                stop=settings.stop if row.stop is None else row.stop,
                params=params,
                num_logprobs=0 if num_logprobs is None and num_made is not None else num_logprobs,
                ignore_eos=settings.ignore_eos if row.ignore_eos is None else row.ignore_eos,
                min_new_tokens=settings.min_new_tokens if row.min_new_tokens is None else row.min_new_tokens,
                constraint=settings.constraint if row.constraint is None else row.constraint,
            )
            for sample in (samples if num_made is None else range(num_made))
        ]
        return requests, prompt.num_cut

    def _refused(self, row: Row | BadRow, error: str) -> Failed:
        self._refused_rows[row.line] = row, self._place()
        return Failed(id=row.id, sample_index=0, error=error, line=row.line)

    def _place(self) -> int:
        """The next place in the order of the results."""
        self._num_places += 1
        return self._num_places - 1

    def _told(self, row: dict[str, Any], pending: _Pending) -> dict[str, Any]:
        """A result with what stands at its end where there is something to tell."""
        if pending.num_cut:
            row["num_cut"] = pending.num_cut
        if self._settings.tell_line:
            row["line"] = pending.row.line
        return row

    def _given(self, outcome: RowDone | RowFailed, place: int) -> Iterator[RowDone | RowFailed]:
        """Write the outcomes whose turn has come, and give them."""
        for due in [outcome] if self._order is None else self._order.put(place, outcome):
            if isinstance(due, RowDone):
                if self._results is not None:
                    self._results.append(due.row)
                self._num_done += 1
                self._num_new_tokens += due.num_new_tokens
            else:
                if self._results is not None:
                    self._results.append_error(due.row)
                self._num_failed += 1
            yield due

    def awaits(self, event: Finished | Failed) -> bool:
        """Whether the event's result is wanted: with best_of, an earlier run may have left some of a row's."""
        return (isinstance(event, Failed) and event.line is not None) or result_key(event.id, event.sample_index) in self._pending

    def done(self, event: Finished) -> Iterator[RowDone | RowFailed]:
        """A text is finished: its result row, appended; with an order, what is due."""
        pending = self._pending.pop(result_key(event.id, event.sample_index))
        if pending.choices is not None:
            yield from self._chosen(event, pending, pending.choices)
            return
        row: dict[str, Any] = {"id": event.id}
        if self._settings.num_samples > 1:
            row["sample"] = event.sample_index
        row |= pending.row.extra
        row |= {
            "text": event.text,
            "finish": event.finish,
            "num_prompt_tokens": event.num_prompt_tokens,
            "num_new_tokens": event.num_new_tokens,
            "seed": None if pending.is_greedy else event.seed,
        }
        if event.score is not None:
            row["score"] = event.score
        if event.logprobs is not None and self._num_logprobs(pending.row) is not None:
            row["logprobs"] = logprob_rows(event.token_ids, event.logprobs, self._generator.tokenizer.token_text)
        outcome = RowDone(row=self._told(row, pending), num_prompt_tokens=event.num_prompt_tokens, num_new_tokens=event.num_new_tokens)
        yield from self._given(outcome, pending.place)

    def _chosen(self, event: Finished, pending: _Pending, choices: _Choices) -> Iterator[RowDone | RowFailed]:
        """One of the texts of a row that is answered by one result: the result, when all are there."""
        choices.texts[event.sample_index] = event
        if len(choices.texts) < choices.num_wanted:
            return
        texts = [choices.texts[index] for index in range(choices.num_wanted)]
        model, token_text = self._generator.path.name, self._generator.tokenizer.token_text
        row = answer(choices.reply, str(event.id), texts, model=model, token_text=token_text)
        row |= pending.row.extra
        outcome = RowDone(
            row=self._told(row, pending),
            num_prompt_tokens=event.num_prompt_tokens,
            num_new_tokens=sum(text.num_new_tokens for text in texts),
            num_texts=self._settings.num_samples,
        )
        yield from self._given(outcome, pending.place)

    def failed(self, event: Failed) -> Iterator[RowDone | RowFailed]:
        """A request has failed: its error row, appended; with an order, what is due."""
        record: dict[str, Any] = {"id": event.id}
        num_texts = 1
        if event.line is not None:
            (row, place), error = self._refused_rows.pop(event.line), event.error
            num_texts = self._settings.num_samples
        else:
            pending = self._pending.pop(result_key(event.id, event.sample_index))
            row, place = pending.row, pending.place
            error = f"line {row.line}: {event.error}"
            if pending.choices is not None:
                num_texts = self._settings.num_samples
                for index in range(pending.choices.num_wanted):  # the row has failed as a whole
                    self._pending.pop(result_key(event.id, index), None)
            elif self._settings.num_samples > 1:
                record["sample"] = event.sample_index
        if row.is_openai if isinstance(row, BadRow) else row.reply is not None:
            record = refusal(str(event.id), error, is_fault_of_row=event.line is not None)
        if isinstance(row, Row):
            record |= row.extra
        record |= {"line": row.line} if "response" in record else {"line": row.line, "error": error}
        yield from self._given(RowFailed(row=record, error=error, num_texts=num_texts), place)

    def summary(self, *, interrupted: bool) -> BatchFinished:
        """The counts."""
        return BatchFinished(
            num_done=self._num_done,
            num_failed=self._num_failed,
            num_skipped=self._num_skipped,
            num_cut=self._num_cut,
            num_new_tokens=self._num_new_tokens,
            interrupted=interrupted,
        )


def input_facts(file: IO[bytes]) -> tuple[str, int]:
    """sha256 of what is left of a file, and how many lines it has, in one reading."""
    digest, num_lines, last = hashlib.sha256(), 0, b"\n"
    while block := file.read(1 << 20):
        digest.update(block)
        num_lines += block.count(b"\n")
        last = block[-1:]
    return digest.hexdigest(), num_lines + (last != b"\n")


def model_fingerprint(path: Path) -> str:
    """64 hex digits that tell models apart: names, sizes and contents of the files, of large ones 8 MB spread over them.

    Sampled, since reading all weights of a large model would take longer than many a job; it is there to notice another
    model, not a flipped bit.
    """
    digest = hashlib.sha256()
    path = Path(path)
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in _HASHED and p.is_file())
    for file in files:
        num_bytes = file.stat().st_size
        digest.update(f"{file.name}\0{num_bytes}\0".encode("utf-8", "surrogateescape"))
        with open(file, "rb") as content:
            if num_bytes <= _WHOLE_BYTES:
                digest.update(content.read())
                continue
            for number in range(_NUM_SAMPLES):
                content.seek((num_bytes - _SAMPLE_BYTES) * number // (_NUM_SAMPLES - 1))
                digest.update(content.read(_SAMPLE_BYTES))
    return digest.hexdigest()
