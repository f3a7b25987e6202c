"""The documentation says what the program does: tables made from the code, examples that parse, links that lead somewhere."""

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from llmctl.cli.app import app
from llmctl.cli.completions import command_tree
from llmctl.core import errors

ROOT = Path(__file__).parent.parent
PAGES = sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md"), *(ROOT / "examples").glob("*.md")])
COMMANDS = [node.path for node in command_tree().walk() if node.path and not node.children and node.path != "toy"]
"""Without the command that the boundary tests add for themselves."""


def load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generator = load_generator()


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_the_tables_are_fresh(page: Path) -> None:
    assert generator.fresh(page) == page.read_text(encoding="utf-8"), "run `make docs`"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_page_with_a_table_examples_and_exit_codes(command: str) -> None:
    text = (ROOT / "docs" / f"{command.split()[0]}.md").read_text(encoding="utf-8")
    assert f"<!-- flags: {command} -->" in text
    assert f"llmctl {command} " in text
    assert "(exit-codes.md)" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_a_table_holds_every_flag(command: str) -> None:
    table = generator.flags_table(command)
    for parameter in generator.click_command(command).params:
        if parameter.param_type_name == "option" and not parameter.name.startswith("common_"):
            for name in [*parameter.opts, *parameter.secondary_opts]:
                assert f"`{name}`" in table


def test_the_exit_codes_are_those_of_the_errors() -> None:
    text = (ROOT / "docs" / "exit-codes.md").read_text(encoding="utf-8")
    documented = {int(code) for codes in re.findall(r"^\| ([\d, ]+) \|", text, re.MULTILINE) for code in codes.split(",")}
    raised = {kind.exit_code for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.LlmctlError)}
    assert documented == raised | {0, 129, 130, 143, 141}


def links() -> Iterator[tuple[Path, str]]:
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if not re.match(r"[a-z]+:", target):
                yield page, target


@pytest.mark.parametrize(("page", "target"), list(links()), ids=lambda value: value.name if isinstance(value, Path) else value)
def test_links_lead_somewhere(page: Path, target: str) -> None:
    name, _, anchor = target.partition("#")
    there = page.parent / name if name else page
    assert there.exists()
    if anchor:
        headings = re.findall(r"^#+ (.+)$", there.read_text(encoding="utf-8"), re.MULTILINE)
        assert anchor in {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def examples() -> Iterator[tuple[str, list[str]]]:
    """(page, arguments) of each llmctl command in a shell block of a page."""
    for page in PAGES:
        for block in re.findall(r"```(?:sh|console|bash)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                lexer = shlex.shlex(line, posix=True, punctuation_chars="|<>;()&")
                lexer.whitespace_split = True
                words = [*lexer, ";"]
                while "llmctl" in words:
                    words = words[words.index("llmctl") + 1 :]
                    end = next(i for i, word in enumerate(words) if set(word) <= set("|<>;()&"))
                    yield page.name, words[:end]


EXAMPLES = list(examples())


def test_there_are_examples_of_every_command() -> None:
    text = {" ".join(arguments) for _, arguments in EXAMPLES}
    assert [command for command in COMMANDS if not any(line.startswith(command) for line in text)] == []


@pytest.mark.parametrize(("page", "arguments"), EXAMPLES, ids=lambda value: value if isinstance(value, str) else " ".join(value))
def test_the_examples_have_right_flags_and_settings(
    page: str, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text("")
    options = [] if {"--help", "--version"} & set(arguments) else ["--print-config"]
    assert app(args=[*arguments, *options], prog_name="llmctl", standalone_mode=False) in (None, 0)


def python_blocks(page: str) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.DOTALL))


def test_the_snippet_that_reads_a_shard_reads_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.txt").write_text("the cat sat on the mat\n" * 200)
    monkeypatch.chdir(tmp_path)
    for line in ("train text.txt --vocab-size 300 -o tok -q", "pack text.txt --tokenizer tok -o shards --val-fraction 0 --workers 1 -q"):
        app(args=["tokenize", *line.split()], prog_name="llmctl", standalone_mode=False)
    space: dict[str, object] = {}
    exec(python_blocks("formats.md"), space)
    from llmctl.core.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(tmp_path / "tok")
    ids = [int(i) for i in space["ids"]]  # type: ignore[attr-defined]
    assert ids == [*tokenizer.encode("the cat sat on the mat\n" * 200), tokenizer.eos_id]


def test_the_generator_is_fine_with_a_check_and_refuses_other_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert generator.main(["--check"]) == 0
    assert generator.main(["--chekc"]) == 2
    assert "usage" in capsys.readouterr().err
