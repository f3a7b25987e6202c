"""The contract between llmctl and a shell: exit codes, one-line errors, clean pipes, signals and secrets."""

import errno
import fcntl
import os
import pty
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from llmctl.cli.app import app
from llmctl.cli.main import describe, run
from tests.cli.in_process import Completed, run_here
from tests.cli.toy import register

ROOT = Path(__file__).parent.parent.parent
TOY = [sys.executable, "-m", "tests.cli.toy", "toy"]
ROOT_TOY = TOY[:-1]


def environment(**variables: str) -> dict[str, str]:
    """This environment without LLMCTL_* variables, with the repository importable, and `variables`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LLMCTL_")}
    return {**kept, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **variables}


def toy(*arguments: str | bytes, env: dict[str, str] | None = None, input: bytes | None = None, cwd: Path | None = None) -> Completed:
    """Run `llmctl toy` with `arguments` in this process."""

    def with_toy(words: list[str]) -> int:
        commands = [*app.registered_commands]
        register()
        try:
            return run(words)
        finally:
            app.registered_commands[:] = commands

    words = ["toy", *map(os.fsdecode, arguments)]
    return run_here(words, input=input, env=environment(**(env or {})), cwd=cwd, program=with_toy)


def toy_process(*arguments: str | bytes, env: dict[str, str] | None = None, **options: Any) -> Completed:
    """Run `llmctl toy` with `arguments` as a process."""
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    if "input" in options:
        del options["stdin"]
    return subprocess.run([*TOY, *arguments], env=environment(**(env or {})), timeout=240, check=False, **options)


def shell(script: str, cwd: Path | None = None) -> Completed:
    """Run a bash script in which $TOY is the toy program; stderr holds what the toy said."""
    full = f"TOY={' '.join(TOY)!r}; {script}"
    return subprocess.run(["bash", "-c", full], env=environment(), capture_output=True, timeout=240, check=False, cwd=cwd)


def assert_one_error(done: Completed, code: int, *parts: str) -> None:
    """One line, `llmctl: error: ...`, holding `parts`; nothing else on stderr; the exit code."""
    text = done.stderr.decode()
    assert done.returncode == code, text
    assert text.startswith("llmctl: error: ")
    assert text.count("\n") == 1
    assert text.endswith("\n")
    for part in parts:
        assert part in text


CODES = {
    "LlmctlError": 1,
    "UsageError": 2,
    "PartialFailure": 3,
    "InputError": 4,
    "WriteError": 5,
    "NonFiniteError": 6,
    "QualityGateError": 7,
    "NotFoundError": 10,
    "LockedError": 11,
}


@pytest.mark.parametrize(("kind", "code"), CODES.items())
def test_each_error_has_its_exit_code_and_one_line(kind: str, code: int) -> None:
    done = toy_process("--act", kind, "--message", "found\n  this,\twanted that")
    assert_one_error(done, code, "found this, wanted that")
    assert done.stdout == b""


def test_results_before_an_error_are_kept() -> None:
    done = toy("--act", "InputError", "--lines", "3")
    assert done.stdout.count(b"\n") == 3
    assert_one_error(done, 4)


def test_results_before_an_error_that_a_full_stdout_swallows_are_not_called_a_success() -> None:
    with open("/dev/full", "wb") as full:
        done = toy_process("--act", "InputError", "--lines", "3", stdout=full)
    assert done.returncode in (4, 5)


def test_a_missing_extra_names_the_line_that_installs_it() -> None:
    assert_one_error(toy("--act", "missing-extra"), 2, "pip install 'llmctl[gguf]'")


def test_success_is_zero_and_silent() -> None:
    done = toy("--lines", "2")
    assert (done.returncode, done.stderr, done.stdout.count(b"\n")) == (0, b"", 2)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--no-such-flag"], ["--no-such-flag"]),
        (["--lines"], ["--lines"]),
        (["--lines", "many"], ["--lines", "many"]),
        (["--lines", "-1"], ["--lines", "-1", "at least 0"]),
        (["--rate", "nan"], ["--rate", "nan", "finite"]),
        (["--rate", "inf"], ["--rate", "inf", "finite"]),
        (["--speed", "0"], ["--rate", "above 0"]),
        (["--rate", "1.5"], ["--rate", "at most 1"]),
        (["--shape", "oval"], ["--shape", "oval", "round, square"]),
        (["surplus"], ["surplus"]),
        (["--act", "write"], ["--output is missing"]),
    ],
)
def test_a_usage_error_names_the_flag_and_creates_nothing(arguments: list[str], parts: list[str], tmp_path: Path) -> None:
    done = toy(*arguments, cwd=tmp_path)
    assert_one_error(done, 2, *parts)
    assert list(tmp_path.iterdir()) == []


def test_bare_llmctl_shows_the_help_on_stderr() -> None:
    done = subprocess.run(ROOT_TOY, env=environment(), capture_output=True, timeout=240, check=False)
    assert done.returncode == 2
    assert done.stdout == b""
    assert b"Usage: llmctl" in done.stderr


def test_unknown_command() -> None:
    done = subprocess.run([*ROOT_TOY, "tokenise"], env=environment(), capture_output=True, timeout=240, check=False)
    assert_one_error(done, 2, "tokenise")


def test_the_help_lists_every_exit_code() -> None:
    done = subprocess.run([*ROOT_TOY, "--help"], env=environment(), capture_output=True, timeout=240, check=False)
    text = done.stdout.decode()
    assert done.returncode == 0
    assert done.stderr == b""
    for code in (*map(str, (0, 1, 2, 3, 4, 5, 6, 7, 10, 11)), "129/130/143", "141"):
        assert f" {code} " in text.replace("\n", " ")


# Surprises


def test_an_unexpected_failure_is_one_line_without_traceback() -> None:
    assert_one_error(toy("--act", "crash", "--message", "two\nlines"), 1, "unexpected RuntimeError: two lines", "--debug")


def test_debug_gives_the_traceback_and_then_the_line() -> None:
    done = toy("--act", "crash", "--debug")
    assert done.returncode == 1
    lines = done.stderr.decode().splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1].startswith("llmctl: error: unexpected RuntimeError: it broke")


@pytest.mark.parametrize("debug", [[], ["--debug"]])
@pytest.mark.parametrize("name", ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "DB_PASSWORD"])
def test_secrets_are_never_printed(debug: list[str], name: str) -> None:
    secret = "hf_abcdefghijklmnop"
    for act in ("crash", "InputError"):
        done = toy("--act", act, "--message", f"401 for {secret}", *debug, env={name: secret})
        assert secret not in done.stderr.decode()
        assert "***" in done.stderr.decode()


def test_a_missing_file_is_named() -> None:
    assert_one_error(toy("--act", "read-missing", "--message", "no/such/file"), 10, "no/such/file", "no such file")


def test_an_input_without_permission_is_a_bad_input() -> None:
    assert describe(PermissionError(errno.EACCES, "Permission denied", "run/config.toml")) == ("run/config.toml: Permission denied", 4)


def test_a_folder_where_a_file_is_wanted_is_named(tmp_path: Path) -> None:
    assert_one_error(toy("--act", "read-missing", "--message", str(tmp_path)), 1, str(tmp_path), "directory")


@pytest.mark.parametrize("name", [b"with space", b"new\nline", b"not-utf8-\xff\xfe", b"-leading", b"x" * 255, b"x" * 300, "字".encode()])
def test_odd_file_names_are_handled(name: bytes) -> None:
    done = toy("--act", "read-missing", b"--message=" + name)
    assert_one_error(done, 2 if len(name) > 255 else 10)  # a name that no file can have is a usage error


def test_out_of_memory_says_what_to_try() -> None:
    assert_one_error(toy("--act", "memory"), 1, "out of memory", "smaller")


# Streams


@pytest.mark.parametrize("arguments", [["--lines", "1"], ["--lines", "5000"], ["--act", "print"], ["--help"], ["--print-config"]])
def test_a_full_stdout_is_exit_5(arguments: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        done = toy_process(*arguments, stdout=full)
    assert_one_error(done, 5, "cannot write to stdout", "no space left")


@pytest.mark.parametrize("arguments", ["--lines 1", "--lines 0", "--print-config"])
def test_a_closed_stdout_is_exit_5(arguments: str) -> None:
    assert_one_error(shell(f"$TOY {arguments} >&-"), 5, "cannot write to stdout", "closed")


@pytest.mark.parametrize("arguments", ["--lines 5000", "--act print --lines 2000", "--lines 100000"])
def test_a_reader_that_leaves_gives_141_and_no_noise(arguments: str) -> None:
    done = shell(f"$TOY {arguments} | head -1; exit ${{PIPESTATUS[0]}}")
    assert done.stderr == b""
    assert done.returncode == 141
    assert done.stdout.count(b"\n") == 1


def test_help_to_a_reader_that_left_gives_141() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = toy_process("--help", stdout=writer)
    os.close(writer)
    assert done.stderr == b""
    assert done.returncode == 141


def test_every_line_comes_through_a_pipe() -> None:
    done = shell("$TOY --lines 3000 | cat")
    assert done.stdout.count(b"\n") == 3000
    assert done.returncode == 0


@pytest.mark.parametrize("where", [">&-", ">/dev/full"])
def test_a_broken_stderr_does_not_hide_the_exit_code(where: str) -> None:
    done = shell(f"$TOY --act InputError 2{where}")
    assert done.returncode == 4
    assert shell(f"$TOY --lines 2 --act warn 2{where}").returncode == 0


def test_a_closed_stdin_is_a_usage_error_where_input_is_needed() -> None:
    assert_one_error(shell("$TOY --act stdin <&-"), 2, "stdin is closed")
    assert shell("$TOY --lines 1 <&-").returncode == 0


def test_stdin_is_read_as_bytes_and_decoded_as_utf8() -> None:
    for variables in ({"LC_ALL": "C", "PYTHONUTF8": "0"}, {"PYTHONIOENCODING": "ascii"}):
        done = toy_process("--act", "stdin", input="字\U0001f98a é".encode(), env=variables)
        assert (done.returncode, done.stdout.decode()) == (0, "字\U0001f98a é")


def test_bad_stdin_is_refused_by_name() -> None:
    assert toy("--act", "stdin", input=b"\xef\xbb\xbfmarked").stdout == b"marked"
    assert_one_error(toy("--act", "stdin", input="text".encode("utf-16")), 4, "UTF-16", "iconv")
    assert_one_error(toy("--act", "stdin", input=b"good\nb\xffd"), 4, "stdin", "byte 6", "line 2")
    assert_one_error(toy("--act", "stdin", input=b"x" * 1001), 4, "1,000 bytes")
    assert toy("--act", "stdin", input=b"a\0b").stdout == b"a\0b"


def test_a_filter_answers_line_by_line() -> None:
    with subprocess.Popen([*TOY, "--act", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for line in (b"one\n", b"two\n"):
            process.stdin.write(line)
            process.stdin.flush()
            assert process.stdout.readline() == line
        process.stdin.close()
        assert process.wait(timeout=240) == 0


def test_warnings_come_once_and_stay_when_quiet() -> None:
    assert toy("--act", "warn").stderr == b"llmctl: warning: odd\nnote\n"
    assert toy("--act", "warn", "-q").stderr == b"llmctl: warning: odd\n"
    assert toy("--act", "warn", "-v").stderr == b"llmctl: warning: odd\nnote\ndetail\n"


# Files


def test_writing_where_one_may_not_is_a_usage_error(tmp_path: Path) -> None:
    assert_one_error(toy("--act", "write", "-o", "no/such/folder/file", cwd=tmp_path), 2, "no/such/folder/file")
    assert list(tmp_path.iterdir()) == []


def test_a_file_size_limit_is_exit_5_and_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "result"
    target.write_bytes(b"old")
    done = shell(f"ulimit -f 20; $TOY --act write -o {target}")
    assert_one_error(done, 5, str(target), "limit")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


# Signals


def test_a_keyboard_interrupt_ends_by_sigint() -> None:
    done = toy_process("--act", "interrupt")
    assert done.returncode == -signal.SIGINT
    assert b"Traceback" not in done.stderr
    assert b"llmctl: error: interrupted" in done.stderr


@pytest.mark.parametrize("name", ["SIGHUP", "SIGINT", "SIGTERM"])
def test_an_interrupted_job_dies_by_its_signal_after_saying_how_to_go_on(name: str) -> None:
    done = toy_process("--act", "interrupted", "--message", name, "--lines", "2")
    assert done.returncode == -getattr(signal, name)
    assert done.stderr == b"llmctl: stopped at step 3; go on with --resume\n"
    assert done.stdout.count(b"\n") == 2


def started(act: str, word: bytes, **options: Any) -> "subprocess.Popen[bytes]":
    """A toy that runs until it gets a signal, and has said `word` on stderr."""
    process = subprocess.Popen([*TOY, "--act", act], stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(), **options)
    assert process.stderr is not None
    assert word in process.stderr.readline()
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_outside_a_job_ends_at_once_without_traceback(number: signal.Signals) -> None:
    process = started("sleep", b"sleeping")
    process.send_signal(number)
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == -number
    assert b"Traceback" not in stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_in_a_job_saves_first(number: signal.Signals) -> None:
    process = started("job", b"started")
    process.send_signal(number)
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == -number
    assert stderr == b"saving\nllmctl: saved; go on with --resume\n"


def test_a_second_signal_does_not_wait_for_the_save() -> None:
    process = started("job", b"started")
    assert process.stderr is not None
    process.send_signal(signal.SIGINT)
    assert b"saving" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == -signal.SIGINT
    assert b"Traceback" not in stderr
    assert b"--resume" not in stderr


def test_usr1_asks_for_a_save_and_the_job_goes_on() -> None:
    process = started("job", b"started")
    assert process.stderr is not None
    process.send_signal(signal.SIGUSR1)
    assert process.stderr.readline() == b"saved on request\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=240)
    assert process.returncode == -signal.SIGTERM


def test_nohup_is_respected() -> None:
    process = started("job", b"started", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    assert process.stderr is not None
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGUSR1)
    assert process.stderr.readline() == b"saved on request\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=240)
    assert process.returncode == -signal.SIGTERM


def test_an_interrupt_stops_a_shell_loop_too() -> None:
    loop = f"for i in 1 2 3; do {' '.join(TOY)} --act job; echo again; done"
    process = subprocess.Popen(
        ["bash", "-c", loop], stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(), start_new_session=True
    )
    assert process.stderr is not None
    assert process.stderr.readline() == b"started\n"
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does for Ctrl-C
    stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == -signal.SIGINT
    assert (stdout, stderr) == (b"", b"saving\nllmctl: saved; go on with --resume\n")


# Settings


def test_settings_come_from_flags_then_environment_then_file_then_defaults(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('lines = 1\nrate = 0.25\nmessage = "file"\nstop = ["a", "b"]\n')
    done = toy("-c", "run.toml", "-n", "3", "--print-config", cwd=tmp_path, env={"LLMCTL_TOY_RATE": "0.75", "LLMCTL_TOY_LINES": "2"})
    assert done.returncode == 0
    table = tomllib.loads(done.stdout.decode())
    assert (table["lines"], table["rate"], table["message"], table["stop"], table["shape"]) == (3, 0.75, "file", ["a", "b"], "round")
    text = done.stdout.decode()
    assert "lines = 3  # flag" in text
    assert "rate = 0.75  # environment LLMCTL_TOY_RATE" in text
    assert 'message = "file"  # file run.toml' in text
    assert 'shape = "round"  # default' in text


def test_what_print_config_prints_can_be_given_to_config(tmp_path: Path) -> None:
    first = toy(
        "--message", 'a "quote" \\ and 字\n\x7f', "--no-careful", "--stop", "x,y", "--stop", "", "-o", "a b", "--print-config", cwd=tmp_path
    )
    (tmp_path / "again.toml").write_bytes(first.stdout)
    second = toy("--config", "again.toml", "--print-config", cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    assert tomllib.loads(second.stdout.decode()) == tomllib.loads(first.stdout.decode())


@pytest.mark.parametrize(
    ("content", "code", "parts"),
    [
        (b"lines = = 3\n", 2, ["bad.toml", "line 1"]),
        (b"lines = 1\nlines = 2\n", 2, ["bad.toml", "line 2"]),
        (b"linez = 3\n", 2, ["bad.toml", "linez", "did you mean 'lines'"]),
        (b'lines = "3"\n', 2, ["bad.toml", "lines", "whole number"]),
        (b"lines = true\n", 2, ["bad.toml", "lines", "whole number"]),
        (b"lines = -3\n", 2, ["bad.toml", "--lines", "at least 0"]),
        (b"[toy]\nlines = 3\n", 2, ["bad.toml", "toy"]),
        (b"message = \xff\n", 2, ["bad.toml", "UTF-8"]),
        (None, 10, ["bad.toml", "no such file"]),
    ],
)
def test_a_bad_config_file_is_named_with_its_key(content: bytes | None, code: int, parts: list[str], tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "bad.toml").write_bytes(content)
    assert_one_error(toy("--config", "bad.toml", cwd=tmp_path), code, *parts)


@pytest.mark.parametrize(
    ("name", "value", "parts"),
    [
        ("LLMCTL_TOY_LINES", "abc", ["LLMCTL_TOY_LINES", "abc"]),
        ("LLMCTL_TOY_LINES", "-1", ["LLMCTL_TOY_LINES", "at least 0"]),
        ("LLMCTL_TOY_CAREFUL", "maybe", ["LLMCTL_TOY_CAREFUL", "maybe"]),
        ("LLMCTL_TOY_LINE", "1", ["LLMCTL_TOY_LINE", "did you mean"]),
    ],
)
def test_a_bad_environment_variable_is_named(name: str, value: str, parts: list[str]) -> None:
    assert_one_error(toy(env={name: value}), 2, *parts)


def test_off_a_terminal_nothing_is_coloured_and_on_one_the_error_is_still_a_line() -> None:
    assert b"\x1b" not in toy("--act", "InputError").stderr
    leader, follower = pty.openpty()
    try:
        done = toy_process("--act", "InputError", stderr=follower, env={"TERM": "dumb"})
        assert done.returncode == 4
        fcntl.fcntl(leader, fcntl.F_SETFL, os.O_NONBLOCK)
        assert os.read(leader, 4096).replace(b"\r\n", b"\n") == b"llmctl: error: it broke\n"
    finally:
        os.close(leader)
        os.close(follower)
