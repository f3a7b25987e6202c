"""What the tests of `llmctl generate` say about a run of the command; the fixture that runs it is in conftest.py."""

import json
from collections.abc import Callable
from typing import Any


class Result:
    """What one command left."""

    def __init__(self, code: int, stdout: bytes, stderr: str) -> None:
        self.code, self.bytes, self.err = code, stdout, stderr
        assert "Traceback" not in stderr, stderr

    @property
    def out(self) -> str:
        return self.bytes.decode()

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.bytes.splitlines()]

    @property
    def last(self) -> str:
        return self.err.rstrip("\n").rsplit("\n", 1)[-1]


Llmctl = Callable[..., Result]
"""Arguments, and `stdin=` bytes: the result."""
