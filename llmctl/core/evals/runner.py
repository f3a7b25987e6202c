"""Runs an evaluation from its config: loads data and model, scores, and tells it as events. Draws and writes nothing,
except for the progress files that let the same command go on after a kill.

Cheap mistakes are found first: task files, their data and all prompts are read before the model is.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch

from llmctl.core.checkpoint import LoadedModel, check_tokenizer, load_model, load_model_and_tokenizer, resolve_adapted
from llmctl.core.config.evaluate import EvaluateConfig
from llmctl.core.distributed.ranks import Ranks, joined
from llmctl.core.errors import Interrupted, UsageError
from llmctl.core.evals import texts
from llmctl.core.evals.events import Event, ItemScored, ModelReady, Planned, Progressed, TaskScored, TextScored, Warned
from llmctl.core.evals.fingerprint import model_sha256
from llmctl.core.evals.gates import check_gate_names
from llmctl.core.evals.items import DataSet, Item, Renderer, load_rows
from llmctl.core.evals.metrics import ItemScore, aggregate, item_values
from llmctl.core.evals.perplexity import Definition, combine, score_text
from llmctl.core.evals.progress import Progress, default_cache_dir, job_key
from llmctl.core.evals.scoring import score_groups
from llmctl.core.evals.task import Task, load_task
from llmctl.core.evals.together import open_progress, scored
from llmctl.core.evals.tokens import BatchLimit, Prefix, Question, encode_items
from llmctl.core.model import Decoder
from llmctl.core.model.device import choose_device, compute_dtype
from llmctl.core.quant import Layout
from llmctl.core.tokenizer import Tokenizer

_TEXT_CONTEXT = 2048
"""Longest default context for text: beyond it, attention costs more than the context still gains."""
_ENCODE_ITEMS = 1024
"""Items tokenised in one call."""


@dataclass(frozen=True)
class PreparedTask:
    """A task with its data read and its prompts rendered."""

    task: Task
    data: DataSet
    items: tuple[Item, ...]


def evaluate(
    config: EvaluateConfig,
    *,
    stop: Callable[[], int | None] = lambda: None,
    stdin: IO[bytes] | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Iterator[Event]:
    """Evaluate as `config` says; the last events are TaskScored and TextScored, one for each task and text.

    `stop` is asked between batches; it gives the number of a stop signal or None. Raises LlmctlError of every kind that
    DESIGN's table names for bad inputs, and Interrupted after a signal: the same command goes on from there.
    """
    if not config.texts and not config.task_names:
        raise UsageError("nothing to evaluate: give TEXTFILES, or --tasks NAME with --data DIR")
    with joined(cuda=choose_device(config.device).type == "cuda", timeout_s=config.rank_timeout) as ranks:
        if ranks.size > 1 and Path("-") in config.texts:
            raise UsageError("TEXTFILES: stdin can be read once only, not by several processes; name a file")
        yield from _evaluate(config, ranks, stop, stdin, environ)


def _evaluate(
    config: EvaluateConfig, ranks: Ranks, own_stop: Callable[[], int | None], stdin: IO[bytes] | None, environ: Mapping[str, str]
) -> Iterator[Event]:
    prepared = [prepare_task(name, config) for name in config.task_names]
    names = [entry.task.name for entry in prepared]
    if len(set(names)) != len(names):
        raise UsageError(f"--tasks: two task files have the same name in {', '.join(names)}; rename one")
    found = texts.open_texts(config, stdin=stdin)
    check_gate_names(config, [entry.task for entry in prepared])
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    loaded, tokenizer = _load(config)
    limit = config.seq_len if config.seq_len is not None else loaded.config.max_positions
    if limit > loaded.config.max_positions:
        raise UsageError(f"--seq-len {limit}: the model reads at most {loaded.config.max_positions:,} tokens")
    ready = ModelReady(
        path=str(loaded.path),
        sha256=model_sha256(loaded.path, tokenizer, adapter=loaded.adapter),
        num_parameters=sum(parameter.numel() for parameter in loaded.model.parameters()),
        dtype=loaded.number_format,
        device=str(loaded.model.device),
        threads=torch.get_num_threads(),
        context_size=limit,
    )
    yield ready
    if loaded.note is not None:
        yield Warned(text=loaded.note)
    ranks.wait()  # one may have taken longer to load
    job = _Job(config, loaded.model, tokenizer, Prefix(tokenizer, config.bos), ready, own_stop, environ, ranks)
    if found:
        yield from job.texts(found)
    for entry in prepared:
        yield from job.task(entry)


def prepare_task(reference: str, config: EvaluateConfig) -> PreparedTask:
    """Read a task and its data, and render its items. Raises UsageError, NotFoundError or InputError."""
    task = load_task(reference)
    folder = config.data
    if folder is None:
        if not reference.endswith(".toml"):
            raise UsageError(f"--tasks {reference}: give the folder of its data ({' or '.join(task.dataset)}) with --data DIR")
        folder = task.path.parent
    data = load_rows(task.dataset, folder, task=task, labels=task.labels)
    examples = None
    if config.num_fewshot and task.fewshot_dataset:
        examples = load_rows(task.fewshot_dataset, folder, task=task, labels=None)
    renderer = Renderer(task, data, num_fewshot=config.num_fewshot, seed=config.seed, examples=examples)
    return PreparedTask(task, data, tuple(renderer.item(row) for row in data.rows[: config.limit]))


def _load(config: EvaluateConfig) -> tuple[LoadedModel, Tokenizer]:
    path, adapter = resolve_adapted(config.model, config.adapter)
    device = choose_device(config.device)
    dtype = compute_dtype(config.dtype, device)
    quant = cast(Layout | None, config.quant)
    if config.tokenizer is None:
        return load_model_and_tokenizer(path, dtype=dtype, device=device, quant=quant, adapt=True, adapter=adapter)
    tokenizer = Tokenizer.load(config.tokenizer)
    loaded = load_model(path, dtype=dtype, device=device, quant=quant, adapt=True, adapter=adapter)
    check_tokenizer(tokenizer, loaded.config, where=f"--tokenizer {config.tokenizer}")
    return loaded, tokenizer


def batch_limit(batch_size: int | None, device: torch.device) -> BatchLimit:
    """What --batch-size says; without it, tokens enough for the matrix products to be at their best.

    On a CPU that is soon; a GPU wants more, and has the memory. A small batch answers a signal sooner, too.
    """
    if batch_size is not None:
        return BatchLimit(batch_size)
    return BatchLimit(64, 2048) if device.type == "cpu" else BatchLimit(256, 65_536)


class _Job:
    """One evaluation under way: what every task and text needs."""

    def __init__(
        self,
        config: EvaluateConfig,
        model: Decoder,
        tokenizer: Tokenizer,
        prefix: Prefix,
        ready: ModelReady,
        stop: Callable[[], int | None],
        environ: Mapping[str, str],
        ranks: Ranks,
    ) -> None:
        self._config = config
        self._model = model
        self._tokenizer = tokenizer
        self._prefix = prefix
        self._ready = ready
        self._stop, self._ranks = ranks.agreed(stop), ranks
        self._limit = batch_limit(config.batch_size, model.device)
        self._bos = None if prefix.token_id is None else tokenizer.token_text(prefix.token_id)
        self._cache_dir = (config.cache_dir or default_cache_dir(environ)) if config.cache else None

    def check_stop(self) -> None:
        """Raise Interrupted when a stop signal has come."""
        number = self._stop()
        if number is not None:
            kept = "the finished scores are kept; the same command goes on from there" if self._cache_dir else "nothing was kept"
            raise Interrupted(f"interrupted; {kept}", signal_number=number)

    def _progress(self, kind: str, facts: dict[str, Any], data: dict[str, str]) -> Progress:
        """The progress of one job. Its key holds all that shapes or changes a score; the data's hashes stand beside it."""
        settings = {
            "kind": kind,
            "model": self._ready.sha256,
            "dtype": self._ready.dtype,
            "device": self._ready.device,
            "threads": self._ready.threads,
            "torch": torch.__version__,
            "bos": self._prefix.token_id,
            "batch": [self._limit.num_sequences, self._limit.num_tokens],
            "paths": sorted(data),
        }
        key = job_key(settings | facts)
        return open_progress(self._cache_dir, key, data=data, restart=self._config.restart, ranks=self._ranks)

    def task(self, prepared: PreparedTask) -> Iterator[Event]:
        """Score one task."""
        task, config = prepared.task, self._config
        facts = {"task": task.name, "limit": config.limit, "num_fewshot": config.num_fewshot, "seed": config.seed}
        facts["context_size"] = self._ready.context_size
        hashes = {os.path.abspath(task.path): task.sha256, os.path.abspath(prepared.data.path): prepared.data.sha256}
        progress = self._progress("task", facts, hashes)
        try:
            yield from self._task(prepared, progress)
            yield from _problems(progress)
            progress.finish()
        finally:
            progress.close()

    def _task(self, prepared: PreparedTask, progress: Progress) -> Iterator[Event]:
        task = prepared.task
        questions: list[Question] = []
        for start in range(0, len(prepared.items), _ENCODE_ITEMS):
            self.check_stop()
            items = prepared.items[start : start + _ENCODE_ITEMS]
            questions += encode_items(self._tokenizer, items, prefix=self._prefix, context_size=self._ready.context_size)
        batches = plan_batches(questions, self._limit)
        num_reused = sum(len(batch) for batch in batches if _all_known(batch, progress))
        yield Planned(name=task.name, num_items=len(questions), num_total=len(questions), num_reused=num_reused)
        cut = [question for question in questions if question.num_cut_tokens]
        if cut:
            longest = max(question.num_cut_tokens for question in cut)
            yield Warned(
                text=f"{task.name}: {len(cut):,} of {len(questions):,} prompts did not fit {self._ready.context_size:,} tokens and were "
                f"cut on the left, by up to {longest:,} tokens; fewer --num-fewshot would keep them whole"
            )
        scores: dict[int, ItemScore] = {}
        together = scored(
            batches,
            is_known=lambda batch: _all_known(batch, progress),
            score=lambda batch: _score_batch(self._model, batch),
            progress=progress,
            stop=self.check_stop,
            ranks=self._ranks,
        )
        for batch, _ in together:
            for question in batch:
                scores[question.item.index] = _item_score(question, progress.get(_unit(question)))
            yield Progressed(name=task.name, num_done=len(scores), num_total=len(questions))
        values = []
        for question in questions:
            score = scores[question.item.index]
            values.append(item_values(task.kind, task.metrics, score))
            yield ItemScored(
                task=task.name,
                index=question.item.index,
                line=question.item.line,
                prompt=question.item.prompt,
                choices=question.item.continuations,
                gold=score.gold,
                log_likelihoods=score.log_likelihoods,
                greedy=score.greedy,
                num_cut_tokens=question.num_cut_tokens,
                values=values[-1],
            )
        yield TaskScored(
            name=task.name,
            metrics=aggregate(task.kind, task.metrics, values),
            num_items=len(questions),
            num_fewshot=self._config.num_fewshot,
            seed=self._config.seed,
            num_cut_items=len(cut),
            num_cut_tokens=sum(question.num_cut_tokens for question in cut),
            bos=self._bos,
            context_size=self._ready.context_size,
            data_path=str(prepared.data.path),
            data_sha256=prepared.data.sha256,
            task_path=str(task.path),
            task_sha256=task.sha256,
            num_computed=len(questions) - num_reused,
            num_reused=num_reused,
        )

    def texts(self, sources: Sequence[texts.Text]) -> Iterator[Event]:
        """Score each text, and all together where there are several."""
        context_size = self._config.seq_len or min(self._ready.context_size, _TEXT_CONTEXT)
        stride = self._config.stride or context_size
        if stride > context_size:
            raise UsageError(f"--stride {stride}: more than the context of {context_size} tokens; tokens would be left out")
        results: list[TextScored] = []
        definition = Definition(context_size, stride, self._bos)
        for source in sources:
            definition = Definition(context_size, stride, self._bos, whole_stream=source.whole_stream)
            facts = {"context_size": context_size, "stride": stride, "limit": self._config.limit, "field": self._config.field}
            # What changed in a text shows in the windows' own hashes; only these are computed again.
            progress = self._progress("text", facts | {"text": os.path.abspath(source.name)}, {})
            try:
                yield Planned(name=source.name, num_items=None, num_total=None, num_reused=0)
                documents = source.documents(self._tokenizer, prefix=self._prefix)
                events = score_text(
                    self._model,
                    documents,
                    name=source.name,
                    definition=definition,
                    limit=self._limit,
                    progress=progress,
                    stop=self.check_stop,
                    ranks=self._ranks,
                )
                for event in events:
                    if isinstance(event, TextScored):
                        results.append(event)
                        yield from (Warned(text=text) for text in source.warnings())
                        yield from _problems(progress)
                        progress.finish()
                    yield event
            finally:
                progress.close()
        if len(results) > 1 and len({result.definition for result in results}) == 1:
            yield combine("all texts", results, definition)


def plan_batches(questions: Sequence[Question], limit: BatchLimit) -> list[list[Question]]:
    """Questions sorted by length, cut into batches within `limit`; a question is never split.

    The plan depends on the questions alone, not on what is already scored, so a resumed run computes in the same shapes.
    """
    ordered = sorted(questions, key=lambda question: (-question.longest, question.item.index))
    return limit.cut(ordered, longest=lambda question: question.longest, num_sequences=lambda question: question.num_sequences)


def _unit(question: Question) -> str:
    return f"{question.item.index}:{question.digest}"


def _all_known(batch: Sequence[Question], progress: Progress) -> bool:
    return all(len(progress.get(_unit(question)) or ()) == 2 * question.num_sequences for question in batch)


def _score_batch(model: Decoder, batch: Sequence[Question]) -> list[tuple[str, list[float]]]:
    """(unit, [log-likelihood, greedy, log-likelihood, greedy, ...]) for each question."""
    scored = iter(score_groups(model, [group for question in batch for group in question.groups]))
    rows = []
    for question in batch:
        scores = [score for _ in question.groups for score in next(scored)]
        rows.append((_unit(question), [number for score in scores for number in (score.log_likelihood, float(score.greedy))]))
    return rows


def _item_score(question: Question, numbers: list[float] | None) -> ItemScore:
    assert numbers is not None
    return ItemScore(tuple(numbers[0::2]), tuple(bool(number) for number in numbers[1::2]), question.item.texts, question.item.gold)


def _problems(progress: Progress) -> Iterator[Warned]:
    if progress.num_damaged:
        yield Warned(text=f"{progress.num_damaged} rows of the kept scores were damaged and have been computed again")
    if progress.problem:
        yield Warned(text=f"finished scores could not be kept, so an interrupted run would begin anew: {progress.problem}")
