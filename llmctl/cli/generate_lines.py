"""`llmctl generate --lines`: a filter, a prompt a line in, an answer a line out. Knows streams; decides nothing about tokens."""

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from llmctl.cli.generate import MAX_PROMPT_BYTES, draw_seed, open_generator
from llmctl.cli.generate_constraint import read_constraint
from llmctl.cli.generate_stats import Stats
from llmctl.cli.shell import Shell
from llmctl.cli.signals import stop_flag
from llmctl.cli.streams import decode_utf8, out, stdin_is_terminal
from llmctl.core.config.generate import GenerateConfig
from llmctl.core.errors import InputError, Interrupted, LlmctlError, PartialFailure, UsageError

if TYPE_CHECKING:
    from llmctl.core.infer.batch import RowDone, RowFailed
    from llmctl.core.infer.rows import BadRow, Row


def run_lines(config: GenerateConfig, shell: Shell) -> None:
    """Answer every line of stdin, in order, each answer written as soon as it and those before it are there."""
    if sys.stdin is None:
        raise UsageError("--lines: stdin is closed; pipe the prompts in")
    if config.logprobs is not None and not shell.json:
        raise UsageError("--logprobs needs --json: they have no place in plain text")
    from llmctl.core.infer.batch import BatchFinished, BatchSettings, RowDone, RowFailed, run_batch
    from llmctl.core.infer.defaults import merged
    from llmctl.core.infer.events import Warned

    stats = Stats()
    generator = open_generator(config, num_slots=config.batch_size)
    shell.detail(generator.description)
    if generator.note is not None:
        shell.warn(generator.note)
    params = merged(generator.params, config.given_sampling())
    settings = BatchSettings(
        params=params,
        seed=draw_seed() if config.seed is None else config.seed,
        stop=config.stop,
        max_new_tokens=config.max_new_tokens,
        best_of=config.best_of,
        num_logprobs=config.logprobs,
        ignore_eos=config.ignore_eos,
        min_new_tokens=config.min_new_tokens or 0,
        constraint=read_constraint(config, generator),
    )
    if config.seed is None and not params.is_greedy:
        shell.note(f"seed {settings.seed}")
    if stdin_is_terminal():
        shell.note("a prompt a line; end with Ctrl-D")
    lines = _Lines(config, shell)
    num_prompt_tokens = 0
    stats.start()
    with stop_flag() as stop:
        for event in run_batch(lines.rows(), generator, settings, stop=stop):
            if isinstance(event, RowDone | RowFailed):
                lines.answer(event)
                num_prompt_tokens += event.num_prompt_tokens if isinstance(event, RowDone) else 0
            elif isinstance(event, Warned):
                shell.warn(event.message)
            elif isinstance(event, BatchFinished):
                summary = event
        signal_number = stop()
    if config.stats:
        stats.tell_batch(num_prompt_tokens=num_prompt_tokens, num_new_tokens=summary.num_new_tokens, speculator=generator.engine.speculator)
    if summary.num_cut:
        shell.warn(f"{summary.num_cut:,} prompts were too long and were cut on the {config.truncate}")
    if signal_number is not None:
        raise Interrupted(f"interrupted; {lines.num_written:,} lines are answered", signal_number=signal_number)
    if summary.num_failed and not summary.num_done:
        raise LlmctlError(f"all {summary.num_failed:,} lines failed; the first: {lines.first_error}")
    if summary.num_failed:
        raise PartialFailure(f"{summary.num_failed:,} of {lines.num_read:,} lines failed and are empty in the output")


class _Lines:
    """The lines on their way in and out. An empty line is answered by an empty one, and so is one that fails."""

    def __init__(self, config: GenerateConfig, shell: Shell) -> None:
        from llmctl.core.infer.order import InOrder

        argument = config.text if config.text is not None else config.prompt
        self._suffix = "" if argument is None else " " + argument
        self._code, self._shell = config.code, shell
        self._order: InOrder[bytes] = InOrder()
        self.num_read = self.num_written = 0
        self.first_error = ""

    def rows(self) -> "Iterator[Row | BadRow | None]":
        """A row for each line, when the engine asks for one; None while there is none yet."""
        from llmctl.core.infer.rows import BadRow, Row, polled_lines

        for raw in polled_lines(sys.stdin.fileno()):
            if raw is None:
                yield None
                continue
            self.num_read += 1
            number = self.num_read
            if not raw.strip():
                self._put(number, {"id": number, "text": ""} if self._shell.json else "")
                continue
            try:
                if len(raw) > MAX_PROMPT_BYTES:
                    raise InputError(f"more than {MAX_PROMPT_BYTES:,} bytes, the limit of a prompt")
                text = decode_utf8(raw, where=f"line {number}")
            except InputError as error:
                place = f"line {number}: "
                yield BadRow(line=number, id=number, error=place + str(error).removeprefix(place))
                continue
            yield Row(line=number, id=number, prompt=text + self._suffix)

    def answer(self, event: "RowDone | RowFailed") -> None:
        """A line has its answer, or none."""
        from llmctl.core.infer.batch import RowFailed
        from llmctl.core.infer.fences import fenced_code

        if isinstance(event, RowFailed):
            self._shell.warn(event.error)
            self.first_error = self.first_error or event.error
        row = event.row
        if self._shell.json:
            self._put(row["id"], row if "text" not in row or not self._code else {**row, "code": fenced_code(row["text"])})
            return
        text = "" if isinstance(event, RowFailed) else row["text"]
        if self._code and (code := fenced_code(text)) is not None:
            text = code.removesuffix("\n")
        self._put(row["id"], text)

    def _put(self, number: int, answer: object) -> None:
        from llmctl.core.infer.results import to_line

        data = to_line(answer) if isinstance(answer, dict) else escaped(str(answer)).encode("utf-8", "replace") + b"\n"
        for line in self._order.put(number - 1, data):
            out.write(line)
            self.num_written += 1


def escaped(text: str) -> str:
    r"""`text` in one line: a newline is \n, a carriage return \r, a backslash \\; printf '%b' takes it back."""
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
