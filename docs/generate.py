"""Writes the generated parts of the pages in this folder: a table of flags for each command, between two markers.

    python docs/generate.py            # write them anew (`make docs`)
    python docs/generate.py --check    # exit 1 if one is out of date

The tables come from the config dataclasses, as the flags themselves do. A page says where a table goes:

    <!-- flags: tokenize pack -->
    <!-- /flags -->
"""

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

import typer

from llmctl.cli.app import app
from llmctl.cli.options import REGISTERED
from llmctl.core.config.fields import flag_of, info_of, options_of, types_of

FOLDER = Path(__file__).parent
COMMON = "every command"
MARKED = re.compile(r"(<!-- flags: (?P<command>[a-z ]+) -->\n).*?(<!-- /flags -->)", re.DOTALL)
DEFAULT = re.compile(r"\s*\[default: (.*)\]$", re.DOTALL)


def flags_table(command: str) -> str:
    """The table of a command's flags, or of those that every command has."""
    rows = common_rows() if command == COMMON else command_rows(command)
    lines: list[str] = []
    panel = None
    for group, names, meaning, default in rows:
        if group != panel or not lines:
            lines += ["", f"**{group}**", ""] if len({row[0] for row in rows}) > 1 else [""]
            lines += ["| flag | meaning | default |", "|---|---|---|"]
            panel = group
        lines.append(f"| {names} | {meaning} | {default} |")
    return "\n".join([*lines, "", ""])


def command_rows(command: str) -> list[tuple[str, str, str, str]]:
    """(panel, names, meaning, default) of each flag, grouped by panel, arguments first."""
    options = {parameter.name: parameter for parameter in click_command(command).params}
    config = REGISTERED[command].config  # once the command was asked for, it is declared
    rows = []
    for field in options_of(config):
        info, kind = info_of(field), types_of(config)[field.name]
        found = DEFAULT.search(info.help)
        meaning = DEFAULT.sub("", info.help)
        default = found[1] if found else shown(field)
        if info.positional:
            rows.append(("Arguments", code(flag_of(field)), escaped(meaning), escaped(default)))
            continue
        option = options[field.name]
        names = ", ".join(code(name) for name in [*dict.fromkeys(option.opts), *option.secondary_opts])
        if kind.kind is not bool and info.choices is None and option.metavar:
            names += f" {escaped(option.metavar)}"
        if info.choices is not None:
            meaning += " One of " + ", ".join(code(choice) for choice in info.choices) + "."
        rows.append((info.panel or "Options", names, escaped(meaning), escaped(default)))
    order = list(dict.fromkeys(row[0] for row in rows))
    return sorted(rows, key=lambda row: (row[0] != "Arguments", order.index(row[0])))


def common_rows() -> list[tuple[str, str, str, str]]:
    """The rows of the flags that are the same for every command."""
    rows = []
    for parameter in click_command("generate").params:
        if parameter.name.startswith("common_"):
            names = ", ".join(code(name) for name in parameter.opts) + (f" {parameter.metavar}" if parameter.metavar else "")
            rows.append((COMMON, names, escaped(parameter.help.replace("LLMCTL_GENERATE_*", "`LLMCTL_<COMMAND>_<FIELD>`")), ""))
    return rows


def click_command(command: str) -> Any:
    """The command in Typer's tree."""
    found: Any = typer.main.get_command(app)
    for name in command.split():
        found = found.commands[name]
    return found


def shown(field: "dataclasses.Field[Any]") -> str:
    """The default of a field for people."""
    value = field.default
    if value is None or value is dataclasses.MISSING or value in ((), ""):
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)


def code(text: str) -> str:
    """`text` in backticks."""
    return f"`{text}`"


def escaped(text: str) -> str:
    """`text` so that a Markdown table holds it: no line breaks, no bars, no tags."""
    text = " ".join(text.split()).replace("|", "\\|")
    return re.sub(r"(`[^`]*`)|(<[^\s>]+>)", lambda found: found[1] or code(found[2]), text)


def fresh(page: Path) -> str:
    """What the page should be. Raises KeyError for a command that is not there."""
    text = page.read_text(encoding="utf-8")
    return MARKED.sub(lambda found: found[1] + flags_table(found["command"]) + found[3], text)


def main(arguments: list[str]) -> int:
    """Write every page, or with --check say which are out of date."""
    stale = [page for page in sorted(FOLDER.glob("*.md")) if fresh(page) != page.read_text(encoding="utf-8")]
    if arguments == ["--check"]:
        for page in stale:
            print(f"{page.name} is out of date; run `make docs`")
        return 1 if stale else 0
    if arguments:
        print("usage: python docs/generate.py [--check]", file=sys.stderr)
        return 2
    for page in stale:
        page.write_text(fresh(page), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
