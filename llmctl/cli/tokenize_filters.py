"""`llmctl tokenize encode` and `decode`: filters, one line in, one line out."""

import json
from typing import TYPE_CHECKING

import typer

from llmctl.cli.command import Command
from llmctl.cli.lines import BadLine, Line, filter_lines, line_batches
from llmctl.cli.options import add_command
from llmctl.cli.shell import Shell
from llmctl.core.config.tokenize import DecodeConfig, EncodeConfig

if TYPE_CHECKING:
    from llmctl.core.tokenizer import Tokenizer

ENCODE_HELP = """Turn text into ids: one line in, one line out, as it comes.

The ids of a line are separated by spaces, or a JSON list with --json. A line ends at \\n; the newline is not encoded. A
last line without a newline comes out without one, so `encode | decode` gives every file back byte for byte, if the
tokenizer has all bytes, but for a byte-order mark at its start, which is dropped."""
DECODE_HELP = """Turn ids into text: one line in, one line out, as it comes.

A line holds ids separated by spaces, or a JSON list of them. With --json each text comes out as a JSON string."""


def register(app: typer.Typer) -> None:
    """Add the commands to `llmctl tokenize`."""
    add_command(app, Command("tokenize encode", EncodeConfig, encode, ENCODE_HELP))
    add_command(app, Command("tokenize decode", DecodeConfig, decode, DECODE_HELP))


def encode(config: EncodeConfig, shell: Shell) -> None:
    """Run `llmctl tokenize encode`."""
    from llmctl.cli.tokenizer_reference import open_tokenizer

    batches = line_batches(config.files, shell, max_line_bytes=config.max_line_bytes)
    tokenizer = open_tokenizer(str(config.tokenizer))
    tally = _Tally(tokenizer)

    def convert(texts: list[str]) -> list[str]:
        rows = tokenizer.encode_batch(texts, allow_special=config.allow_special, add_bos=config.add_bos)
        for text, ids in zip(texts, rows, strict=True):
            tally.look_at(text, ids[1:] if config.add_bos else ids)
        if shell.json:
            return [json.dumps(ids, separators=(",", ":")) for ids in rows]
        return [" ".join(map(str, ids)) for ids in rows]

    try:
        filter_lines(batches, _utf8, convert, shell, skip_errors=config.on_error == "skip")
    finally:
        tally.report(shell, allow_special=config.allow_special)


def decode(config: DecodeConfig, shell: Shell) -> None:
    """Run `llmctl tokenize decode`."""
    from llmctl.cli.tokenizer_reference import open_tokenizer

    batches = line_batches(config.files, shell, max_line_bytes=config.max_line_bytes)
    tokenizer = open_tokenizer(str(config.tokenizer))

    def convert(rows: list[list[int]]) -> list[str]:
        texts = [tokenizer.decode(ids, skip_special=config.skip_special) for ids in rows]
        return [json.dumps(text, ensure_ascii=False) for text in texts] if shell.json else texts

    filter_lines(batches, lambda line: _ids(line, tokenizer), convert, shell, skip_errors=config.on_error == "skip")


def _utf8(line: Line) -> str:
    try:
        return line.data.decode("utf-8")
    except UnicodeDecodeError as error:
        place = line.offset + error.start
        raise BadLine(f"not valid UTF-8 at byte {error.start} of the line (byte offset {place} of the file)") from error


def _ids(line: Line, tokenizer: "Tokenizer") -> list[int]:
    try:
        text = line.data.decode("ascii").strip()
        words = json.loads(text) if text.startswith("[") else text.split()
        if not isinstance(words, list) or any(isinstance(word, bool | float) or not isinstance(word, str | int) for word in words):
            raise ValueError
        ids = [int(word) for word in words]
    except (ValueError, RecursionError) as error:
        start = line.data[:40].decode("utf-8", "backslashreplace")
        raise BadLine(f"ids separated by spaces, or a JSON list of them, are wanted; {start!r} was found") from error
    for token_id in ids:
        if not tokenizer.is_known(token_id):
            raise BadLine(f"{token_id} is no id of this tokenizer; they go from 0 to {tokenizer.vocab_size - 1}")
    return ids


class _Tally:
    """What is worth saying about a text once it is encoded: names of special tokens, and what will not come back."""

    def __init__(self, tokenizer: "Tokenizer") -> None:
        self._tokenizer = tokenizer
        self.num_special = 0
        self.num_lost = 0
        self.num_changed = 0

    def look_at(self, text: str, ids: list[int]) -> None:
        """Count in `text` and the ids that it became."""
        self.num_special += self._tokenizer.count_special(text)
        if self._tokenizer.is_lossless:
            return
        num_lost = self._tokenizer.count_lost(text)
        self.num_lost += num_lost
        self.num_changed += not num_lost and self._tokenizer.decode(ids) != text

    def report(self, shell: Shell, *, allow_special: bool) -> None:
        """Say it, on stderr."""
        if self.num_special:
            became = "became special tokens" if allow_special else "were encoded as plain text; --allow-special makes them special tokens"
            shell.note(f"names of special tokens in the text: {self.num_special:,} {became}")
        if self.num_lost:
            shell.warn(f"{self.num_lost:,} characters were lost: this tokenizer has no ids for them")
        if self.num_changed:
            shell.warn(
                f"{self.num_changed:,} lines will not come back as they were: this tokenizer rewrites text (case, spaces, forms of letters)"
            )
