"""The shell a command runs in: verbosity, warnings, notes, and the one Rich console. Everything here goes to stderr."""

import contextlib
import gc
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

PROGRAM = "llmctl"


def stderr_line(text: str) -> None:
    """One line on stderr; a stderr that is closed or full must not hide the exit code."""
    try:
        if sys.stderr is not None:
            sys.stderr.write(text.encode("utf-8", "backslashreplace").decode("utf-8") + "\n")
            sys.stderr.flush()
    except (OSError, ValueError):
        pass


@contextlib.contextmanager
def collector_off() -> Iterator[None]:
    """No search for garbage within the block: nearly all that imports and opening a model make stays, and is looked through in vain."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@dataclass
class Shell:
    """How much to say, and how. Handed to every command beside its config."""

    quiet: bool = False
    verbose: bool = False
    json: bool = False
    debug: bool = False
    origins: dict[str, str] = field(default_factory=dict)
    """Where each value of the command's config came from; see core.config.resolve."""
    _warned: set[str] = field(default_factory=set)

    def warn(self, text: str) -> None:
        """`llmctl: warning: ...` on stderr, each text once, even with --quiet."""
        if text not in self._warned:
            self._warned.add(text)
            stderr_line(f"{PROGRAM}: warning: {text}")

    def note(self, text: str) -> None:
        """A line for people on stderr, unless --quiet."""
        if not self.quiet:
            stderr_line(text)

    def detail(self, text: str) -> None:
        """A line on stderr with --verbose only."""
        if self.verbose and not self.quiet:
            stderr_line(text)

    @property
    def live(self) -> bool:
        """Whether moving displays (bars, live panels) may be drawn: stderr is a terminal that can, and not --quiet."""
        dumb = os.environ.get("TERM", "") in ("dumb", "unknown")
        return not self.quiet and not dumb and sys.stderr is not None and sys.stderr.isatty()

    def console(self) -> "Console":
        """A Rich console on stderr. Honours NO_COLOR, TERM=dumb and a stderr that is no terminal."""
        from rich.console import Console

        return Console(stderr=True, highlight=False, soft_wrap=not self.live)

    def progress(self, *columns: Any) -> Any:
        """A Rich Progress on stderr, invisible unless `live`."""
        from rich.progress import Progress

        return Progress(*columns, console=self.console(), disable=not self.live, transient=True)
