"""`llmctl tokenize inspect`: a text token by token, fertility, unused vocabulary, several tokenizers side by side."""

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import typer

from llmctl.cli.command import Command
from llmctl.cli.options import add_command
from llmctl.cli.shell import Shell
from llmctl.cli.streams import out
from llmctl.core.config.tokenize import InspectConfig
from llmctl.core.errors import InputError

if TYPE_CHECKING:
    from llmctl.core.data.inspect import Fertility, Inspection

INSPECT_HELP = """Look at what a tokenizer makes of a text, or at several side by side.

Shows the beginning of the text token by token, how many tokens a word, characters and bytes a token it takes for each input
and each script, and which ids the text never gave."""
_COLOURS = (24, 52, 22, 54, 58)
"""Dark backgrounds of the 256-colour palette, on which white text can be read."""
_NUM_SCRIPTS, _NUM_UNUSED = 12, 12


def register(app: typer.Typer) -> None:
    """Add the command to `llmctl tokenize`."""
    add_command(app, Command("tokenize inspect", InspectConfig, inspect, INSPECT_HELP))


def inspect(config: InspectConfig, shell: Shell) -> None:
    """Run `llmctl tokenize inspect`."""
    from llmctl.cli.tokenizer_reference import open_tokenizer
    from llmctl.core.data.inspect import Inspection
    from llmctl.core.data.records import RecordError
    from llmctl.core.data.sources import find_sources
    from llmctl.core.data.texts import read_texts

    sources = find_sources(config.inputs or ("-",), format=config.format)  # type: ignore[arg-type]
    inspections = [Inspection(name, open_tokenizer(name)) for name in config.tokenizer]
    stdin = None if sys.stdin is None else sys.stdin.buffer
    head, left = "", config.sample_bytes
    for piece in read_texts(sources, field=config.field, max_line_bytes=config.max_line_bytes, stdin=stdin):
        if isinstance(piece, RecordError):
            raise InputError(f"{sources[piece.source].name}: line {piece.line}: {piece.reason}")
        text = piece.data[:left].decode(errors="ignore")
        left -= len(piece.data)
        head += text[: max(0, config.show_chars - len(head))]
        for inspection in inspections:
            inspection.add(sources[piece.source].name, text)
        if left <= 0:
            shell.note(f"looked at the first {config.sample_bytes:,} bytes (--sample-bytes)")
            break
    if not inspections[0].total.characters:
        raise InputError("the input holds no text")
    if shell.json:
        out.line(json.dumps([_facts(inspection) for inspection in inspections], ensure_ascii=False))
        return
    for line in _report(inspections, head):
        out.line(line)


def _facts(inspection: "Inspection") -> dict[str, Any]:
    def numbers(row: "Fertility") -> dict[str, Any]:
        ratios = {name: getattr(row, name) for name in ("tokens_per_word", "characters_per_token", "bytes_per_token")}
        return {**vars(row), **{name: None if value is None else round(value, 4) for name, value in ratios.items()}}

    return {
        "tokenizer": inspection.name,
        "vocab_size": inspection.tokenizer.vocab_size,
        "used_ids": len(inspection.used),
        "unused_ids": len(inspection.unused_ids()),
        **numbers(inspection.total),
        "inputs": {name: numbers(row) for name, row in inspection.by_input.items()},
        "scripts": {name: numbers(row) for name, row in sorted(inspection.by_script.items())},
    }


def _report(inspections: Sequence["Inspection"], head: str) -> Iterator[str]:
    from llmctl.core.data.inspect import Fertility, largest_scripts, parts_of

    coloured = out.is_terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    for inspection in inspections:
        if head:
            yield f"{inspection.name}: {len(parts_of(inspection.tokenizer, head)):,} tokens"
            yield _painted(parts_of(inspection.tokenizer, head)) if coloured else _divided(parts_of(inspection.tokenizer, head))
            yield ""
    names = [inspection.name for inspection in inspections]
    inputs = list(inspections[0].by_input)
    rows = [("all", [inspection.total for inspection in inspections])]
    rows += [(name, [inspection.by_input[name] for inspection in inspections]) for name in inputs if len(inputs) > 1]
    for script in largest_scripts(inspections, _NUM_SCRIPTS):
        rows.append((script, [inspection.by_script.get(script, Fertility()) for inspection in inspections]))
    measures: tuple[tuple[str, Callable[[Fertility], float | None]], ...] = (
        ("tokens a word", lambda row: row.tokens_per_word),
        ("characters a token", lambda row: row.characters_per_token),
        ("bytes a token", lambda row: row.bytes_per_token),
    )
    for title, measure in measures:
        yield from _table(title, names, [(name, list(map(measure, values))) for name, values in rows])
        yield ""
    for inspection in inspections:
        unused = inspection.unused_ids()
        size = inspection.tokenizer.vocab_size
        yield f"{inspection.name}: {len(inspection.used):,} of {size:,} ids used, {len(unused):,} ({len(unused) / size:.1%}) never"
        texts = [inspection.tokenizer.token_text(i) for i in unused[:_NUM_UNUSED]]
        shown = [json.dumps(_visible(text if len(text) <= 20 else f"{text[:18]}…({len(text)})"), ensure_ascii=False) for text in texts]
        if shown:
            yield f"  the longest never used: {' '.join(shown)}"


def _painted(parts: Sequence[str]) -> str:
    """Each token on a background of its own; line breaks are shown and made."""
    painted = []
    for number, part in enumerate(parts):
        code = f"\x1b[97;48;5;{_COLOURS[number % len(_COLOURS)]}m"
        painted.append(code + _visible(part).replace("⏎", f"⏎\x1b[0m\n{code}") + "\x1b[0m")
    return "".join(painted)


def _divided(parts: Sequence[str]) -> str:
    return "|".join(_visible(part) for part in parts)


def _visible(part: str) -> str:
    """`part` without anything that would move the cursor."""
    named = {"\n": "⏎", "\t": "⇥", "\r": "␍"}
    return "".join(named.get(char, char if char.isprintable() else f"\\u{ord(char):04x}") for char in part)


def _table(title: str, names: Sequence[str], rows: Sequence[tuple[str, Sequence[float | None]]]) -> Iterator[str]:
    """A row a line, a tokenizer a column."""
    heads = [name if len(name) <= 24 else "…" + name[-23:] for name in names]
    cells = [(label, ["-" if value is None else f"{value:.2f}" for value in values]) for label, values in rows]
    widths = [max(len(head), *(len(row[place]) for _, row in cells)) for place, head in enumerate(heads)]
    first = max(len(title), *(len(label) for label, _ in cells))
    for label, row in [(title, heads), *cells]:
        yield "  ".join([label.ljust(first), *(cell.rjust(width) for cell, width in zip(row, widths, strict=True))])
