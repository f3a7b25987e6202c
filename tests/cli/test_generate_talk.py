"""`llmctl generate --interactive` on a real terminal: keys in, a talk out, and the transcript that it leaves."""

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmctl.core.infer.transcript import read_talk
from tests.cli.generate_tools import Llmctl
from tests.cli.terminal import Terminal
from tests.cli.tiny_model import TEMPLATE, make_model

ROOT = Path(__file__).parents[2]
ENV = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
Start = Callable[..., Terminal]
READY = "/help tells more\n"


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose answers can be so long that nobody waits for their end."""
    return make_model(tmp_path_factory.mktemp("long"), template=TEMPLATE, context=1 << 17)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    opened = []

    def call(*arguments: object) -> Terminal:
        command = [sys.executable, "-m", "llmctl", "generate", "--interactive", "--threads", "1", *map(str, arguments)]
        opened.append(Terminal(command, cwd=tmp_path, env=ENV))
        return opened[-1]

    yield call
    for terminal in opened:
        terminal.close()


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def say(terminal: Terminal, message: str) -> None:
    """Type a message and wait for the prompt after its answer."""
    terminal.type(message + "\r")
    terminal.until("\n")
    terminal.until("\n> ")


def test_a_talk_with_all_its_commands(start: Start, llmctl: Llmctl, chat_model: Path, tmp_path: Path) -> None:
    talk = start("-m", chat_model, "-t", 0.9, "--seed", 4, "-n", 8, "--transcript", "talk.jsonl", "--system", "S")
    talk.until(READY)
    talk.until("> ")
    for message in ("one", "two", "/retry", "three", "/undo", "start \\\rend", '"""\rfour\r\rlines\r"""', "//etc", "/usr/bin holds?"):
        say(talk, message)
    say(talk, "/save saved.jsonl")
    say(talk, "/save saved.jsonl")
    talk.type("/exi\t\r")  # completed
    assert talk.end()[0] == 0
    rows = rows_of(tmp_path / "talk.jsonl")
    model = os.path.abspath(chat_model)
    assert rows[0] == {"kind": "talk", "format": 1, "model": model, "chat": True, "seed": 4, "system": "S"}
    said = [row["content"] for row in rows if row.get("role") == "user"]
    assert said == ["one", "two", "three", "start \nend", "four\n\nlines", "/etc", "/usr/bin holds?"]
    assert [row.get("kind", row.get("role")) for row in rows[1:10]] == [
        *("user", "assistant", "user", "assistant", "retry", "assistant", "user", "assistant", "undo")
    ]
    assert {row["finish"] for row in rows if row.get("role") == "assistant"} <= {"eos", "length"}
    # the same talk as one that a program has: the messages of a batch row
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "one"}]
    row = json.dumps({"id": 1, "messages": messages, "seed": 4}).encode()
    batch = llmctl("-m", chat_model, "-t", 0.9, "-n", 8, "-i", "-", "--threads", 1, stdin=row).rows[0]
    assert rows[2]["content"] == batch["text"]
    stored, saved = read_talk(tmp_path / "talk.jsonl"), read_talk(tmp_path / "saved.jsonl")
    assert stored == saved
    assert [turn.message for turn in stored.turns] == ["one", "two", *said[3:]]


def test_ctrl_c_stops_the_answer_and_keeps_the_talk(start: Start, long_model: Path, tmp_path: Path) -> None:
    talk = start("-m", long_model, "-n", 100_000, "--ignore-eos", "-t", 0, "--transcript", "talk.jsonl")
    talk.until("> ")
    talk.type("go\r")
    talk.until("\n")
    while len(talk.until("\n")) < 3:  # a first line of the answer
        pass
    talk.type("\x03")
    talk.until("(stopped)\n> ")
    answer = rows_of(tmp_path / "talk.jsonl")[-1]
    assert (answer["role"], answer["finish"]) == ("assistant", "interrupted")
    assert 0 < answer["num_new_tokens"] < 100_000
    talk.type("dropped")
    talk.until("dropped")  # the line editor is up: it shows what is typed
    talk.type("\x03")
    talk.until("(Ctrl-D or /exit ends the talk)\n> ")
    talk.type("/undo\r")
    talk.until("taken back: go\n> ")
    talk.type("\x04")
    assert talk.end()[0] == 0
    assert rows_of(tmp_path / "talk.jsonl")[-1] == {"kind": "undo"}


@pytest.mark.parametrize("when", ["at the prompt", "in an answer"])
def test_term_ends_the_talk_whose_transcript_goes_on(start: Start, long_model: Path, tmp_path: Path, when: str) -> None:
    talk = start("-m", long_model, "-n", 100_000, "--ignore-eos", "-t", 0, "--transcript", "talk.jsonl")
    talk.until("> ")
    if when == "in an answer":
        talk.type("go\r")
        talk.until("\n")
        talk.until("\n")
    os.kill(talk.process.pid, signal.SIGTERM)
    status, shown = talk.end()
    assert status == -signal.SIGTERM
    assert "Traceback" not in shown
    assert "llmctl: ended by a signal" in shown
    again = start("--continue", "talk.jsonl", "-n", 3, "-t", 0)
    if when == "in an answer":
        again.until("going on after 1 turn\n")
    again.until("> ")
    say(again, "more")
    again.type("/exit\r")
    assert again.end()[0] == 0
    rows = rows_of(tmp_path / "talk.jsonl")
    assert [row["kind"] for row in rows if "kind" in row] == ["talk"]  # taken up where it was
    assert [row["content"] for row in rows if row.get("role") == "user"] == (["go", "more"] if when == "in an answer" else ["more"])


def test_pasted_lines_are_one_message_and_arrows_bring_it_back(start: Start, chat_model: Path, tmp_path: Path) -> None:
    talk = start("-m", chat_model, "-t", 0, "-n", 4, "--transcript", "talk.jsonl")
    talk.until("> ")
    say(talk, "\x1b[200~two\nlines\x1b[201~")
    say(talk, "\x1b[A, again")
    talk.type("\x04")
    talk.end()
    assert [row["content"] for row in rows_of(tmp_path / "talk.jsonl") if row.get("role") == "user"] == ["two\nlines", "two\nlines, again"]


def test_a_talk_without_a_template_and_one_too_long(start: Start, model: Path, tmp_path: Path) -> None:
    talk = start("-m", model, "-t", 0, "-n", 8, "--transcript", "talk.jsonl", "Once")
    assert "no chat template" in talk.until(READY)
    talk.until("\n> ")
    say(talk, "")
    talk.type("x" * 300 + "\r")
    talk.until("the message comes to ")
    talk.until("> ")
    talk.type("/system You\r")
    talk.until("a system message needs a chat template")
    talk.type("y" * 240 + "\r")
    talk.until("warning: the talk is longer than the model's context of 256 tokens: its oldest turns are left out")
    talk.until("\n> ")
    talk.type("\x04")
    talk.end()
    stored = read_talk(tmp_path / "talk.jsonl")
    assert (stored.chat, stored.num_left_out) == (False, 2)
    assert [turn.message for turn in stored.turns] == ["Once", "", "y" * 240]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--interactive"], 2, "--interactive needs a terminal, and stdin is none"),
        (["--interactive", "--json"], 2, "--json does not go with --interactive"),
        (["--interactive", "-"], 2, "--interactive reads the keyboard"),
        (["--interactive", "--lines"], 2, "--lines does not go with --interactive"),
        (["--interactive", "--num-samples", "2"], 2, "leave out --num-samples"),
        (["--interactive", "--truncate", "left"], 2, "oldest turns are left out"),
        (["--transcript", "x"], 2, "--transcript needs --interactive"),
        (["--continue", "x"], 2, "--continue needs --interactive"),
    ],
)
def test_mistakes_are_told(llmctl: Llmctl, arguments: list[str], code: int, words: str) -> None:
    found = llmctl(*arguments)
    assert (found.code, found.bytes) == (code, b"")
    assert words in found.last


def test_bad_files_are_told_before_a_model_is_loaded(start: Start, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("nonsense\n")
    for file, code in (("none.jsonl", 10), ("bad.jsonl", 4), (".", 2)):
        status, shown = start("-m", "/no/model", "--continue", file).end()
        assert (status, "Traceback" in shown) == (code, False), shown
        assert file in shown.strip().splitlines()[-1]
    assert start("--transcript", "no/folder.jsonl").end()[0] == 2
    chat = {"kind": "talk", "format": 1, "model": str(tmp_path), "chat": True, "seed": 1, "system": None}
    (tmp_path / "talk.jsonl").write_text(json.dumps(chat) + "\n")
    first = start("--transcript", "talk.jsonl")
    first.until("> ")
    status, shown = start("--transcript", "talk.jsonl").end()
    assert (status, "is being written by another run" in shown) == (11, True)


def test_stdout_must_be_a_terminal_too(tmp_path: Path) -> None:
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "llmctl", "generate", "--interactive"]
    job = subprocess.run(command, stdin=slave, capture_output=True, env={**os.environ, **ENV}, cwd=tmp_path)
    assert (job.returncode, job.stdout) == (2, b"")
    assert b"stdout is none" in job.stderr
    os.close(master)
    os.close(slave)
