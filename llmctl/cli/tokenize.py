"""`llmctl tokenize`: train and count, and the registration of its other commands."""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from llmctl.cli import tokenize_filters, tokenize_inspect, tokenize_pack
from llmctl.cli.command import Command
from llmctl.cli.options import CONTEXT_SETTINGS, PlainGroup, add_command
from llmctl.cli.shell import Shell, stderr_line
from llmctl.cli.streams import out
from llmctl.core.config.tokenize import CountConfig, TrainConfig
from llmctl.core.errors import InputError, LlmctlError, NotFoundError, PartialFailure, UsageError
from llmctl.core.files import atomic_dir, check_out_dir

if TYPE_CHECKING:
    from llmctl.core.data.records import RecordError
    from llmctl.core.data.sources import Source
    from llmctl.core.data.texts import TextPiece
    from llmctl.core.tokenizer import CorpusRead, Tokenizer, TokenizerTrained

HELP = "Text to ids and back: train a tokenizer, encode, decode, count, and pack a corpus into token shards."
TRAIN_HELP = """Train a byte-level tokenizer on text, or extend one with --from.

It has all 256 bytes, so it loses nothing. transformers loads the folder as a PreTrainedTokenizerFast. The bytes per
token that are reported were measured on text that was kept from the training."""
COUNT_HELP = """Count tokens, bytes, characters and documents of text.

Reads what `pack` reads, and counts the tokens that it would write, without those that end documents."""

_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_BATCH_BYTES = 1 << 20


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    group = typer.Typer(
        name="tokenize", cls=PlainGroup, help=HELP, invoke_without_command=True, rich_markup_mode=None, context_settings=CONTEXT_SETTINGS
    )

    @group.callback()
    def _root(context: typer.Context) -> None:
        if context.invoked_subcommand is None:
            stderr_line(context.get_help())
            raise typer.Exit(2)

    add_command(group, Command("tokenize train", TrainConfig, train, TRAIN_HELP))
    tokenize_filters.register(group)
    add_command(group, Command("tokenize count", CountConfig, count, COUNT_HELP))
    tokenize_inspect.register(group)
    tokenize_pack.register(group)
    app.add_typer(group)


# train


def train(config: TrainConfig, shell: Shell) -> None:
    """Run `llmctl tokenize train`."""
    out_dir = Path(str(config.out_dir))
    check_out_dir(out_dir)
    there = [name for name in _FILES if (out_dir / name).exists()]
    if there and not config.overwrite:
        raise UsageError(f"--out-dir {out_dir}: holds {there[0]} already; choose another folder, or replace it with --overwrite")
    template = None if config.chat_template is None else _read_template(config.chat_template)
    if config.threads is not None:
        os.environ["RAYON_NUM_THREADS"] = str(config.threads)  # read when `tokenizers` first uses threads
    from llmctl.core.data.sources import find_sources
    from llmctl.core.tokenizer import TokenizerTrained

    sources = find_sources(config.inputs, format=config.format, exclude=out_dir)  # type: ignore[arg-type]
    corpus = _Corpus(sources, config, shell)
    events = _events(corpus.texts(), config, template)
    result: TokenizerTrained | None = None
    with shell.progress() as progress:
        task = progress.add_task("reading", total=corpus.total_bytes)
        for event in events:
            if isinstance(event, TokenizerTrained):
                result = event
            elif event.is_last:
                progress.update(task, description="training", total=None)
                shell.detail(f"read {event.num_bytes:,} bytes; learning from {event.sample_bytes:,} of them")
            else:
                progress.update(task, completed=corpus.file_bytes)
    assert result is not None
    _write(result.tokenizer, out_dir)
    _report_training(result, corpus, config, shell)
    corpus.fail_if_errors()


def _events(texts: Iterator[str], config: TrainConfig, template: str | None) -> "Iterator[CorpusRead | TokenizerTrained]":
    from llmctl.core.tokenizer import train_tokenizer

    given: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "special_tokens": config.special_token,
        "chat": config.chat,
        "chat_template": template,
        "sample_bytes": config.sample_bytes,
        "min_frequency": config.min_frequency,
        "seed": config.seed,
    }
    if config.from_model is None:
        return train_tokenizer(texts, model=config.kind, pattern=config.pattern, **given)
    from llmctl.cli.tokenizer_reference import open_tokenizer
    from llmctl.core.tokenizer.extend import extend_tokenizer

    return extend_tokenizer(open_tokenizer(config.from_model), texts, **given)


def _read_template(path: Path) -> str:
    from llmctl.cli.streams import decode_utf8
    from llmctl.core.tokenizer.template import ChatTemplate

    try:
        source = decode_utf8(path.read_bytes(), where=f"--chat-template {path}")
    except FileNotFoundError as error:
        raise NotFoundError(f"--chat-template {path}: no such file") from error
    except OSError as error:
        raise UsageError(f"--chat-template {path}: {error.strerror}") from error
    ChatTemplate(source)
    return source


def _write(tokenizer: "Tokenizer", out_dir: Path) -> None:
    if not out_dir.exists():
        with atomic_dir(out_dir) as temporary:
            tokenizer.save(temporary)
        return
    tokenizer.save(out_dir)
    if tokenizer.chat_template is None:
        (out_dir / "chat_template.jinja").unlink(missing_ok=True)  # of the tokenizer that was replaced


def _report_training(result: "TokenizerTrained", corpus: "_Corpus", config: TrainConfig, shell: Shell) -> None:
    facts = {
        "out_dir": str(config.out_dir),
        "vocab_size": result.vocab_size,
        "documents": corpus.num_documents,
        "bytes": result.num_bytes,
        "sample_bytes": result.sample_bytes,
        "heldout_bytes": result.heldout_bytes if result.is_heldout else 0,
        "heldout_tokens": result.heldout_tokens if result.is_heldout else 0,
        "bytes_per_token": round(result.bytes_per_token, 4),
        "fingerprint": result.tokenizer.fingerprint,
        "trainer": result.trainer,
        "dropped_words": result.num_dropped,
    }
    if result.bytes_per_token_before is not None:
        facts["bytes_per_token_before"] = round(result.bytes_per_token_before, 4)
    who = "the native library" if result.trainer == "native" else f"tokenizers; {result.trainer_reason or 'it counts whole words'}"
    shell.detail(f"learnt by {who}")
    if result.num_dropped:
        shell.note(
            f"the table of words was full: {result.num_dropped:,} times a word was forgotten that was among the rarest,"
            f" and no count is too low by more than {result.most_missed:,}"
        )
    if shell.json:
        out.line(json.dumps(facts, ensure_ascii=False))
    if result.vocab_size < config.vocab_size:
        shell.warn(
            f"the text gave {result.vocab_size:,} ids, not {config.vocab_size:,}: no more pairs occur {config.min_frequency} times;"
            " take more text, or lower --min-frequency"
        )
    sample = "" if result.sample_bytes == result.num_bytes else f", a sample of {result.num_bytes:,}"
    on = f"{result.heldout_bytes:,} held-out bytes" if result.is_heldout else "the training text, too little to hold any out"
    shell.note(f"{result.vocab_size:,} ids from {result.sample_bytes:,} bytes of text{sample}")
    before = "" if result.bytes_per_token_before is None else f" ({result.bytes_per_token_before:.3f} before)"
    shell.note(f"{result.bytes_per_token:.3f} bytes per token{before} on {on}")
    shell.note(f"the tokenizer is {config.out_dir}")


# count


@dataclass
class _Count:
    tokens: int = 0
    bytes: int = 0
    characters: int = 0
    documents: int = 0

    @property
    def bytes_per_token(self) -> float | None:
        return round(self.bytes / self.tokens, 4) if self.tokens else None

    def facts(self) -> dict[str, int | float | None]:
        return {
            "tokens": self.tokens,
            "bytes": self.bytes,
            "characters": self.characters,
            "documents": self.documents,
            "bytes_per_token": self.bytes_per_token,
        }


def count(config: CountConfig, shell: Shell) -> None:
    """Run `llmctl tokenize count`."""
    from llmctl.cli.tokenizer_reference import open_tokenizer
    from llmctl.core.data.cuts import may_cut
    from llmctl.core.data.sources import find_sources

    sources = find_sources(config.inputs or ("-",), format=config.format)  # type: ignore[arg-type]
    tokenizer = open_tokenizer(str(config.tokenizer))
    corpus = _Corpus(sources, config, shell, may_cut=may_cut(tokenizer.structure))
    counts = [_Count() for _ in sources]
    num_special = 0
    batch: list[tuple[_Count, str]] = []
    batch_bytes = 0

    def finish() -> None:
        encoded = tokenizer.encode_batch([text for _, text in batch], allow_special=config.allow_special, add_bos=False)
        for (row, _), ids in zip(batch, encoded, strict=True):
            row.tokens += len(ids)

    for piece in corpus.pieces():
        row, text = counts[piece.source], piece.data.decode()
        row.bytes += len(piece.data)
        row.characters += len(text)
        row.documents += piece.starts_document
        num_special += tokenizer.count_special(text)
        batch.append((row, text))
        batch_bytes += len(piece.data)
        if batch_bytes >= _BATCH_BYTES:
            finish()
            batch, batch_bytes = [], 0
    finish()
    total = _Count(*(sum(getattr(row, name) for row in counts) for name in ("tokens", "bytes", "characters", "documents")))
    rows = [(source.name, row) for source, row in zip(sources, counts, strict=True)]
    if shell.json:
        inputs = [{"input": name, **row.facts()} for name, row in rows]
        out.line(json.dumps({**total.facts(), "inputs": inputs}, ensure_ascii=False))
    else:
        out.write("".join(f"{line}\n" for line in _table([*rows, ("total", total)] if len(rows) > 1 else rows)))
    if num_special and not config.allow_special:
        shell.note(f"names of special tokens in the text: {num_special:,} counted as plain text; --allow-special makes them special tokens")
    corpus.fail_if_errors()


def _table(rows: list[tuple[str, _Count]]) -> Iterator[str]:
    heads = ("tokens", "bytes", "characters", "documents", "bytes/token")
    cells = [
        [str(row.tokens), str(row.bytes), str(row.characters), str(row.documents), f"{row.bytes_per_token:.3f}" if row.tokens else "-"]
        for _, row in rows
    ]
    widths = [max(len(head), *(len(line[place]) for line in cells)) for place, head in enumerate(heads)]
    for line, name in zip([list(heads), *cells], ["input", *(name for name, _ in rows)], strict=True):
        yield "  ".join([*(cell.rjust(width) for cell, width in zip(line, widths, strict=True)), " ".join(name.split("\n"))])


# both


class _Corpus:
    """The text of the sources, with the policy for what cannot be read."""

    def __init__(self, sources: list["Source"], config: TrainConfig | CountConfig, shell: Shell, *, may_cut: bool = True) -> None:
        self._sources, self._config, self._shell, self._may_cut = sources, config, shell, may_cut
        self.num_documents = self.num_errors = self.file_bytes = 0
        known = [source.num_bytes for source in sources]
        self.total_bytes = None if None in known else sum(size for size in known if size is not None)

    def texts(self) -> Iterator[str]:
        """The text of each piece."""
        return (piece.data.decode() for piece in self.pieces())

    def pieces(self) -> Iterator["TextPiece"]:
        """What can be read. Raises InputError at what cannot, unless it is to be skipped."""
        from llmctl.core.data.records import RecordError
        from llmctl.core.data.texts import read_texts

        stdin = None if sys.stdin is None else sys.stdin.buffer
        before, source = 0, 0  # bytes of the files that are done
        config = self._config
        for piece in read_texts(
            self._sources, field=config.field, max_line_bytes=config.max_line_bytes, may_cut=self._may_cut, stdin=stdin
        ):
            if isinstance(piece, RecordError):
                self._fail(piece)
                continue
            if piece.source != source:
                before, source = sum(s.num_bytes or 0 for s in self._sources[: piece.source]), piece.source
            self.file_bytes = before + piece.file_bytes
            self.num_documents += piece.starts_document
            yield piece

    def _fail(self, error: "RecordError") -> None:
        self.num_errors += 1
        where = f"line {error.line}"
        reason = error.reason if error.reason.startswith(where) else f"{where}: {error.reason}"
        text = f"{self._sources[error.source].name}: {reason}"
        if self._config.on_error == "stop":
            raise InputError(f"{text}; mend it, or leave it out with --on-error skip")
        self._shell.warn(f"{text}; left out")

    def fail_if_errors(self) -> None:
        """Raises PartialFailure when something was left out, LlmctlError when that was all."""
        if self.num_errors and not self.num_documents:
            raise LlmctlError(f"not one of {self.num_errors:,} records could be read; the reasons are above")
        if self.num_errors:
            raise PartialFailure(f"{self.num_errors:,} records were left out; the reasons are above")
