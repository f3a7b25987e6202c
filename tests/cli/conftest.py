"""Tiny models, and a way to run `llmctl generate` in this process. Fixtures of the tests in this folder."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmctl.cli.main import run
from tests.cli.generate_tools import Llmctl, Result
from tests.cli.tiny_model import TEMPLATE, make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("chat"), template=TEMPLATE)


@pytest.fixture
def llmctl(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes], tmp_path: Path) -> Iterator[Llmctl]:
    """Run the command in this process; `stdin` None is /dev/null, bytes are a file's."""
    for name in [name for name in os.environ if name.startswith("LLMCTL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    with contextlib.ExitStack() as stack:

        def call(*arguments: object, stdin: bytes | None = None) -> Result:
            file = tmp_path / "stdin"
            file.write_bytes(stdin or b"")
            source = stack.enter_context(open(file if stdin is not None else os.devnull, "rb"))
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(source))
            capfdbinary.readouterr()
            code = run(["generate", *map(str, arguments)])
            sys.stdout.flush()
            captured = capfdbinary.readouterr()
            return Result(code, captured.out, captured.err.decode())

        yield call
