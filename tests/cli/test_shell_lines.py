"""Lines that people write in a shell, run by bash: what they print and how they end, against tests/data/shell_lines.txt.

A block of that file is a command (`$ `, further lines `> `), its stdout (`| `, or `|~` for a last line without newline), its
stderr (`! `) and its exit code (`= `). Each block runs in a folder of its own, which holds letters.txt and rows.jsonl. The
model says the alphabet (alphabet_model.py), so that any machine gives the same text. To write the file anew after a change
that is meant, and then to read what has changed: LLMCTL_WRITE_SHELL_LINES=1 pytest -n 0 tests/cli/test_shell_lines.py
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.cli.alphabet_model import make_alphabet_model

ROOT = Path(__file__).parents[2]
FILE = ROOT / "tests" / "data" / "shell_lines.txt"
LETTERS = "a\nx\n7\n"
ROWS = '{"id": "one", "prompt": "w"}\n{"id": "two", "prompt": "a", "max_tokens": 3, "label": 2}\n{"id": "three", "prompt": "5"}\n'
_VARIES = re.compile(r"[\d,.]+(?= a second)|(?<=^seed )\d+", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A command and what is expected of it."""

    comment: str
    command: str
    out: str
    err: str
    code: int

    def text(self) -> str:
        """As it stands in the file."""
        first, *more = self.command.split("\n")
        lines = [*self.comment.splitlines(), f"$ {first}", *(f"> {line}" for line in more)]
        for line in self.out.splitlines(keepends=True):
            lines.append("| " + line[:-1] if line.endswith("\n") else "|~" + line)
        return "\n".join([*lines, *(f"! {line}" for line in self.err.splitlines()), f"= {self.code}"])


def blocks() -> list[Block]:
    """Those of the file."""
    found = []
    for text in FILE.read_text().strip().split("\n\n"):
        parts: dict[str, list[str]] = {mark: [] for mark in "#$>|!="}
        for line in text.split("\n"):
            parts[line[0]].append(line if line[0] == "#" else line[2:] + ("\n" if not line.startswith("|~") else ""))
        found.append(
            Block(
                comment="\n".join(parts["#"]),
                command="".join(parts["$"] + parts[">"]).removesuffix("\n"),
                out="".join(parts["|"]),
                err="".join(parts["!"]),
                code=int(parts["="][0]) if parts["="] else -1,
            )
        )
    return found


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models, and a program `llmctl` that is this tree's."""
    home = tmp_path_factory.mktemp("shell")
    make_alphabet_model(home / "model")
    make_alphabet_model(home / "chat", template=True)
    make_alphabet_model(home / "short", context=16)
    (home / "bin").mkdir()
    program = home / "bin" / "llmctl"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m llmctl "$@"\n')
    program.chmod(0o755)
    (home / "bin" / "python").symlink_to(sys.executable)
    return home


def ran(block: Block, home: Path, folder: Path) -> Block:
    """The block with what came of its command."""
    (folder / "letters.txt").write_text(LETTERS)
    (folder / "rows.jsonl").write_text(ROWS)
    env = {name: value for name, value in os.environ.items() if not name.startswith("LLMCTL_")}
    env |= {
        "PATH": f"{home / 'bin'}:{env['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "LLMCTL_MODEL": str(home / "model"),
        "CHAT": str(home / "chat"),
        "SHORT": str(home / "short"),
        "LC_ALL": "C.UTF-8",
        "XDG_CONFIG_HOME": str(folder),
    }
    bash = shutil.which("bash")
    assert bash is not None
    pipe = subprocess.PIPE
    job = subprocess.Popen(
        [bash, "-c", block.command], cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, start_new_session=True
    )
    try:
        out, errors = job.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)
        raise
    err = _VARIES.sub("#", errors.decode("utf-8", "backslashreplace"))
    return replace(block, out=out.decode("utf-8", "backslashreplace"), err=err, code=job.returncode)


@pytest.mark.skipif(
    any(shutil.which(name) is None for name in ("bash", "timeout", "flock", "xargs")), reason="needs bash, coreutils, util-linux"
)
@pytest.mark.parametrize("block", blocks(), ids=lambda block: block.command.split("\n")[0][:60])
def test_a_line_prints_what_it_should_and_ends_as_it_should(block: Block, home: Path, tmp_path: Path) -> None:
    if os.environ.get("LLMCTL_WRITE_SHELL_LINES"):
        found = ran(block, home, tmp_path)
        FILE.write_text(FILE.read_text().replace(block.text() if block.code >= 0 else block.text().rsplit("\n= ", 1)[0], found.text(), 1))
        return
    assert ran(block, home, tmp_path) == block


def test_there_are_thirty_lines_and_the_file_is_in_its_own_form() -> None:
    assert len(blocks()) >= 30
    assert "\n\n".join(block.text() for block in blocks()) + "\n" == FILE.read_text()
