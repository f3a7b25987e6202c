"""What starting llmctl loads and leaves behind: help, version and usage errors need no heavy library, no home and no disk."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmctl.cli.command import COMMANDS
from tests.test_floors import HEAVY

ROOT = Path(__file__).parent.parent

# Runs llmctl in this interpreter and reports, as the last line of stderr, which modules it loaded.
REPORTER = """
import atexit, json, sys
atexit.register(lambda: print("\\nLOADED " + json.dumps(sorted({name.split(".")[0] for name in sys.modules})), file=sys.stderr))
from llmctl.cli.main import main
main()
"""

# The heavy libraries can be found but not imported, as where one is broken.
BLOCKER = """
import importlib.machinery, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {heavy!r}:
            return importlib.machinery.ModuleSpec(name, self)
    def create_module(self, spec):
        raise ImportError(f"{{spec.name}} was imported", name=spec.name)
    def exec_module(self, module):
        raise AssertionError
sys.meta_path.insert(0, Refuse())
from llmctl.cli.main import main
main()
"""

STARTS = [
    (["--help"], 0),
    (["--version"], 0),
    ([], 2),
    (["--no-such-flag"], 2),
    (["no-such-command"], 2),
    *[([command, "--help"], 0) for command in ("tokenize", "pretrain", "finetune", "generate", "eval", "export")],
    (["generate", "--no-such-flag"], 2),
    (["pretrain", "--max-steps", "many"], 2),
]


def run(arguments: list[str], program: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `program` with `arguments`, in `cwd`, with PATH and `environment` as its whole environment."""
    env = {"PATH": os.environ.get("PATH", ""), "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **environment}
    return subprocess.run([sys.executable, "-c", program, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize(("arguments", "code"), STARTS, ids=lambda value: " ".join(value) if isinstance(value, list) else None)
def test_starting_loads_nothing_heavy(arguments: list[str], code: int, tmp_path: Path) -> None:
    done = run(arguments, REPORTER, tmp_path, HOME=str(tmp_path))
    assert done.returncode == code, done.stderr
    loaded = set(json.loads(done.stderr.rsplit("LOADED ", 1)[1]))
    assert loaded & {*HEAVY, "pydantic"} == set()


@pytest.mark.parametrize("command", COMMANDS)
def test_only_the_command_that_is_called_is_declared(command: str, tmp_path: Path) -> None:
    program = (
        "import sys; from llmctl.cli.main import run; code = run(sys.argv[1:]); "
        "print(*(name for name in sys.modules if name.startswith('llmctl.cli.')), file=sys.stderr); sys.exit(code)"
    )
    done = run([command, "--no-such-flag"], program, tmp_path)
    assert done.returncode == 2, done.stderr
    loaded = {name for name in COMMANDS if f"llmctl.cli.{name}" in done.stderr.splitlines()[-1].split()}
    assert loaded == ({"finetune", "pretrain"} if command == "finetune" else {command})


@pytest.mark.parametrize(("arguments", "code"), STARTS, ids=lambda value: " ".join(value) if isinstance(value, list) else None)
def test_starting_works_without_the_heavy_libraries_and_without_home(arguments: list[str], code: int, tmp_path: Path) -> None:
    done = run(arguments, BLOCKER.format(heavy=HEAVY), tmp_path)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == [], "something was written into the working folder"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["generate", "--help"]], ids=" ".join)
def test_help_writes_nothing_at_home(arguments: list[str], tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    done = run(arguments, REPORTER, tmp_path, HOME=str(home), XDG_CACHE_HOME=str(home / "cache"))
    assert done.returncode == 0, done.stderr
    assert list(home.iterdir()) == []


def test_the_module_form_is_the_same_program(tmp_path: Path) -> None:
    env = {"PATH": os.environ.get("PATH", ""), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "llmctl", "--version"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0
    assert done.stdout.startswith("llmctl ")


@pytest.mark.parametrize("columns", ["1", "20", "200"])
def test_help_survives_any_terminal_and_has_no_colour(columns: str, tmp_path: Path) -> None:
    for variables in ({"TERM": "dumb"}, {"NO_COLOR": "1"}, {"TERM": "xterm-256color"}):
        done = run(["generate", "--help"], REPORTER, tmp_path, COLUMNS=columns, **variables)
        assert done.returncode == 0, done.stderr
        assert "\x1b" not in done.stdout + done.stderr
