"""Messages typed on a terminal: line editing, history, several lines in one. Knows readline and the keyboard; knows no model."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from types import FrameType, ModuleType

from llmctl.cli.shell import stderr_line
from llmctl.cli.signals import STOP_SIGNALS, raising
from llmctl.core.errors import Interrupted

FENCE = '"""'
_PROMPT, _MORE = "> ", ". "
_AGAIN_S = 0.05


class LineEditor:
    """Reads messages. Python's readline edits them where there is one; a line is then what the terminal makes of it.

    A line that ends with a backslash goes on in the next one, and what stands between lines that begin and end with three
    quotation marks is one message. What is pasted stays together where the terminal marks it.
    """

    def __init__(self, *, words: Sequence[str] = ()) -> None:
        """`words` are what the Tab key completes at the beginning of a line."""
        self._words = words
        self._readline = _readline()
        self._has_hinted = False
        if self._readline is not None:
            self._readline.set_auto_history(False)  # messages are remembered whole, not by their lines
            self._readline.set_completer_delims(" \t\n")
            self._readline.set_completer(self._complete)
            is_editline = "libedit" in (self._readline.__doc__ or "")
            self._readline.parse_and_bind("bind ^I rl_complete" if is_editline else "tab: complete")
            if not is_editline:  # Python turns it off; without it each line of a pasted text would be a message
                self._readline.parse_and_bind("set enable-bracketed-paste on")

    def remember(self, message: str) -> None:
        """Add a message to what the arrow keys bring back. Nothing of it is kept on the disk."""
        if self._readline is not None and message.strip():
            self._readline.add_history(message)

    def read(self) -> str | None:
        """The next message, or None at the end of the input. Ctrl-C drops what was typed. Raises Interrupted for TERM and HUP."""
        while True:
            try:
                message = self._message()
            except EOFError:
                stderr_line("")
                return None
            except Interrupted as ended:
                if ended.signal_number != signal.SIGINT:
                    raise
                stderr_line("" if self._has_hinted else "\n(Ctrl-D or /exit ends the talk)")
                self._has_hinted = True
                continue
            self.remember(message)
            return message

    def _message(self) -> str:
        line = _typed(_PROMPT)
        if line.lstrip().startswith(FENCE):
            return self._fenced(line.lstrip().removeprefix(FENCE))
        lines = []
        while line.endswith("\\"):
            lines.append(line[:-1])
            line = _typed(_MORE)
        return "\n".join([*lines, line])

    @staticmethod
    def _fenced(line: str) -> str:
        lines = []
        while not line.rstrip().endswith(FENCE):
            lines.append(line)
            try:
                line = _typed(_MORE)
            except EOFError:  # the end of the input ends the message too
                break
        else:
            lines.append(line.rstrip().removesuffix(FENCE))
        while lines and not lines[0]:
            lines.pop(0)
        while lines and not lines[-1]:
            lines.pop()
        return "\n".join(lines)

    def _complete(self, text: str, state: int) -> str | None:
        assert self._readline is not None
        found = [word + " " for word in self._words if word.startswith(text)] if self._readline.get_begidx() == 0 and text else []
        return found[state] if state < len(found) else None


def _readline() -> ModuleType | None:
    """Python's readline, which some builds lack."""
    with contextlib.suppress(ImportError):
        import readline

        return readline
    return None


def _typed(prompt: str) -> str:
    """One line from the keyboard, and lone surrogates, which stand for bytes that are no UTF-8, replaced."""
    with raising("ended by a signal"), _heard_at_once():
        return input(prompt).encode("utf-8", "surrogateescape").decode("utf-8", "replace")


@contextlib.contextmanager
def _heard_at_once() -> Iterator[None]:
    """Within the block, a signal does not wait for the next key.

    Python's readline looks for signals when its wait for a key is cut short. One that comes between two waits is seen after the
    next key only; a thread sends it again until it is.
    """
    heard, is_over = threading.Event(), False
    before = {int(number): signal.getsignal(number) for number in STOP_SIGNALS}

    def on_stop(number: int, frame: FrameType | None) -> None:
        handler = before[number]
        if not is_over and not heard.is_set() and callable(handler):
            heard.set()
            handler(number, frame)

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    main = threading.get_ident()

    def send_again() -> None:
        while block := os.read(reader, 1):
            if block[0] in waited_for:
                while not heard.wait(_AGAIN_S):
                    signal.pthread_kill(main, block[0])
                return

    waited_for = {number for number, handler in before.items() if callable(handler)}
    thread = threading.Thread(target=send_again, name="llmctl signals", daemon=True)
    for number in waited_for:
        signal.signal(number, on_stop)
    woken = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread.start()
    try:
        yield
    finally:
        is_over = True  # from here on the handler lets pass what the thread may still send
        heard.set()
        signal.set_wakeup_fd(woken)
        os.close(writer)
        thread.join()
        os.close(reader)
        for number in waited_for:
            signal.signal(number, before[number])
