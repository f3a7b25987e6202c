"""Writes static completion scripts for bash, zsh and fish out of the command tree. Knows Typer's tree and the configs.

Typer's own completion starts Python at every press of TAB. These scripts hold everything, start nothing, and are kept in
the repository: `python -m llmctl.cli.completions DIR` writes llmctl.bash, _llmctl and llmctl.fish into DIR.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from llmctl.cli.options import REGISTERED
from llmctl.core.config.fields import info_of, options_of, types_of
from llmctl.core.errors import UsageError
from llmctl.core.files import write_text

_PROGRAM = "llmctl"
_NOTICE = "Generated from the command tree by `make completions`; do not edit."

_FILE_LABELS = {"FILE", "INPUT", "REF"}
"""Metavars of text fields that may name a file, among other things (a glob, a hub id)."""


@dataclass(frozen=True)
class Value:
    """What may stand after a flag or as an argument: one of `choices`, or a "file", a "dir", or "any" text."""

    kind: str
    label: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Flag:
    """A flag with all its names. `value` is None for a switch; `repeatable` says that it may be given again."""

    names: tuple[str, ...]
    help: str
    value: Value | None
    repeatable: bool


@dataclass(frozen=True)
class Node:
    """A command. `path` is "" for the program itself, then "generate" or "tokenize pack"."""

    path: str
    help: str
    flags: tuple[Flag, ...]
    argument: Value | None
    children: tuple["Node", ...]

    def walk(self) -> list["Node"]:
        """This node and all below it."""
        return [self, *(node for child in self.children for node in child.walk())]


def command_tree() -> Node:
    """The commands as they are registered now."""
    from llmctl.cli.app import app

    return _node(typer.main.get_command(app), "")


def _node(command: Any, path: str) -> Node:
    """`command` is a Click command; Typer brings its own Click from version 0.29 on, so only its attributes are used."""
    flags: list[Flag] = []
    argument = None
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            argument = _value(parameter, path)
            continue
        switch = bool(parameter.is_flag)
        value = None if switch else _value(parameter, path)
        flags.append(Flag(tuple(dict.fromkeys(parameter.opts)), _short(parameter.help), value, bool(parameter.multiple)))
        if parameter.secondary_opts:
            flags.append(Flag(tuple(parameter.secondary_opts), f"The opposite of {parameter.opts[0]}", None, False))
    flags.append(Flag(("-h", "--help"), "Show this message and exit", None, False))
    children = tuple(_node(child, f"{path} {name}".strip()) for name, child in getattr(command, "commands", {}).items())
    return Node(path, _short(command.help), tuple(flags), argument, children)


def _value(parameter: Any, path: str) -> Value:
    label = re.sub(r"[^A-Za-z0-9_]+", " ", parameter.metavar or "").strip() or parameter.name.upper()
    registered = REGISTERED.get(path)
    fields = {field.name: field for field in options_of(registered.config)} if registered is not None else {}
    if registered is None or parameter.name not in fields:
        return Value("file" if label in _FILE_LABELS else "any", label)
    info, kind = info_of(fields[parameter.name]), types_of(registered.config)[parameter.name].kind
    if info.choices is not None:
        return Value("choice", parameter.name, info.choices)
    if kind is Path:
        return Value("dir" if "DIR" in label.split() or label.endswith("_DIR") else "file", label)
    return Value("file" if parameter.name == "model" or label in _FILE_LABELS else "any", label)


def _short(help: str | None) -> str:
    """The first sentence of a help text, without its end and without the default."""
    text = " ".join((help or "").split())
    return re.split(r"\.\s|\.$|\s\[default", text, maxsplit=1)[0]


# bash


def bash_script(root: Node) -> str:
    """The script for bash 3.2 and newer."""
    cases = "\n".join(_bash_case(node) for node in root.walk())
    groups = "|".join(f"'{node.path}'" for node in root.walk() if node.children)
    return f"""# bash completion of {_PROGRAM}. {_NOTICE}
# Use: source this file, or copy it to ~/.local/share/bash-completion/completions/{_PROGRAM}

_{_PROGRAM}_names() {{
    local IFS=$'\\n'
    COMPREPLY=( $(compgen "$1" -- "$cur") )
    compopt -o filenames 2>/dev/null
}}

_{_PROGRAM}() {{
    local cur=${{COMP_WORDS[COMP_CWORD]}} prev=${{COMP_WORDS[COMP_CWORD-1]}} path='' only_arguments='' i word
    COMPREPLY=()
    # "=" is a word of its own: --flag=value comes as three.
    if [[ $cur == '=' ]]; then
        cur=''
    elif [[ $prev == '=' ]]; then
        prev=${{COMP_WORDS[COMP_CWORD-2]}}
    fi
    for (( i = 1; i < COMP_CWORD; i++ )); do
        word=${{COMP_WORDS[i]}}
        if [[ $word == '--' ]]; then
            only_arguments=1
            prev=''
            break
        fi
        case $path in
            {groups})
                [[ $word == -* ]] || path="${{path:+$path }}$word"
                ;;
        esac
    done
    local words='' values='' argument=''
    case $path in
{cases}
        *) return ;;
    esac
    if [[ -z $only_arguments && $values == 'file' ]]; then
        _{_PROGRAM}_names -f
    elif [[ -z $only_arguments && $values == 'dir' ]]; then
        _{_PROGRAM}_names -d
    elif [[ -z $only_arguments && $values == 'any' ]]; then
        return
    elif [[ -z $only_arguments && -n $values ]]; then
        COMPREPLY=( $(compgen -W "$values" -- "$cur") )
    elif [[ -z $only_arguments && ( $cur == -* || -z $argument ) ]]; then
        COMPREPLY=( $(compgen -W "$words" -- "$cur") )
    elif [[ $argument == 'file' ]]; then
        _{_PROGRAM}_names -f
    elif [[ $argument == 'dir' ]]; then
        _{_PROGRAM}_names -d
    fi
}}

complete -F _{_PROGRAM} {_PROGRAM}
"""


def _bash_case(node: Node) -> str:
    words = [child.path.split()[-1] for child in node.children] + [name for flag in node.flags for name in flag.names]
    by_value: dict[str, list[str]] = {}
    for flag in node.flags:
        if flag.value is not None:
            by_value.setdefault(" ".join(flag.value.choices) or flag.value.kind, []).extend(flag.names)
    lines = [f"        '{node.path}')", f"            words='{' '.join(words)}'"]
    if node.argument is not None:
        lines.append(f"            argument='{node.argument.kind}'")
    if by_value:
        lines.append("            case $prev in")
        lines += [f"                {'|'.join(names)}) values='{values}' ;;" for values, names in by_value.items()]
        lines.append("            esac")
    return "\n".join([*lines, "            ;;"])


# zsh


def zsh_script(root: Node) -> str:
    """The script for zsh, to be found through fpath or sourced."""
    functions = "\n".join(_zsh_function(node) for node in root.walk())
    return f"""#compdef {_PROGRAM}
# zsh completion of {_PROGRAM}. {_NOTICE}
# Use: put the folder of this file into fpath before compinit runs.

{functions}
if [[ "$funcstack[1]" == "_{_PROGRAM}" ]]; then
    _{_PROGRAM} "$@"
else
    compdef _{_PROGRAM} {_PROGRAM}
fi
"""


def _zsh_name(node: Node) -> str:
    return "_".join(["", _PROGRAM, *node.path.split()])


def _zsh_function(node: Node) -> str:
    specs = [_zsh_flag(flag) for flag in node.flags]
    if node.children:
        commands = "\n".join(
            f"        {_zsh_quote(child.path.split()[-1] + ':' + child.help.replace(':', chr(92) + ':'))}" for child in node.children
        )
        cases = "\n".join(f"                {child.path.split()[-1]}) {_zsh_name(child)} ;;" for child in node.children)
        lines = " \\\n        ".join([*specs, "'1: :->command'", "'*:: :->rest'"])
        return f"""{_zsh_name(node)}() {{
    local curcontext="$curcontext" state line
    typeset -A opt_args
    local -a commands
    commands=(
{commands}
    )
    _arguments -C -s -S : \\
        {lines} && return
    case $state in
        command) _describe -t commands '{_PROGRAM} command' commands ;;
        rest)
            case $line[1] in
{cases}
            esac
            ;;
    esac
}}
"""
    if node.argument is not None:
        # A bare message here would keep zsh from inserting a flag; the guard shows it only where no flag is begun.
        action = f'_guard "^-*" {node.argument.label}' if node.argument.kind == "any" else _zsh_action(node.argument)
        specs.append(_zsh_quote(f"*:{node.argument.label}:{action}"))
    lines = " \\\n        ".join(specs)
    return f"{_zsh_name(node)}() {{\n    _arguments -s -S : \\\n        {lines}\n}}\n"


def _zsh_quote(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def _zsh_action(value: Value) -> str:
    if value.choices:
        return f"({' '.join(value.choices)})"
    return {"file": "_files", "dir": "_files -/", "any": " "}[value.kind]


def _zsh_flag(flag: Flag) -> str:
    help = re.sub(r"([\[\]\\])", r"\\\1", flag.help).replace(":", "\\:")
    rest = _zsh_quote(f"[{help}]" + (f":{flag.value.label}:{_zsh_action(flag.value)}" if flag.value is not None else ""))
    # A flag with a value takes it as --name=value or --name value, and as -nvalue or -n value.
    names = [name + ("" if flag.value is None else "=" if name.startswith("--") else "+") for name in flag.names]
    before = "'*'" if flag.repeatable else f"'({' '.join(flag.names)})'"
    return before + ("{" + ",".join(names) + "}" if len(names) > 1 else names[0]) + rest


# fish


def fish_script(root: Node) -> str:
    """The script for fish 3 and newer."""
    groups = " ".join(f"'{node.path}'" for node in root.walk() if node.children)
    lines = [line for node in root.walk() for line in _fish_lines(node)]
    return f"""# fish completion of {_PROGRAM}. {_NOTICE}
# Use: copy it to ~/.config/fish/completions/{_PROGRAM}.fish

function __{_PROGRAM}_at --description 'Whether the words so far name exactly this command'
    set -l path ''
    set -l words (commandline -opc)
    for word in $words[2..-1]
        if not contains -- "$path" {groups}
            break
        end
        if not string match -q -- '-*' $word
            set path (string trim -- "$path $word")
        end
    end
    test "$path" = "$argv[1]"
end

{chr(10).join(lines)}
"""


def _fish_quote(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _fish_lines(node: Node) -> list[str]:
    here = f"complete -c {_PROGRAM} -n {_fish_quote(f'__{_PROGRAM}_at {_fish_quote(node.path)}')}"
    files = node.argument is not None and node.argument.kind in ("file", "dir")
    lines = [f"{here} {'-F' if files else '-f'}"]
    lines += [f"{here} -a {child.path.split()[-1]} -d {_fish_quote(child.help)}" for child in node.children]
    for flag in node.flags:
        names = [f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in flag.names]
        lines.append(" ".join([here, *names, *_fish_value(flag.value), "-d", _fish_quote(flag.help)]))
    return lines


def _fish_value(value: Value | None) -> list[str]:
    if value is None:
        return []
    if value.choices:
        return ["-x", "-a", _fish_quote(" ".join(value.choices))]
    return {"file": ["-r", "-F"], "dir": ["-x", "-a", "'(__fish_complete_directories)'"], "any": ["-x"]}[value.kind]


def scripts() -> dict[str, str]:
    """File name -> content of every script."""
    root = command_tree()
    return {f"{_PROGRAM}.bash": bash_script(root), f"_{_PROGRAM}": zsh_script(root), f"{_PROGRAM}.fish": fish_script(root)}


def main(arguments: list[str]) -> None:
    """Write the scripts into the folder that the one argument names."""
    if len(arguments) != 1:
        raise UsageError("usage: python -m llmctl.cli.completions DIR")
    folder = Path(arguments[0])
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in scripts().items():
        write_text(folder / name, content)


if __name__ == "__main__":
    main(sys.argv[1:])
