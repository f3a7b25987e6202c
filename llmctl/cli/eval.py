"""`llmctl eval`: draws the events of core.evals, and writes the results file and the item log."""

import contextlib
import dataclasses
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from llmctl.cli.command import Command
from llmctl.cli.launch import start_ranks
from llmctl.cli.shell import Shell
from llmctl.cli.streams import out
from llmctl.core.config.evaluate import EvaluateConfig
from llmctl.core.errors import QualityGateError, UsageError
from llmctl.core.files import atomic_write, check_out_file, write_json

if TYPE_CHECKING:
    from rich.table import Table

    from llmctl.cli.signals import StopFlag
    from llmctl.core.evals.events import Event, ModelReady, Scored

_HELP = """Score a model: perplexity and bits per byte of text, and benchmark tasks.

\b
  llmctl eval book.txt --model DIR
  llmctl eval --tasks hellaswag,piqa,lambada_openai --data DIR --limit 100

Built-in tasks are hellaswag, piqa and lambada_openai; a path to a .toml file adds your own. Results go to stdout: a
table on a terminal, else tab-separated lines (name, metric, value, standard error, count). The same command goes on
where an ended one stopped."""

_STDOUT = Path("-")


def run(config: EvaluateConfig, shell: Shell) -> None:
    """Run the command."""
    if start_ranks(config.nproc, threads=config.threads):
        return
    from llmctl.core.distributed import place_of

    if not place_of(os.environ).is_main:
        _help(config)
        return
    for path, flag in ((config.output, "--output"), (config.log_samples, "--log-samples")):
        if path is not None and path != _STDOUT:
            check_out_file(path, flag=flag)
            if path.exists() and not config.overwrite:
                raise UsageError(f"{flag} {path}: exists already; choose a new name, or replace it with --overwrite")
    from llmctl.core.evals.gates import check_gates
    from llmctl.core.evals.runner import evaluate

    with _Run(config.log_samples) as own:
        events = evaluate(config, stop=own.stop, stdin=sys.stdin.buffer if sys.stdin is not None else None)
        ready, results = _draw(events, shell, own)
    if config.output is not None:
        document = results_document(config, ready, results)
        if config.output == _STDOUT:
            out.line(json.dumps(document, indent=2, ensure_ascii=False))
        else:
            write_json(config.output, document)
            shell.note(f"results written to {config.output}")
    if not shell.json and config.output != _STDOUT:
        _show(results)
    failures = check_gates(config, results)
    if failures:
        raise QualityGateError(f"--fail-under: {'; '.join(failures)}")


COMMAND = Command("eval", EvaluateConfig, run, _HELP)


def _help(config: EvaluateConfig) -> None:
    """Take part as one of several processes, of which the first tells and writes."""
    from llmctl.core.evals.events import ModelReady
    from llmctl.core.evals.runner import evaluate

    with _Run(None) as own:
        for event in evaluate(config, stop=own.stop):
            if isinstance(event, ModelReady):
                own.begin()


class _Run(contextlib.ExitStack):
    """What a run holds once its model is loaded: the signals, and the item log, which appears whole or not at all.

    Before that there is nothing to save, and a signal may end the program at once, in the middle of a long load.
    """

    def __init__(self, log_path: Path | None) -> None:
        super().__init__()
        self._log_path = log_path
        self._flag: StopFlag | None = None
        self.log: IO[bytes] | None = None

    def stop(self) -> int | None:
        """The number of the stop signal that came, or None."""
        return self._flag() if self._flag is not None else None

    def begin(self) -> None:
        """The model is loaded."""
        from llmctl.cli.signals import stop_flag

        self._flag = self.enter_context(stop_flag())
        if self._log_path is not None:
            self.log = self.enter_context(atomic_write(self._log_path))


def _draw(events: "Iterator[Event]", shell: Shell, own: _Run) -> "tuple[ModelReady, list[Scored]]":
    """Drain the events: a bar on a live terminal, notes on stderr, items into the log. Returns the model and the results."""
    from llmctl.core.evals.events import ItemScored, ModelReady, Planned, Progressed, TaskScored, TextScored, Warned

    results: list[Scored] = []
    ready: ModelReady | None = None
    with _bar(shell) as bar:
        for event in events:
            if shell.json and not isinstance(event, Progressed | ItemScored):
                out.line(json.dumps({"event": type(event).__name__, **plain(dataclasses.asdict(event))}, ensure_ascii=False))
            match event:
                case ModelReady():
                    own.begin()
                    ready = event
                    shell.note(f"model      {event.path}: {event.num_parameters:,} parameters, {event.dtype}, {event.device}")
                case Planned():
                    bar.start(event.name, event.num_total)
                    if event.num_items is not None:
                        kept = f", {event.num_reused:,} of them scored before" if event.num_reused else ""
                        shell.note(f"{event.name}: {event.num_items:,} items{kept}")
                case Progressed():
                    bar.move(event.num_done)
                case Warned():
                    shell.warn(event.text)
                case ItemScored():
                    if own.log is not None:
                        own.log.write(json.dumps(plain(dataclasses.asdict(event)), ensure_ascii=False).encode("utf-8", "replace") + b"\n")
                case TaskScored() | TextScored():
                    results.append(event)
    assert ready is not None
    return ready, results


class _Bar:
    """The bar of the task or text under way."""

    def __init__(self, progress: Any) -> None:
        self._progress = progress
        self._task: Any = None

    def start(self, name: str, total: int | None) -> None:
        """Begin a new bar; a total of None pulses."""
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(name, total=total)

    def move(self, done: int) -> None:
        """Set how much is done."""
        self._progress.update(self._task, completed=done)


@contextlib.contextmanager
def _bar(shell: Shell) -> Iterator[_Bar]:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    name = TextColumn("{task.description}", markup=False)
    with shell.progress(name, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()) as progress:
        yield _Bar(progress)


def _show(results: "list[Scored]") -> None:
    """The results on stdout: a table for a terminal, tab-separated lines for everything else."""
    if not out.is_terminal:
        for line in plain_lines(results):
            out.line(line, flush=False)
        out.flush()
        return
    from rich.console import Console

    console = Console(highlight=False)
    console.print(_table(results))
    for text in _footnotes(results):
        console.print(text, markup=False)


def plain_lines(results: "list[Scored]") -> list[str]:
    """Tab-separated: name, metric, value, standard error or "-", number of items or tokens; and a text's definition."""
    from llmctl.core.evals.events import TaskScored

    lines = []
    for result in results:
        count = result.num_items if isinstance(result, TaskScored) else result.num_scored_tokens
        name = " ".join(result.name.split())
        for metric in result.metrics:
            stderr = "-" if metric.stderr is None else f"{metric.stderr:.6g}"
            lines.append(f"{name}\t{metric.name}\t{metric.value:.8g}\t{stderr}\t{count}")
        if not isinstance(result, TaskScored):
            lines.append(f"{name}\tdefinition\t{result.definition}; {_counts(result)}")
    return lines


def _counts(result: Any) -> str:
    return (
        f"documents {result.num_documents:,}, tokens {result.num_tokens:,}, scored tokens {result.num_scored_tokens:,}, "
        f"bytes of the scored {result.num_scored_bytes:,}"
    )


def _table(results: "list[Scored]") -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from llmctl.core.evals.events import TaskScored

    table = Table(box=box.SIMPLE_HEAD)
    for heading, justify in (("", "left"), ("metric", "left"), ("value", "right"), ("± stderr", "right"), ("n", "right")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for result in results:
        name = result.name
        count = f"{result.num_items:,}" if isinstance(result, TaskScored) else f"{result.num_scored_tokens:,} tokens"
        for metric in result.metrics:
            table.add_row(
                Text(name),
                metric.name + ("" if metric.higher_is_better else " ↓"),
                f"{metric.value:.4f}",
                "" if metric.stderr is None else f"{metric.stderr:.4f}",
                count,
            )
            name = count = ""
    return table


def _footnotes(results: "list[Scored]") -> list[str]:
    from llmctl.core.evals.events import TaskScored, TextScored

    lines = []
    for result in results:
        if isinstance(result, TextScored):
            lines += [f"{result.name}: {_counts(result)}", f"  {result.definition}"]
        elif isinstance(result, TaskScored) and (result.num_cut_items or result.num_fewshot):
            cut = f"; {result.num_cut_items:,} prompts cut on the left" if result.num_cut_items else ""
            lines.append(f"{result.name}: {result.num_fewshot} examples before each question{cut}")
    return lines


def results_document(config: EvaluateConfig, ready: "ModelReady", results: "list[Scored]") -> dict[str, Any]:
    """What `--output` holds: the model, the settings, and for each task or text its metrics and facts."""
    from llmctl import __version__

    settings = {key: _setting(value) for key, value in dataclasses.asdict(config).items() if value not in (None, ())}
    document: dict[str, Any] = {
        "format": "llmctl-eval-results-1",
        "llmctl": __version__,
        "model": plain(dataclasses.asdict(ready)),
        "settings": plain(settings),
        "results": {},
    }
    for result in results:
        facts = dataclasses.asdict(result)
        name = facts.pop("name")
        facts["metrics"] = {
            metric.name: {"value": metric.value, "stderr": metric.stderr, "higher_is_better": metric.higher_is_better}
            for metric in result.metrics
        }
        document["results"][plain(name)] = plain(facts)
    return document


def _setting(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_setting(entry) for entry in value]
    return readable(value) if isinstance(value, Path) else value


def readable(path: Path) -> str:
    """A path as text; bytes that are no UTF-8 become \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def plain(value: Any) -> Any:
    """`value` as JSON in UTF-8 can say it: no NaN, no infinity, no half surrogate pairs (which undecodable names hold)."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    return None if isinstance(value, float) and not math.isfinite(value) else value
