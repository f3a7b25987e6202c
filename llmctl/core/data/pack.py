"""Text files to token shards: reads, has encoded, writes, and goes on after any kill. Knows no tokenizer's inside and no training.

How it resumes: pieces of the input are numbered, and each finished shard is noted in pack-state.json with the piece and
the id where it ended. Text is read and hashed from the start again (fast), but encoded (slow) only from there on, for
each split by itself. So no half-written shard has to survive, and the bytes are those of an unbroken run.
"""

import contextlib
import dataclasses
import hashlib
import os
import select
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from llmctl import __version__
from llmctl.core.config.pack import PackConfig
from llmctl.core.data.documents import PIECE_BYTES, Piece, ReadRules, SplitRule, read_pieces
from llmctl.core.data.encode import EncodedPiece, EncodeRules, PieceEncoder, RecordError
from llmctl.core.data.packfolder import PackFolder, ShardPlace
from llmctl.core.data.shards import TOKENIZER_DIR, ShardWriter, id_dtype
from llmctl.core.data.sources import STDIN, Format, Source, find_sources
from llmctl.core.data.worker import Encoders, InlineEncoders, PieceBatch, WorkerPool
from llmctl.core.errors import InputError, Interrupted, LlmctlError, UsageError, WriteError
from llmctl.core.files import check_out_dir

if TYPE_CHECKING:
    from llmctl.core.tokenizer import Tokenizer

_BATCH_PIECES = 4096
_BYTES_FOR_A_WORKER = 2 << 20
"""Below this much text a process costs more than it brings (it starts in 0.3 s, and encodes some 2 MB/s)."""
_DEFAULT_FRACTION = {"hash": 0.01, "tail": 0.1}


def never_stop() -> int | None:
    """The answer of somebody who lets it run: no signal came."""
    return None


@dataclass(frozen=True)
class PackPlanned:
    """Before the first byte is read. `num_bytes` of the input's files, None when stdin is among them."""

    num_sources: int
    num_bytes: int | None
    num_workers: int
    split_kind: str
    val_fraction: float
    dtype: str
    vocab_size: int
    num_shards_kept: int
    """Shards that an interrupted run had finished."""


@dataclass(frozen=True)
class PackProgress:
    """After each batch. Counts of documents and ids are of this corpus so far, resumed parts included."""

    num_bytes_done: int
    num_bytes: int | None
    num_documents: int
    num_tokens: int


@dataclass(frozen=True)
class ShardWritten:
    """A shard is on the disk for good."""

    name: str
    num_tokens: int
    num_bytes: int


@dataclass(frozen=True)
class PackWarned:
    """Something that a person should know; packing goes on."""

    message: str


@dataclass(frozen=True)
class SplitSummary:
    """One split. `num_bytes` of text."""

    num_documents: int
    num_tokens: int
    num_bytes: int
    num_shards: int


@dataclass(frozen=True)
class Packed:
    """The folder is complete. `num_special_names` counts names of special tokens found in the text."""

    directory: str
    train: SplitSummary
    val: SplitSummary | None
    num_errors: int
    errors_file: str | None
    num_special_names: int
    already_complete: bool = False


PackEvent = PackPlanned | PackProgress | ShardWritten | PackWarned | Packed


def pack(
    config: PackConfig,
    *,
    tokenizer: "Tokenizer | None" = None,
    stdin: IO[bytes] | None = None,
    stop: Callable[[], int | None] = never_stop,
) -> Iterator[PackEvent]:
    """Pack a corpus, as events that end with Packed.

    `tokenizer` None loads `config.tokenizer`, a folder or a tokenizer.json; `stdin` is read for the input `-`. `stop` is
    asked between batches; a signal's number makes it end with Interrupted, the finished shards kept. The same call again
    goes on. The bytes of the result depend on the input and the settings, not on workers or interruptions.

    Raises UsageError, NotFoundError, InputError, WriteError, LockedError; LlmctlError when a worker dies or every record failed.
    """
    from llmctl.core.tokenizer import Tokenizer

    assert config.out_dir is not None  # PackConfig sees to both
    assert config.tokenizer is not None
    out_dir = config.out_dir
    check_out_dir(out_dir)
    format = cast("Format | None", config.format)
    sources = find_sources(config.inputs, format=format, exclude=out_dir)
    num_train_sources = len(sources)
    sources += find_sources(config.val_data, format=format, exclude=out_dir)
    if [*config.inputs, *config.val_data].count(STDIN) and stdin is None:
        raise UsageError("stdin is closed, but `-` names it as an input; pipe something in or name a file")
    tokenizer = tokenizer or Tokenizer.load(Path(config.tokenizer))
    split = split_rule(config, sources)
    plan = plan_of(config, sources, num_train_sources, split, tokenizer)
    rules = EncodeRules(
        tokenizer_dir=out_dir / TOKENIZER_DIR,
        field=config.field,
        split=split,
        allow_special=config.allow_special,
        add_bos=config.add_bos,
        skip_errors=config.on_error == "skip",
    )
    encoder = PieceEncoder(rules, tokenizer)  # here, so that a tokenizer without an end-of-text token is refused early
    with PackFolder.open(out_dir, plan, overwrite=config.overwrite) as folder:
        if (done := folder.finished()) is not None:
            yield _packed(folder, done, already_complete=True)
            return
        for message in folder.warnings:
            yield PackWarned(message)
        folder.keep_tokenizer(tokenizer)
        num_workers = _num_workers(config, sources)
        yield PackPlanned(
            num_sources=len(sources),
            num_bytes=_total_bytes(sources),
            num_workers=num_workers,
            split_kind=split.kind if num_train_sources == len(sources) else "data",
            val_fraction=split.fraction,
            dtype=id_dtype(tokenizer.vocab_size).name,
            vocab_size=tokenizer.vocab_size,
            num_shards_kept=sum(len(places) for places in folder.places.values()),
        )
        encoders: Encoders = InlineEncoders(encoder) if num_workers == 1 else WorkerPool(rules, num_workers)
        run = _Run(config, folder, sources, num_train_sources, split, tokenizer, encoder, stdin, stop)
        with contextlib.closing(encoders), contextlib.closing(run):
            try:
                yield from run.events(encoders)
                manifest = run.finish()
            except WriteError as error:
                raise WriteError(f"{error} ({folder.kept()})") from error
        yield _packed(folder, manifest, already_complete=False)


def split_rule(config: PackConfig, sources: list[Source]) -> SplitRule:
    """The rule that the settings mean; for the sources of --val-data another one, "all", takes its place."""
    if config.val_data or config.val_fraction == 0:
        return SplitRule(kind="none")
    one_document = len(sources) == 1 and sources[0].format == "text" and config.separator is None
    kind = config.val_by or ("tail" if one_document else "hash")
    fraction = _DEFAULT_FRACTION[kind] if config.val_fraction is None else config.val_fraction
    return SplitRule(kind="tail" if kind == "tail" else "hash", fraction=fraction, seed=config.split_seed if kind == "hash" else 0)


def plan_of(config: PackConfig, sources: list[Source], num_train_sources: int, split: SplitRule, tokenizer: "Tokenizer") -> dict[str, Any]:
    """Everything that decides the bytes of the result, as JSON. An interrupted run goes on only under the same plan."""
    return {
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "sources": [
            {
                "name": "stdin" if source.path is None else os.fsencode(source.path.name).decode("utf-8", "backslashreplace"),
                "num_bytes": source.num_bytes,
                "format": source.format,
                "is_val": number >= num_train_sources,
            }
            for number, source in enumerate(sources)
        ],
        "field": config.field,
        "separator": config.separator,
        "split": dataclasses.asdict(split),
        "allow_special": config.allow_special,
        "add_bos": tokenizer.adds_bos if config.add_bos is None else config.add_bos,
        "on_error": config.on_error,
        "max_line_bytes": config.max_line_bytes,
        "shard_tokens": config.shard_tokens,
    }


def _has_descriptor(stream: IO[bytes]) -> bool:
    try:
        return stream.fileno() >= 0
    except (OSError, AttributeError):  # a stream in memory
        return False


def _total_bytes(sources: list[Source]) -> int | None:
    sizes = [source.num_bytes for source in sources]
    return None if None in sizes else sum(size for size in sizes if size is not None)


def _num_workers(config: PackConfig, sources: list[Source]) -> int:
    if config.workers is not None:
        return config.workers
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    total = _total_bytes(sources)
    return num_cores if total is None else max(1, min(num_cores, total // _BYTES_FOR_A_WORKER))


def _packed(folder: PackFolder, manifest: dict[str, Any], *, already_complete: bool) -> Packed:
    def summary(name: str) -> SplitSummary | None:
        entry = manifest["splits"].get(name)
        return entry and SplitSummary(entry["num_documents"], entry["num_tokens"], entry["num_bytes"], len(entry["shards"]))

    num_errors = manifest["num_errors"]
    return Packed(
        directory=str(folder.path),
        train=summary("train") or SplitSummary(0, 0, 0, 0),
        val=summary("val"),
        num_errors=num_errors,
        errors_file=str(folder.errors_path) if num_errors else None,
        num_special_names=manifest["num_special_names"],
        already_complete=already_complete,
    )


@dataclass
class _Split:
    """One split while it is written: what is on the disk, the shard at work, and the totals."""

    name: str
    places: list[ShardPlace]
    writer: ShardWriter | None = None
    num_documents: int = 0
    num_bytes: int = 0

    @property
    def resumes_at(self) -> tuple[int, int]:
        """The piece from which on ids are needed, and how many ids of that piece the last finished shard holds."""
        return (self.places[-1].piece, self.places[-1].num_ids) if self.places else (0, 0)

    @property
    def num_tokens(self) -> int:
        return sum(place.shard.num_tokens for place in self.places) + (self.writer.num_tokens if self.writer else 0)


class _Watched:
    """stdin, read so that a signal is heard while nothing comes: Python goes on with a read that a signal broke off."""

    _POLL_S = 0.2

    def __init__(self, stdin: IO[bytes], stop: Callable[[], int | None], interrupted: Callable[[int], Interrupted]) -> None:
        self._descriptor = stdin.fileno()
        self._stop = stop
        self._interrupted = interrupted

    def read(self, num_bytes: int) -> bytes:
        """Up to `num_bytes`, b"" at the end. Raises Interrupted."""
        while not select.select([self._descriptor], [], [], self._POLL_S)[0]:
            if (number := self._stop()) is not None:
                raise self._interrupted(number)
        return os.read(self._descriptor, num_bytes)


class _Run:
    """One pass over the input."""

    def __init__(
        self,
        config: PackConfig,
        folder: PackFolder,
        sources: list[Source],
        num_train_sources: int,
        split: SplitRule,
        tokenizer: "Tokenizer",
        encoder: PieceEncoder,
        stdin: IO[bytes] | None,
        stop: Callable[[], int | None],
    ) -> None:
        self._config = config
        self._folder = folder
        self._sources = sources
        self._tokenizer = tokenizer
        self._stdin = stdin
        if stdin is not None and _has_descriptor(stdin):
            self._stdin = cast("IO[bytes]", _Watched(stdin, stop, self._interrupted))
        self._stop = stop
        rules = ReadRules(split=split, separator=config.separator, max_line_bytes=config.max_line_bytes, may_cut=encoder.may_cut)
        whole = dataclasses.replace(rules, split=SplitRule(kind="all"))
        self._rules = [rules if number < num_train_sources else whole for number in range(len(sources))]
        self._splits = {False: _Split("train", folder.places["train"]), True: _Split("val", folder.places["val"])}
        self._chain = b""
        self._num_pieces = 0
        self._num_errors = 0
        self._num_special = 0
        self._has_text = False

    def close(self) -> None:
        """Remove what is unfinished."""
        for split in self._splits.values():
            if split.writer is not None:
                split.writer.abort()
        self._folder.drop_errors()

    def events(self, encoders: Encoders) -> Iterator[PackEvent]:
        """Read, encode and write everything."""
        total = _total_bytes(self._sources)
        for batch, results in encoders.run(self._batches()):
            if (number := self._stop()) is not None:
                raise self._interrupted(number)
            for offset, (piece, result) in enumerate(zip(batch.pieces, results, strict=True)):
                yield from self._take(batch.first_piece + offset, piece, result)
            yield PackProgress(
                num_bytes_done=batch.num_bytes_taken,
                num_bytes=total,
                num_documents=sum(split.num_documents for split in self._splits.values()),
                num_tokens=sum(split.num_tokens for split in self._splits.values()),
            )
        if (number := self._stop()) is not None:
            raise self._interrupted(number)
        self._check_end()
        for split in self._splits.values():
            if split.writer is not None:
                yield self._close_shard(split, self._num_pieces, 0)
        if self._num_special and not self._config.allow_special:
            yield PackWarned(f"{self._num_special:,} names of special tokens in the text were encoded as plain text (see --allow-special)")
        if not self._splits[True].places and self._config.val_fraction != 0:
            yield PackWarned("no document fell into the validation split; raise --val-fraction, or use --val-by tail or --val-data")

    def finish(self) -> dict[str, Any]:
        """Write the manifest, which makes the folder complete, and give it."""
        splits = {
            split.name: {
                "shards": [place.shard.name for place in split.places],
                "num_tokens": split.num_tokens,
                "num_documents": split.num_documents,
                "num_bytes": split.num_bytes,
            }
            for split in self._splits.values()
            if split.places
        }
        return self._folder.finish(
            {
                "llmctl_version": __version__,
                "dtype": id_dtype(self._tokenizer.vocab_size).name,
                "vocab_size": self._tokenizer.vocab_size,
                "tokenizer_fingerprint": self._tokenizer.fingerprint,
                "eos_id": self._tokenizer.eos_id,
                "splits": splits,
                "num_errors": self._num_errors,
                "num_special_names": self._num_special,
            },
            has_errors=self._num_errors > 0,
        )

    def _batches(self) -> Iterator[PieceBatch]:
        """The pieces of all sources, about a mebibyte at a time."""
        held: list[Piece] = []
        held_bytes, first, taken_before = 0, 0, 0
        for number, source in enumerate(self._sources):
            taken = 0
            for piece, taken in read_pieces(source, number, rules=self._rules[number], stdin=self._stdin):
                held.append(piece)
                held_bytes += len(piece.data)
                if held_bytes >= PIECE_BYTES // 2 or len(held) >= _BATCH_PIECES:
                    yield self._batch(first, held, taken_before + taken)
                    first, held, held_bytes = first + len(held), [], 0
            taken_before += source.num_bytes if source.num_bytes is not None else taken
        if held:
            yield self._batch(first, held, taken_before)

    def _batch(self, first: int, pieces: list[Piece], taken: int) -> PieceBatch:
        last = first + len(pieces) - 1
        wants_train, wants_val = (last >= self._splits[is_val].resumes_at[0] for is_val in (False, True))
        return PieceBatch(first, tuple(pieces), wants_train, wants_val, taken)

    def _take(self, number: int, piece: Piece, result: EncodedPiece) -> Iterator[PackEvent]:
        """Bring one piece's ids to its split's shards, and its errors to the list."""
        for error in result.errors:
            self._note(error)
        self._num_special += result.num_special
        self._has_text = self._has_text or result.has_text
        self._num_pieces = number + 1
        self._chain = hashlib.blake2b(self._chain + result.digest, digest_size=32).digest()
        for split in self._splits.values():
            if split.places and not split.writer and split.places[-1].piece == number and split.places[-1].chain != self._chain.hex():
                raise self._changed(piece)
        for segment in result.segments:
            split = self._splits[segment.is_val]
            split.num_documents += segment.ends_document
            split.num_bytes += segment.num_bytes
            piece_done, ids_done = split.resumes_at
            if number < piece_done or segment.ids is None:
                continue
            start = ids_done if number == piece_done else 0
            if start == len(segment.ids):
                continue
            while start < len(segment.ids):
                writer = split.writer = split.writer or self._folder.new_shard(split.name, len(split.places))
                part = segment.ids[start : start + self._config.shard_tokens - writer.num_tokens]
                writer.write(part)
                start += len(part)
                if start == len(segment.ids) and segment.ends_document:
                    writer.end_document()
                if writer.num_tokens == self._config.shard_tokens:
                    yield self._close_shard(split, number, start)

    def _close_shard(self, split: _Split, piece: int, num_ids: int) -> ShardWritten:
        """Finish the shard at work and note that it ends after `num_ids` ids of `piece`."""
        assert split.writer is not None
        shard = split.writer.finish()
        split.writer = None
        split.places.append(ShardPlace(shard=shard, piece=piece, num_ids=num_ids, chain=self._chain.hex()))
        self._folder.save_state()
        return ShardWritten(shard.name, shard.num_tokens, shard.num_bytes)

    def _note(self, error: RecordError) -> None:
        name = self._sources[error.source].name
        if self._config.on_error == "stop":
            where = error.reason if error.reason.startswith("line ") else f"line {error.line}: {error.reason}"
            raise InputError(f"{name}: {where}; mend it, or leave such records out with --on-error skip")
        self._num_errors += 1
        self._folder.add_error({"source": name, "line": error.line, "byte": error.offset, "error": error.reason})

    def _check_end(self) -> None:
        """What only the end of the input can tell."""
        for split in self._splits.values():
            if split.places and not split.writer:
                last = split.places[-1]
                if last.piece > self._num_pieces or (last.piece == self._num_pieces and last.chain != self._chain.hex()):
                    raise self._changed(None)
        if not self._has_text:
            if self._num_errors:
                raise LlmctlError(f"every record failed ({self._num_errors:,}); the first: {self._folder.first_error()}")
            raise InputError("the input holds no text: nothing but empty or blank documents")

    def _changed(self, piece: Piece | None) -> InputError:
        name = self._sources[piece.source].name if piece is not None else self._sources[-1].name
        return InputError(
            f"{name}: the input up to here is not the one that the interrupted run read; give the same input,"
            " or start again with --overwrite"
        )

    def _interrupted(self, number: int) -> Interrupted:
        return Interrupted(f"stopped; {self._folder.kept()}; run the same command again to go on", signal_number=number)
