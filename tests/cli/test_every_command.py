"""What all commands have in common, tried on each of them: missing input, bad places, bad settings, lost models."""

import os
import re
import tomllib
from pathlib import Path

import pytest

from tests.cli.in_process import Completed, run_here
from tests.cli.test_boundary import assert_one_error, environment

COMMANDS = ["tokenize train", "tokenize encode", "tokenize decode", "tokenize count", "tokenize pack", "tokenize verify"]
COMMANDS += ["pretrain", "finetune", "generate", "eval"]
MAKERS = {
    "tokenize train": ["text.txt"],
    "tokenize pack": ["text.txt", "--tokenizer", "tok"],
    "pretrain": ["--data", "shards"],
    "finetune": ["--data", "rows.jsonl", "--model", "model"],
}
"""Commands that write a folder, with the input that they want; none of it is there, for the folder is looked at first."""
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent", "HOME": "/nonexistent"}


def llmctl(*arguments: str, cwd: Path, env: dict[str, str] | None = None) -> Completed:
    return run_here(list(arguments), cwd=cwd, env=environment(**OFFLINE, **(env or {})))


@pytest.mark.parametrize("command", COMMANDS)
def test_settings_print_as_toml_with_origins(command: str, tmp_path: Path) -> None:
    done = llmctl(*command.split(), "--print-config", cwd=tmp_path)  # what a command needs to run may be missing
    assert done.returncode == 0, done.stderr
    tomllib.loads(done.stdout.decode())
    assert all(line.endswith(("  # default", "  # flag", " is not set")) for line in done.stdout.decode().splitlines())
    assert done.stderr == b""


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_flag_key_or_variable_is_exit_2(command: str, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("colour = 3\n")
    variable = f"LLMCTL_{command.replace(' ', '_').upper()}_COLOUR"
    assert_one_error(llmctl(*command.split(), "--colour", cwd=tmp_path), 2, "--colour")
    assert_one_error(llmctl(*command.split(), "--config", "run.toml", cwd=tmp_path), 2, "run.toml", "colour")
    assert_one_error(llmctl(*command.split(), cwd=tmp_path, env={variable: "3"}), 2, variable)
    assert [path.name for path in tmp_path.iterdir()] == ["run.toml"]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in ("generate", "eval")])
def test_without_what_it_needs_a_command_says_what_is_missing(command: str, tmp_path: Path) -> None:
    assert_one_error(llmctl(*command.split(), cwd=tmp_path), 2, "missing")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["generate", "eval"])
def test_without_input_generate_and_eval_say_so(command: str, tmp_path: Path) -> None:
    assert_one_error(llmctl(command, cwd=tmp_path), 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", MAKERS)
def test_an_output_folder_that_cannot_be_is_refused_before_anything_is_loaded(command: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in ("file", "/", "no/such/parent"):
        done = llmctl(*command.split(), *MAKERS[command], "--out-dir", place, cwd=tmp_path)
        assert_one_error(done, 2, "--out-dir", place)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "x", "--model"],
        ["eval", "text.txt", "--model"],
        ["finetune", "--data", "rows.jsonl", "--out-dir", "run", "--model"],
        ["tokenize", "count", "text.txt", "--tokenizer"],
        ["tokenize", "pack", "text.txt", "--out-dir", "out", "--tokenizer"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
@pytest.mark.parametrize("model", ["no/such-model", "./nowhere", "nonsense"])
def test_a_model_that_is_nowhere_is_exit_10(arguments: list[str], model: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("text\n" * 10)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    assert_one_error(llmctl(*arguments, model, cwd=tmp_path), 10, "not found")
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt", "rows.jsonl"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["tokenize", "train", "--out-dir", "tok"],
        ["tokenize", "verify"],
        ["pretrain", "--out-dir", "run", "--data"],
        ["eval"],
        ["generate", "--prompt-file"],
        ["generate", "--input"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("name", ["nowhere", "with space", "new\nline", "字", "x" * 255])
def test_an_input_that_is_nowhere_is_exit_10(arguments: list[str], name: str, tmp_path: Path) -> None:
    assert_one_error(llmctl(*arguments, name, cwd=tmp_path), 10)
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_not_utf8_is_shown_escaped(tmp_path: Path) -> None:
    name = os.fsdecode(b"bad-\xff-name")
    for arguments in (["tokenize", "verify"], ["eval"], ["generate", "--prompt-file"]):
        done = llmctl(*arguments, name, cwd=tmp_path)
        assert_one_error(done, 10)
        assert re.search(r"bad-\\(udc|x)ff-name", done.stderr.decode())
