"""The plain reading of a command line against Typer's, which is the reference: the same, or left to Typer."""

import importlib
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.cli import options
from llmctl.cli.app import app
from llmctl.cli.command import COMMANDS, COMMON, Command, Given, call_if_plain, declarations, read_plain
from llmctl.core.config.fields import info_of, options_of, types_of

LEAVES = [name for name in COMMANDS if hasattr(importlib.import_module(f"llmctl.cli.{name}"), "COMMAND")]


def command_of(name: str) -> Command:
    """The command `name`."""
    found = importlib.import_module(f"llmctl.cli.{name}").COMMAND
    assert isinstance(found, Command)
    return found


def by_typer(name: str, words: list[str]) -> Given:
    """What Typer makes of the words. Raises what Typer raises."""
    seen: list[Given] = []
    with patch.object(options, "call", lambda _, given: seen.append(given)):
        app(args=[name, *words], prog_name="llmctl", standalone_mode=False)
    (found,) = seen
    return found


def as_pair(found: Given) -> tuple[dict[str, Any], dict[str, Any]]:
    """Its two parts, switches that were not given as False, and lists as such."""
    common = {"config": None, **dict.fromkeys([name for name in COMMON if name != "config"], False), **found.common}
    return {name: [*value] if isinstance(value, tuple) else value for name, value in found.fields.items()}, common


def flags_of(name: str) -> list[str]:
    """Every name of every flag of a command."""
    command = command_of(name)
    kinds = types_of(command.config)
    fields = [field for field in options_of(command.config) if not info_of(field).positional]
    declared = [text for field in fields for text in declarations(field, is_switch=kinds[field.name].kind is bool)]
    return [part for text in declared for part in text.split("/")] + [flag for flags in COMMON.values() for flag in flags]


VALUES = st.sampled_from(
    ["1", "0.5", "x", "", "a b", "-", "--", "-1", "-n", "-n1", "-qv", "--help", "--no-such", "--raw=1", "é", "a=b", "=", "-x"]
)


@pytest.mark.parametrize("name", LEAVES)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_what_is_read_plainly_is_what_typer_reads(name: str, data: st.DataObject) -> None:
    flag = st.sampled_from(flags_of(name))
    piece = st.one_of(
        flag.map(lambda text: [text]),
        VALUES.map(lambda text: [text]),
        st.tuples(flag, VALUES).map(lambda pair: [*pair]),
        st.tuples(flag, VALUES).map(lambda pair: [f"{pair[0]}={pair[1]}"]),
    )
    words = [word for part in data.draw(st.lists(piece, max_size=4)) for word in part]
    found = read_plain(words, command_of(name))
    if found is not None:
        assert as_pair(found) == as_pair(by_typer(name, words))


@pytest.mark.parametrize(
    "line",
    [
        ["generate", "-m", "folder", "-n", "1", "--raw", "Hello"],
        ["generate", "--stop", "a", "--stop=b", "--temperature=0", "--", "-x"],
        ["generate", "-q", "--json", "--config", "run.toml", "-"],
        ["generate"],
        ["pretrain", "--data", "a", "--data", "b", "--no-async-save", "-v"],
        ["eval", "-m", "folder", "--tasks", "hellaswag"],
    ],
    ids=" ".join,
)
def test_lines_as_people_write_them_are_read_plainly(line: list[str]) -> None:
    name, *words = line
    found = read_plain(words, command_of(name))
    assert found is not None
    assert as_pair(found) == as_pair(by_typer(name, words))


@pytest.mark.parametrize(
    "line",
    [
        *([], ["--help"], ["--version"], ["no-such-command"], ["tokenize", "count", "x"], ["generate", "--help"], ["generate", "-h", "x"]),
        *(["generate", "--max-new"], ["generate", "-n"], ["generate", "x", "y"], ["generate", "--raw=yes", "x"], ["generate", "-n1", "x"]),
    ],
    ids=" ".join,
)
def test_help_mistakes_and_other_manners_are_left_to_typer(line: list[str]) -> None:
    with patch("llmctl.cli.command.call", side_effect=AssertionError):
        assert not call_if_plain(line)
