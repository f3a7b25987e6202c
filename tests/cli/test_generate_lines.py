"""`llmctl generate --lines` as a filter, and presets on the command line."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.generate_tools import Llmctl

ROOT = Path(__file__).parents[2]


def test_each_line_gets_the_answer_that_it_gets_alone_in_order(llmctl: Llmctl, chat_model: Path) -> None:
    base = ("-m", chat_model, "-t", 0, "-n", 9)
    lines = ["one", "", "a much longer line " * 5, "two\\n", "  ", "three"]
    found = llmctl(*base, "--lines", "-b", 3, stdin="\n".join(lines).encode())
    assert (found.code, found.err) == (0, "")
    answers = found.bytes.split(b"\n")
    assert answers.pop() == b""
    assert len(answers) == len(lines)
    for line, answer in zip(lines, answers, strict=True):
        if not line.strip():
            assert answer == b""
            continue
        text = llmctl(*base, line, "--json").rows[0]["text"]
        plain = answer.decode().replace("\\\\", "\0").replace("\\n", "\n").replace("\\r", "\r").replace("\0", "\\")
        assert plain == text
    rows = llmctl(*base, "--lines", "--json", stdin="\n".join(lines).encode()).rows
    assert [row["id"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[1] == {"id": 2, "text": ""}


def test_the_argument_comes_after_each_line(llmctl: Llmctl, model: Path) -> None:
    base = ("-m", model, "-t", 0, "-n", 9, "--json")
    found = llmctl(*base, "--lines", "upon", stdin=b"Once\nThere\n").rows
    assert [row["text"] for row in found] == [llmctl(*base, text).rows[0]["text"] for text in ("Once upon", "There upon")]


def test_a_bad_line_is_empty_in_the_output_and_exit_3(llmctl: Llmctl, model: Path) -> None:
    stdin = b"Once\n\xff\n" + b"x" * 300 + b"\nupon\n"
    found = llmctl("-m", model, "-t", 0, "-n", 9, "--lines", stdin=stdin)
    assert found.code == 3
    answers = found.bytes.split(b"\n")
    assert [bool(answer) for answer in answers] == [True, False, False, True, False]
    assert "line 2: not valid UTF-8 at byte 0" in found.err
    assert "line 3: 300 prompt tokens" in found.err
    assert found.last == "llmctl: error: 2 of 4 lines failed and are empty in the output"
    assert llmctl("-m", model, "--lines", stdin=b"\xff\n").code == 1
    assert (llmctl("-m", model, "--lines", stdin=b"").code, llmctl("-m", model, "--lines", stdin=b"").bytes) == (0, b"")


def test_each_line_is_answered_before_the_next_is_sent(model: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "llmctl", "generate", "-m", str(model), "-t", "0", "-n", "4", "--lines"]
    pipe = subprocess.PIPE
    job = subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, stderr=pipe)
    assert job.stdin is not None
    assert job.stdout is not None
    for line in (b"a\n", b"\n", b"b\n"):
        job.stdin.write(line)
        job.stdin.flush()
        answer = job.stdout.readline()
        assert answer.endswith(b"\n")
        assert (answer == b"\n") == (line == b"\n")
    job.send_signal(signal.SIGTERM)
    _, err = job.communicate(timeout=240)
    assert job.returncode == -signal.SIGTERM
    assert err == b"llmctl: interrupted; 3 lines are answered\n"


def test_a_preset_is_what_the_model_reads(llmctl: Llmctl, chat_model: Path, model: Path, tmp_path: Path) -> None:
    def shown(*arguments: object) -> str:
        return "".join(json.loads(llmctl(*arguments, "--show-prompt", "--json").out)["tokens"])

    file = tmp_path / "shout.toml"
    file.write_text('system = "S {how}"\ntemplate = "<{input}>"\n[parameters]\nhow = "loud"\n')
    chat = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n<hi {{how}}><|im_end|>\n<|im_start|>assistant\n"
    base = ("-m", chat_model, "hi {how}", "--preset", file)
    assert shown(*base) == chat.format("S loud")
    assert shown(*base, "--set", "how=low") == chat.format("S low")
    assert shown(*base, "--system", "mine") == chat.format("mine")
    assert shown("-m", model, "hi", "--preset", file) == "S loud\n\n<hi>"
    whole = llmctl("-m", chat_model, "-t", 0, "-n", 5, "--json", "hi", "--preset", file).rows[0]
    row = llmctl("-m", chat_model, "-t", 0, "-n", 5, "-i", "-", "--preset", file, stdin=b'{"prompt": "hi"}').rows[0]
    line = llmctl("-m", chat_model, "-t", 0, "-n", 5, "--lines", "--json", "--preset", file, stdin=b"hi\n").rows[0]
    assert whole["text"] == row["text"] == line["text"]
    assert whole["num_prompt_tokens"] == row["num_prompt_tokens"] == line["num_prompt_tokens"]


def test_code_alone_is_printed(llmctl: Llmctl, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tiny random model writes fences, so its text is replaced; how fences are read is tested beside them."""
    from llmctl.core.infer.sequence import TextUnderWay

    genuine = TextUnderWay.finished
    text = "Here:\n```py\nprint('a')\n```\nGood luck."
    monkeypatch.setattr(TextUnderWay, "finished", lambda self, reason: _with_text(genuine(self, reason), text))
    assert llmctl("-m", model, "x", "-n", 3, "-t", 0, "--code").out == "print('a')\n"
    assert llmctl("-m", model, "x", "-n", 3, "-t", 0, "--code", "--json").rows[0]["code"] == "print('a')\n"
    assert llmctl("-m", model, "-n", 3, "-t", 0, "--code", "--lines", stdin=b"x\n").out == "print('a')\n"
    text = "no code"
    bare = llmctl("-m", model, "x", "-n", 3, "-t", 0, "--code")
    assert bare.out == "no code\n"
    assert "no fenced code" in bare.err


def _with_text(event: object, text: str) -> object:
    from dataclasses import replace

    return replace(event, text=text)  # type: ignore[type-var]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--lines", "--num-samples", "2"], 2, "--num-samples"),
        (["--lines", "-"], 2, "leave out -"),
        (["--lines", "--echo"], 2, "--echo does not go with --lines"),
        (["--lines", "-i", "x.jsonl"], 2, "--lines does not go with --input"),
        (["x", "--set", "to=German"], 2, "--set needs --preset"),
        (["x", "--preset", "translat"], 10, "did you mean translate?"),
        (["x", "--preset", "translate", "--set", "too=x"], 2, "its parameters are to"),
        (["--code", "-i", "x.jsonl"], 2, "--code does not go with --input"),
    ],
)
def test_mistakes_are_told(llmctl: Llmctl, model: Path, arguments: list[str], code: int, words: str) -> None:
    found = llmctl("-m", model, *arguments)
    assert (found.code, found.bytes) == (code, b"")
    assert words in found.last
