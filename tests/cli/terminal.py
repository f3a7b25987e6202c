"""A program on a terminal of its own, for tests: what it shows, keys typed at it. Knows the pseudo-terminals of the system."""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from pathlib import Path

LIMIT_S = 240.0
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[=>]")


class Terminal:
    """A program whose stdin, stdout and stderr are one terminal of 100 columns, which also makes Ctrl-C a signal."""

    def __init__(self, command: list[str], *, cwd: Path, env: dict[str, str]) -> None:
        self._fd, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        self.process = subprocess.Popen(
            command,
            cwd=cwd,
            env={**os.environ, "TERM": "xterm", **env},
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)
        self._seen = ""

    def type(self, keys: str) -> None:
        """Press keys."""
        os.write(self._fd, keys.encode())

    def until(self, words: str) -> str:
        """All that was shown from the last `until` on up to `words`, without escape sequences."""
        ends = time.monotonic() + LIMIT_S
        while words not in self._seen:
            if not select.select([self._fd], [], [], max(ends - time.monotonic(), 0))[0]:
                raise AssertionError(f"{words!r} did not come; there is {self._seen!r}")
            if not self._read():
                raise AssertionError(f"the program ended before {words!r}; there is {self._seen!r}")
        shown, _, self._seen = self._seen.partition(words)
        return shown

    def _read(self) -> bool:
        try:
            block = os.read(self._fd, 1 << 16)
        except OSError:  # Linux: EIO when the program is gone
            return False
        self._seen = _ESCAPES.sub("", self._seen + block.decode("utf-8", "replace")).replace("\r\n", "\n")
        return bool(block)

    def end(self) -> tuple[int, str]:
        """Wait for the end: the status, and what else was shown."""
        while select.select([self._fd], [], [], LIMIT_S)[0] and self._read():
            pass
        return self.process.wait(LIMIT_S), self._seen

    def close(self) -> None:
        """End the program if it still runs, and give the terminal back."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._fd)
