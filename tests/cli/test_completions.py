"""The completion scripts: fresh, well-formed, and right when each shell runs them."""

import os
import pty
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import typer

from llmctl.cli import completions
from llmctl.cli.app import app

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "completions"
COMMANDS = {"tokenize", "pretrain", "finetune", "generate", "eval"}

# Calls the completion function as bash does at TAB: words from the arguments, the last one under the cursor.
BASH = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 ))
_llmctl
printf '%s\\n' "${COMPREPLY[@]}"
"""


def bash(*words: str, cwd: Path | None = None) -> set[str]:
    script = ["bash", "--norc", "-c", BASH, "bash", str(FOLDER / "llmctl.bash"), "llmctl", *words]
    environment = {"PATH": "/nowhere"}  # no program can be started, Python least of all
    done = subprocess.run(
        [shutil.which("bash") or "bash", *script[1:]], capture_output=True, text=True, timeout=240, check=True, cwd=cwd, env=environment
    )
    assert done.stderr == ""
    return set(done.stdout.split("\n")) - {""}


def fish(line: str, cwd: Path | None = None) -> set[str]:
    command = f"source {FOLDER / 'llmctl.fish'}; complete -C {line!r}"
    done = subprocess.run(["fish", "--no-config", "-c", command], capture_output=True, text=True, timeout=240, check=True, cwd=cwd)
    assert done.stderr == ""
    return {found.split("\t")[0] for found in done.stdout.splitlines()}


@pytest.mark.parametrize("name", ["llmctl.bash", "_llmctl", "llmctl.fish"])
def test_the_scripts_are_fresh(name: str) -> None:
    written = (FOLDER / name).read_text(encoding="utf-8")
    assert written == completions.scripts()[name], "run `make completions`"


def test_the_tree_holds_every_flag_of_every_command() -> None:
    nodes = {node.path: node for node in completions.command_tree().walk()}
    assert COMMANDS | {"tokenize pack"} <= set(nodes)

    def check(command: object, path: str) -> None:
        names = {name for flag in nodes[path].flags for name in flag.names}
        for parameter in command.params:  # type: ignore[attr-defined]
            if parameter.param_type_name == "option":
                assert {*parameter.opts, *parameter.secondary_opts} <= names
        for name, child in getattr(command, "commands", {}).items():
            check(child, f"{path} {name}".strip())

    check(typer.main.get_command(app), "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shells_parse_their_scripts(shell: str) -> None:
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed")
    name = {"bash": "llmctl.bash", "zsh": "_llmctl", "fish": "llmctl.fish"}[shell]
    done = subprocess.run([program, "-n", FOLDER / name], capture_output=True, text=True, timeout=240, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_no_script_starts_python() -> None:
    for name, content in completions.scripts().items():
        code = [line for line in content.splitlines() if not line.startswith("#")]
        assert not any("python" in line.lower() and "`" not in line and "-d '" not in line for line in code), name


# bash


def test_bash_commands() -> None:
    assert bash("") >= COMMANDS
    assert bash("gen") == {"generate"}
    assert bash("tokenize", "") >= {"train", "encode", "decode", "count", "pack", "verify"}
    assert bash("tokenize", "pa") == {"pack"}
    assert bash("--v") == {"--version"}


def test_bash_flags_of_each_command_are_its_own() -> None:
    assert bash("generate", "--max-n") == {"--max-new-tokens"}
    assert bash("generate", "--tem") >= {"--temp", "--temperature"}
    assert bash("pretrain", "--max-n") == set()
    assert bash("pretrain", "--dep") == {"--depth"}
    assert bash("tokenize", "pack", "--fiel") == {"--field"}
    assert bash("tokenize", "--fiel") == set()
    assert "--help" in bash("eval", "--")


def test_bash_values() -> None:
    assert bash("pretrain", "--device", "") == {"auto", "cpu", "cuda", "mps"}
    assert bash("pretrain", "--device", "c") == {"cpu", "cuda"}
    assert bash("pretrain", "--device", "=") == {"auto", "cpu", "cuda", "mps"}
    assert bash("pretrain", "--device", "=", "c") == {"cpu", "cuda"}
    assert bash("pretrain", "--max-steps", "") == set()
    assert bash("pretrain", "--precision", "b") == {"bf16"}


def test_bash_paths(tmp_path: Path) -> None:
    (tmp_path / "a folder").mkdir()
    (tmp_path / "a file").write_text("")
    assert bash("pretrain", "--out-dir", "", cwd=tmp_path) == {"a folder"}
    assert bash("pretrain", "--config", "", cwd=tmp_path) == {"a folder", "a file"}
    assert bash("generate", "-m", "a f", cwd=tmp_path) == {"a folder", "a file"}
    assert bash("eval", "a", cwd=tmp_path) == {"a folder", "a file"}
    assert bash("eval", "--", "a", cwd=tmp_path) == {"a folder", "a file"}


# fish


needs_fish = pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")


@needs_fish
def test_fish(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    assert fish("llmctl ", tmp_path) >= COMMANDS
    assert "file" not in fish("llmctl ", tmp_path)
    assert fish("llmctl gen") == {"generate"}
    assert fish("llmctl tokenize pa") == {"pack"}
    assert fish("llmctl generate --max-n") == {"--max-new-tokens"}
    assert fish("llmctl pretrain --max-n") == set()
    assert fish("llmctl tokenize pack --fiel") == {"--field"}
    assert fish("llmctl pretrain --device c") == {"cpu", "cuda"}
    assert fish("llmctl pretrain --device=c") == {"--device=cpu", "--device=cuda"}
    assert fish("llmctl pretrain --out-dir f", tmp_path) == {"folder/"}
    assert fish("llmctl pretrain --config f", tmp_path) == {"folder/", "file"}
    assert fish("llmctl eval f", tmp_path) == {"folder/", "file"}
    assert fish("llmctl pretrain --max-steps f", tmp_path) == set()


# zsh


def zsh(line: str, expected: str, home: Path) -> None:
    """Type `line` and TAB into an interactive zsh; wait until `expected` stands on the screen."""
    (home / ".zshrc").write_text(
        f"PS1='ready> '\nfpath=({FOLDER} $fpath)\nautoload -U compinit\ncompinit -u -d {home}/dump\nunsetopt zle_bracketed_paste\n"
    )
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "ZDOTDIR": str(home), "TERM": "dumb", "COLUMNS": "200"}
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        ["zsh", "-d", "-i"], stdin=follower, stdout=follower, stderr=follower, env=environment, cwd=home, start_new_session=True
    )
    os.close(follower)
    screen, typed = "", False
    deadline = time.monotonic() + 240
    try:
        while time.monotonic() < deadline and not (typed and expected in screen):
            if "ready> " in screen and not typed:
                os.write(leader, line.encode() + b"\t")
                typed, screen = True, ""
            if select.select([leader], [], [], 0.2)[0]:
                screen += os.read(leader, 4096).decode("utf-8", "replace")
    finally:
        process.kill()
        process.wait()
        os.close(leader)
    assert expected in screen, screen


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("llmctl gen", "llmctl generate "),
        ("llmctl tokenize pac", "llmctl tokenize pack "),
        ("llmctl generate --max-n", "--max-new-tokens="),
        ("llmctl pretrain --device cu", "--device cuda "),
        ("llmctl tokenize pack --fie", "--field="),
        ("llmctl pretrain --out-dir fold", "--out-dir folder/"),
        ("llmctl eval fil", "llmctl eval file "),
    ],
)
def test_zsh(line: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    zsh(line, expected, tmp_path)
