"""llmctl with one more command, `toy`, which fails, writes, reads and waits on request. Run as a program by the boundary tests."""

import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from llmctl.cli.app import app
from llmctl.cli.command import Command, need
from llmctl.cli.main import main
from llmctl.cli.options import add_command
from llmctl.cli.shell import Shell
from llmctl.cli.signals import stop_flag
from llmctl.cli.streams import decode_utf8, out, read_stdin, stdin_lines
from llmctl.core import errors
from llmctl.core.config import check_fields, option
from llmctl.core.files import atomic_write


@dataclass(frozen=True)
class ToyConfig:
    """Settings of every type that a command may have."""

    lines: int = option(0, "Lines to write to stdout.", "-n", minimum=0)
    act: str | None = option(None, "What to do.")
    message: str = option("it broke", "What an error says.")
    rate: float = option(0.5, "A number.", "--speed", above=0, maximum=1)
    shape: str = option("round", "A choice.", choices=("round", "square"))
    careful: bool = option(True, "A switch.")
    stop: tuple[str, ...] = option((), "A repeatable flag.")
    model: str | None = option(None, "A model.", "-m")
    output: Path | None = option(None, "A file to write.", "-o")

    def __post_init__(self) -> None:
        check_fields(self)


def run_toy(config: ToyConfig, shell: Shell) -> None:
    """Do what `--act` names."""
    for number in range(config.lines):
        out.line(f"line {number} " + "x" * 100, flush=False)
    kinds = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.LlmctlError)}
    if config.act in kinds:
        raise kinds[config.act](config.message)
    match config.act:
        case "interrupted":
            raise errors.Interrupted("stopped at step 3; go on with --resume", signal_number=getattr(signal, config.message))
        case "missing-extra":
            raise errors.MissingExtraError("reading .gguf", extra="gguf")
        case "crash":
            raise RuntimeError(config.message)
        case "memory":
            raise MemoryError
        case "interrupt":
            raise KeyboardInterrupt
        case "read-missing":
            Path(config.message).read_bytes()
        case "write":
            with atomic_write(need(config.output, "--output", "the file to write")) as file:
                file.write(b"0" * 100_000)
        case "print":
            print("y" * 100_000)
        case "stdin":
            out.write(decode_utf8(read_stdin(max_bytes=1000), where="stdin"))
        case "cat":
            for line in stdin_lines():
                out.write(line)
        case "sleep":
            sys.stderr.write("sleeping\n")
            sys.stderr.flush()
            time.sleep(60)
        case "job":
            job(shell)
        case "warn":
            shell.warn("odd")
            shell.warn("odd")
            shell.note("note")
            shell.detail("detail")


def job(shell: Shell) -> None:
    """A long job that ends by the first signal after saving, as training does."""
    with stop_flag() as stopped:
        shell.note("started")
        for _ in range(6000):
            time.sleep(0.01)
            if stopped.take_save_request():
                shell.note("saved on request")
            if (number := stopped()) is not None:
                shell.note("saving")
                time.sleep(0.3)
                raise errors.Interrupted("saved; go on with --resume", signal_number=number)


def register() -> None:
    """Add the command to the program."""
    add_command(app, Command("toy", ToyConfig, run_toy, "A command for tests."))


if __name__ == "__main__":
    register()
    main()
