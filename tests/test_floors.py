"""The floors of the house, read off the syntax trees: who may import whom, and who may speak.

A module imports only from lower floors or from its own folder. The table is CONTRIBUTING's; a new module of core needs a line in it.
What the program loads when it starts imports, at module top, floor 0 and typer only; a cli module that is loaded later, inside a
function, may import core at its top.
"""

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import llmctl
from llmctl.cli.command import COMMANDS

PACKAGE = Path(llmctl.__file__).parent

FLOORS = {
    "card": 0,
    "config": 0,
    "errors": 0,
    "files": 0,
    "memory": 0,
    "sharedlib": 0,
    "tokenizer": 1,
    "distributed": 1,
    "runlog": 1,
    "quant": 1,
    "gguf": 1,
    "hub": 1,
    "tensorfile": 1,
    "model": 1,
    "native": 1,
    "cachefiles": 2,
    "families": 2,
    "data": 2,
    "report": 2,
    "checkpoint": 3,
    "infer": 4,
    "train": 5,
    "evals": 5,
    "export": 5,
}
CLI_FLOOR = 6
HEAVY = {"torch", "transformers", "rich", "numpy", "tokenizers", "safetensors", "huggingface_hub", "jinja2"}


@dataclass(frozen=True)
class Import:
    """One imported module, with where it stands: `at_top` means that it runs when the module is imported."""

    name: str
    line: int
    at_top: bool
    names: tuple[str, ...] = ()


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ["llmctl", *path.relative_to(PACKAGE).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports_of(tree: ast.Module, module: str, *, is_package: bool) -> list[Import]:
    """Every import of a module except those under `if TYPE_CHECKING`, relative ones made absolute."""
    return list(_walk(tree.body, module, is_package, at_top=True))


def _walk(body: list[ast.stmt], module: str, is_package: bool, *, at_top: bool) -> Iterator[Import]:
    for node in body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, at_top)
        elif isinstance(node, ast.ImportFrom):
            yield Import(_absolute(node, module, is_package), node.lineno, at_top, tuple(alias.name for alias in node.names))
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from _walk(node.orelse, module, is_package, at_top=at_top)
        else:
            inside = at_top and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            for field in ("body", "orelse", "finalbody"):
                yield from _walk(getattr(node, field, []), module, is_package, at_top=inside)
            for part in [*getattr(node, "handlers", []), *getattr(node, "cases", [])]:
                yield from _walk(part.body, module, is_package, at_top=inside)


def _absolute(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    base = parts[: len(parts) - node.level + is_package]
    return ".".join([*base, node.module] if node.module else base)


def targets(found: Import) -> list[str]:
    """The llmctl modules that an import reaches: `from llmctl.core import files` reaches llmctl.core.files."""
    inner = [f"{found.name}.{name}" for name in found.names if f"{found.name}.{name}" in MODULES]
    return inner or [found.name]


def floor_of(module: str) -> int:
    """The floor of a module of the package; the bare packages llmctl and llmctl.core hold nothing and lie below all."""
    parts = module.split(".")
    if module in ("llmctl", "llmctl.core"):
        return -1
    if parts[1] in ("cli", "__main__"):
        return CLI_FLOOR
    assert parts[1] == "core", f"{module}: neither cli nor core"
    assert parts[2] in FLOORS, f"{module}: llmctl/core/{parts[2]} has no floor; give it one in tests/test_floors.py and CONTRIBUTING.md"
    return FLOORS[parts[2]]


def room_of(module: str) -> tuple[str, ...]:
    """The folder or file that a module belongs to: ('core', 'model') for llmctl.core.model.rope."""
    parts = module.split(".")[1:]
    return tuple(parts[:2]) if parts[:1] == ["core"] else tuple(parts[:1])


def loaded_at_start() -> set[str]:
    """The modules that `llmctl.cli.main`, `.app` and the commands' modules load, followed through the imports at module top."""
    found, todo = set(), ["llmctl.cli.main", "llmctl.cli.app", *(f"llmctl.cli.{name}" for name in COMMANDS)]
    while todo:
        module = todo.pop()
        if module in found or module not in MODULES:
            continue
        found.add(module)
        path = MODULES[module]
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for imported in imports_of(tree, module, is_package=path.name == "__init__.py"):
            if imported.at_top:
                todo += targets(imported)
    return found


AT_START = loaded_at_start()


def complaints(module: str, source: str, *, is_package: bool = False) -> list[str]:
    """Every breach of the floors' rules in one module, as `module:line: what`."""
    tree = ast.parse(source)
    wrong = []
    in_core = module.startswith("llmctl.core")
    own_floor = floor_of(module)
    for found in imports_of(tree, module, is_package=is_package):
        where = f"{module}:{found.line}"
        top_name = found.name.split(".")[0]
        if top_name == "llmctl":
            for target in targets(found):
                other = floor_of(target)
                cli_to_cli = not in_core and other == CLI_FLOOR
                if not (other < own_floor or room_of(target) == room_of(module) or (own_floor == 0 and other == 0) or cli_to_cli):
                    wrong.append(f"{where}: floor {own_floor} imports {target} of floor {other}")
                if not in_core and found.at_top and 0 < other < CLI_FLOOR and module in AT_START:
                    wrong.append(f"{where}: cli imports {target} at module top; import it inside the function that needs it")
            continue
        if in_core and top_name in ("typer", "click", "rich"):
            wrong.append(f"{where}: core imports {found.name}")
        if found.at_top and top_name == "transformers":
            wrong.append(f"{where}: transformers at module top; import it inside the function that needs it")
        if own_floor == 0 and top_name not in sys.stdlib_module_names:
            wrong.append(f"{where}: floor 0 is stdlib only, {found.name} is not")
        if not in_core and found.at_top and top_name not in sys.stdlib_module_names | {"typer"}:
            wrong.append(f"{where}: cli imports {found.name} at module top; import it inside the function that needs it")
    if in_core:
        wrong += [
            f"{module}:{node.lineno}: core prints"
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("print", "input")
        ]
        wrong += [
            f"{module}:{node.lineno}: core touches {ast.unparse(node)}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.stdout", "sys.stderr", "sys.stdin")
        ]
    return wrong


def test_the_commands_are_loaded_at_start() -> None:
    assert {f"llmctl.cli.{name}" for name in ("tokenize", "pretrain", "finetune", "generate", "eval", "export", "options")} <= AT_START


@pytest.mark.parametrize("module", MODULES)
def test_each_module_keeps_to_its_floor(module: str) -> None:
    path = MODULES[module]
    assert complaints(module, path.read_text(encoding="utf-8"), is_package=path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("llmctl.core.model.rope", "from llmctl.core.infer import Engine", "floor 1 imports llmctl.core.infer of floor 4"),
        ("llmctl.core.model.rope", "def f():\n    import llmctl.core.train.loop", "floor 1 imports llmctl.core.train.loop of floor 5"),
        ("llmctl.core.model.rope", "from llmctl.core.tokenizer import Tokenizer", "floor 1 imports llmctl.core.tokenizer of floor 1"),
        ("llmctl.core.model.rope", "from ..infer import engine", "floor 1 imports llmctl.core.infer"),
        ("llmctl.core.files", "from llmctl.cli.streams import out", "floor 0 imports llmctl.cli.streams of floor 6"),
        ("llmctl.core.files", "import numpy", "floor 0 is stdlib only"),
        ("llmctl.core.data.loader", "def f():\n    import rich.progress", "core imports rich.progress"),
        ("llmctl.core.data.loader", "import typer", "core imports typer"),
        ("llmctl.core.data.loader", "def f():\n    print(1)", "core prints"),
        ("llmctl.core.data.loader", "import sys\nsys.stderr.write('x')", "core touches sys.stderr"),
        ("llmctl.core.tokenizer.tokenizer", "import transformers", "transformers at module top"),
        ("llmctl.cli.generate", "try:\n    import torch\nexcept ImportError:\n    pass", "cli imports torch at module top"),
        ("llmctl.cli.generate", "class A:\n    from rich.console import Console", "cli imports rich.console at module top"),
        ("llmctl.cli.generate", "from llmctl.core.infer import Engine", "cli imports llmctl.core.infer at module top"),
    ],
)
def test_the_rules_catch_a_breach(module: str, source: str, complaint: str) -> None:
    assert any(complaint in found for found in complaints(module, source)), complaints(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("llmctl.core.model.rope", "import torch\nfrom llmctl.core.model.cache import KVCache\nfrom llmctl.core.config import ModelConfig"),
        ("llmctl.core.train.loop", "from llmctl.core.infer import Engine\nfrom llmctl import __version__"),
        ("llmctl.core.config.resolve", "from llmctl.core.errors import UsageError"),
        ("llmctl.cli.training_view", "from llmctl.core.train.events import Event"),
        ("llmctl.cli.generate", "def run():\n    import torch\n    from llmctl.core.infer import Engine"),
        ("llmctl.cli.generate", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
    ],
)
def test_the_rules_let_the_right_thing_pass(module: str, source: str) -> None:
    assert complaints(module, source) == []


def test_contributing_shows_the_same_floors() -> None:
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d) \| (.+?) \|$", text, re.MULTILINE)
    shown = {name: int(floor) for floor, names in rows if "cli" not in names for name in names.split(", ")}
    assert shown == FLOORS
