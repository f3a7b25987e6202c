"""Run a command line in this process as a program would be run, for tests of what it prints: a start of Python takes longer
than most of what they look at. Signals, pipes and what is imported need a true process."""

import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from llmctl.cli.main import run
from llmctl.cli.streams import name_stdout

Completed = subprocess.CompletedProcess[bytes]


def run_here(
    arguments: list[str],
    *,
    input: bytes | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    program: Callable[[list[str]], int] = run,
) -> Completed:
    """What `llmctl ARGUMENTS` leaves, in a working folder and an environment of its own; without `input`, stdin is /dev/null."""
    with ExitStack() as stack:
        nothing = stack.enter_context(open(os.devnull, "rb"))
        sent, out, err = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(3))
        sent.write(input or b"")
        sent.seek(0)
        for number, file in ((0, nothing if input is None else sent), (1, out), (2, err)):
            stack.enter_context(_descriptor(number, file.fileno()))
        stack.enter_context(_streams())
        stack.enter_context(_environment(env))
        if cwd is not None:
            stack.callback(os.chdir, os.getcwd())
            os.chdir(cwd)
        sys.argv = ["llmctl", *arguments]
        name_stdout()
        code = program(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
        said = []
        for file in (out, err):
            file.seek(0)
            said.append(file.read())
    return subprocess.CompletedProcess(arguments, code, *said)


def llmctl(*arguments: object, **environ: str) -> "subprocess.CompletedProcess[str]":
    """The same as text, with more variables in the environment."""
    done = run_here([*map(str, arguments)], env={**os.environ, **environ})
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


@contextmanager
def _descriptor(number: int, replacement: int) -> Iterator[None]:
    kept = os.dup(number)
    os.dup2(replacement, number)
    try:
        yield
    finally:
        os.dup2(kept, number)
        os.close(kept)


@contextmanager
def _streams() -> Iterator[None]:
    """Python's own objects on the descriptors; those of before, and the command line, come back."""
    kept = sys.stdin, sys.stdout, sys.stderr, sys.argv
    sys.stdout.flush()
    sys.stderr.flush()
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)))
    sys.stdout, sys.stderr = (io.TextIOWrapper(io.BufferedWriter(io.FileIO(number, "w", closefd=False))) for number in (1, 2))
    sys.stderr.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
    try:
        yield
    finally:
        sys.stdin, sys.stdout, sys.stderr, sys.argv = kept


@contextmanager
def _environment(env: Mapping[str, str] | None) -> Iterator[None]:
    """`env` in place of all of os.environ, and that back."""
    kept = dict(os.environ)
    if env is not None:
        os.environ.clear()
        os.environ.update(env)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)
