"""The live panel of training on a terminal: a bar, the latest numbers, the loss as a sparkline, the last sample. Knows Rich and events."""

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmctl.cli.shell import Shell
from llmctl.cli.training_view import duration, num_bytes, other_line, plan_lines
from llmctl.core.train.events import EvalDone, Event, Finished, Planned, Profiled, Resumed, RowsRead, RowsReading, SampleDrawn, StepDone

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

_BLOCKS = "▁▂▃▄▅▆▇█"
_SPARK_WIDTH = 32
_KEPT = 4096
"""Losses that the sparkline is made from; beyond it, neighbours are averaged."""


def sparkline(values: Sequence[float], width: int = _SPARK_WIDTH) -> str:
    """Numbers as a line of blocks, the oldest on the left: each block is the mean of a stretch, on the scale of the means."""
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return ""
    columns = min(width, len(finite))
    edges = [round(i * len(finite) / columns) for i in range(columns + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    if high == low:
        return _BLOCKS[0] * columns
    return "".join(_BLOCKS[min(7, int((mean - low) / (high - low) * 8))] for mean in means)


class LivePanel:
    """A panel at the foot of the terminal; what lasts scrolls by above it."""

    def __init__(self, shell: Shell) -> None:
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._shell = shell
        self._console = shell.console()
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[clock]}"), console=self._console
        )
        self._task = self._bar.add_task("training", total=None, clock="")
        self._live = Live(console=self._console, refresh_per_second=4, transient=True, redirect_stdout=False, redirect_stderr=False)
        self._device = "cpu"
        self._step: StepDone | None = None
        self._eval: EvalDone | None = None
        self._losses: list[float] = []
        self._note = self._sample = ""

    def __enter__(self) -> "LivePanel":
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def warn(self, message: str) -> None:
        """A warning, above the panel."""
        self._live.stop()
        self._shell.warn(message)
        self._live.start()

    def show(self, event: Event) -> None:
        """Any other event."""
        from rich.text import Text

        if isinstance(event, Planned):
            self._device = event.device
            self._bar.update(self._task, total=event.num_steps)
            for line in plan_lines(event):
                self._console.print(Text(line))
        elif isinstance(event, StepDone):
            self._take(event)
        elif isinstance(event, RowsReading):
            self._note = f"reading rows: {event.num_rows:,}"
        elif isinstance(event, Resumed):
            self._bar.update(self._task, completed=event.step)
        elif isinstance(event, EvalDone):
            if not event.averaged:
                self._eval = event
        elif isinstance(event, SampleDrawn):
            self._sample = " ".join(event.text.split())
        if isinstance(event, EvalDone | SampleDrawn | Resumed | RowsRead | Profiled | Finished):
            self._console.print(Text(other_line(event) or ""))
        self._live.update(self.panel())

    def panel(self) -> "Group":
        """The panel as it stands."""
        from rich.console import Group
        from rich.text import Text

        lines: list[Any] = [self._bar]
        if self._step is not None:
            lines.append(self._numbers(self._step))
        elif self._note:
            lines.append(Text(self._note))
        if self._sample:
            lines.append(Text(self._sample, style="dim", overflow="ellipsis", no_wrap=True))
        return Group(*lines)

    def _take(self, step: StepDone) -> None:
        self._step, self._note = step, ""
        self._losses.append(step.loss)
        if len(self._losses) >= _KEPT:
            self._losses = [(a + b) / 2 for a, b in zip(self._losses[::2], self._losses[1::2], strict=True)]
        self._bar.update(self._task, completed=step.step, clock=f"{duration(step.elapsed_s)} gone, {duration(step.eta_s)} to go")

    def _numbers(self, step: StepDone) -> "Table":
        from rich.table import Table
        from rich.text import Text

        from llmctl.core.train.machine import peak_memory_bytes

        held_out = "–"
        if self._eval is not None:
            bits = f", {self._eval.bits_per_byte:.4f} bits/byte" if self._eval.bits_per_byte is not None else ""
            held_out = f"{self._eval.loss:.4f}{bits} at step {self._eval.step:,}"
        rows = (
            ("loss", f"{step.loss:.4f}  {sparkline(self._losses)}", "speed", f"{step.tokens_per_second:,.0f} tok/s"),
            ("held out", held_out, "of peak", f"{step.peak_share:.0%}"),
            (
                *("rate", f"{step.learning_rate:.2e}   gradient {step.grad_norm:.2f}"),
                *("memory", f"{num_bytes(peak_memory_bytes(self._device))} at most"),
            ),
        )
        table = Table.grid(padding=(0, 2), expand=False)
        for row in rows:
            table.add_row(*(Text(text, style="dim" if n % 2 == 0 else "", no_wrap=True, overflow="ellipsis") for n, text in enumerate(row)))
        return table
