"""Signals turned into a question that a long job asks between steps. Knows no job."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from llmctl.core.errors import Interrupted

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopFlag:
    """Callable that gives the number of the first stop signal received, or None. `save_requested` is set by SIGUSR1."""

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self.save_requested = False

    def __call__(self) -> int | None:
        return self.signal_number

    def take_save_request(self) -> bool:
        """True once after each SIGUSR1 (a batch system's notice before it takes the machine away)."""
        requested, self.save_requested = self.save_requested, False
        return requested


@contextlib.contextmanager
def stop_flag(*, insistent: bool = True) -> Iterator[StopFlag]:
    """Within the block, the first INT, TERM or HUP only sets the flag; a second one raises KeyboardInterrupt at once.

    Without `insistent` a second one only changes what the flag says, if it is not another INT. A signal that was ignored
    when the process started (nohup) stays ignored.
    """
    flag = StopFlag()

    def on_stop(number: int, _frame: FrameType | None) -> None:
        if flag.signal_number is not None and insistent:
            raise KeyboardInterrupt
        if flag.signal_number is None or number != signal.SIGINT:
            flag.signal_number = number

    def on_save(_number: int, _frame: FrameType | None) -> None:
        flag.save_requested = True

    previous = {}
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            previous[number] = signal.signal(number, on_stop)
    previous[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, on_save)
    try:
        yield flag
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def raising(message: str) -> Iterator[None]:
    """Within the block, INT, TERM and HUP raise Interrupted at once, so that temporary files are removed on the way out.

    For work that has no steps between which a flag could be asked, and nothing to keep.
    """

    def on_stop(number: int, _frame: FrameType | None) -> None:
        raise Interrupted(message, signal_number=number)

    previous = {number: signal.signal(number, on_stop) for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def die_by(number: int) -> None:
    """End this process by signal `number` with its default action, so that a calling shell's loop stops too."""
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)
