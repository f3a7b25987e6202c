"""A packing under way: reads pieces, has them encoded, writes shards, and notes how far it came. Knows no tokenizer's inside and no plan.

How it resumes: pieces of the input are numbered, and each finished shard is noted in pack-state.json with the piece and
the id where it ended. Text is read and hashed from the start again (fast), but encoded (slow) only from there on, for
each split by itself. So no half-written shard has to survive, and the bytes are those of an unbroken run.
"""

import dataclasses
import hashlib
import os
import select
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, cast

import numpy as np

from llmctl import __version__
from llmctl.core.config.pack import PackConfig
from llmctl.core.data import documents
from llmctl.core.data.batches import Encoders, PieceBatch
from llmctl.core.data.documents import Piece, ReadRules, SplitRule, read_pieces
from llmctl.core.data.duplicates import Duplicates
from llmctl.core.data.encode import EncodedPiece, EncoderNote, Segment
from llmctl.core.data.packevents import PackEvent, PackProgress, PackWarned, ShardWritten
from llmctl.core.data.packfolder import PackFolder, ShardPlace
from llmctl.core.data.records import RecordError
from llmctl.core.data.sharding import lines_before
from llmctl.core.data.shards import ShardWriter, id_dtype
from llmctl.core.data.sources import Source
from llmctl.core.errors import InputError, Interrupted, LlmctlError

if TYPE_CHECKING:
    from llmctl.core.tokenizer import Tokenizer

_BATCH_PIECES = 4096


def total_bytes(sources: list[Source]) -> int | None:
    """Of all files, None when stdin is among them."""
    sizes = [source.num_bytes for source in sources]
    return None if None in sizes else sum(size for size in sizes if size is not None)


def _has_descriptor(stream: IO[bytes]) -> bool:
    try:
        return stream.fileno() >= 0
    except (OSError, AttributeError):  # a stream in memory
        return False


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


class PackRun:
    """One pass over the input."""

    def __init__(
        self,
        config: PackConfig,
        folder: PackFolder,
        sources: list[Source],
        num_train_sources: int,
        split: SplitRule,
        tokenizer: "Tokenizer",
        stdin: IO[bytes] | None,
        stop: Callable[[], int | None],
        *,
        may_cut: bool,
    ) -> None:
        self._config = config
        self._folder = folder
        self._sources = sources
        self._tokenizer = tokenizer
        self._stdin = stdin
        if stdin is not None and _has_descriptor(stdin):
            self._stdin = cast("IO[bytes]", _Watched(stdin, stop, self._interrupted))
        self._stop = stop
        rules = ReadRules(split=split, separator=config.separator, max_line_bytes=config.max_line_bytes, may_cut=may_cut)
        whole = dataclasses.replace(rules, split=SplitRule(kind="all"))
        self._rules = [rules if number < num_train_sources else whole for number in range(len(sources))]
        self._splits = {False: _Split("train", folder.places["train"]), True: _Split("val", folder.places["val"])}
        self._chain = b""
        self._num_pieces = 0
        self._num_errors = 0
        self._num_special = 0
        self._has_text = False
        self._duplicates = Duplicates(folder.path)
        self._cleaned: Counter[str] = Counter()
        self.note: EncoderNote | None = None
        """Which implementation encodes; the checked bytes are those of all workers."""
        self._checked: dict[int, int] = {}

    def close(self) -> None:
        """Remove what is unfinished."""
        for split in self._splits.values():
            if split.writer is not None:
                split.writer.abort()
        self._folder.drop_errors()

    def events(self, encoders: Encoders) -> Iterator[PackEvent]:
        """Read, encode and write everything."""
        total = total_bytes(self._sources)
        for encoded in encoders.run(self._batches()):
            if (number := self._stop()) is not None:
                raise self._interrupted(number)
            batch = encoded.batch
            self._checked[encoded.worker] = encoded.note.num_checked_bytes
            self.note = dataclasses.replace(encoded.note, num_checked_bytes=sum(self._checked.values()))
            for offset, (piece, result) in enumerate(zip(batch.pieces, encoded.results, strict=True)):
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
                **({"quality": dict(sorted(self._cleaned.items()))} if "quality" in self._folder.plan else {}),
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
                if held_bytes >= documents.PIECE_BYTES // 2 or len(held) >= _BATCH_PIECES:
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
        self._cleaned.update(result.cleaned)
        self._num_pieces = number + 1
        self._chain = hashlib.blake2b(self._chain + result.digest, digest_size=32).digest()
        for split in self._splits.values():
            if split.places and not split.writer and split.places[-1].piece == number and split.places[-1].chain != self._chain.hex():
                raise self._changed(piece)
        for segment in result.segments:
            yield from self._write(number, self._without_duplicates(segment))

    def _without_duplicates(self, segment: Segment) -> Segment:
        """`segment` without the documents that came before, where those are to be left out."""
        if segment.keys is None or segment.sizes is None:
            return segment
        fresh = self._duplicates.fresh(segment.keys)
        if fresh.all():
            return segment
        self._cleaned["duplicates"] += int((~fresh).sum())
        ids, ends = segment.ids, segment.ends
        if ids is not None:
            lengths = np.diff(ends, prepend=np.uint32(0))
            ids, ends = ids[np.repeat(fresh, lengths)], np.cumsum(lengths[fresh], dtype=np.uint32)
        return Segment(segment.is_val, int(fresh.sum()), int(segment.sizes[fresh].sum()), ids, ends)

    def _write(self, number: int, segment: Segment) -> Iterator[ShardWritten]:
        """Bring the ids of piece `number` for one split to its shards, as far as they are not there already."""
        split = self._splits[segment.is_val]
        split.num_documents += segment.num_documents
        split.num_bytes += segment.num_bytes
        piece_done, ids_done = split.resumes_at
        if number < piece_done or segment.ids is None:
            return
        start = ids_done if number == piece_done else 0
        while start < len(segment.ids):
            writer = split.writer = split.writer or self._folder.new_shard(split.name, len(split.places))
            stop = min(len(segment.ids), start + self._config.shard_tokens - writer.num_tokens)
            low, high = np.searchsorted(segment.ends, np.array((start, stop), dtype=segment.ends.dtype), side="right")
            writer.end_documents(segment.ends[low:high].astype(np.int64) + (writer.num_tokens - start))
            writer.write(segment.ids[start:stop])
            start = stop
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
        source = self._sources[error.source]
        name = source.name
        if source.start:  # lines are numbered from where the part begins
            line = error.line + lines_before(source)
            error = dataclasses.replace(error, line=line, reason=error.reason.replace(f"line {error.line} ", f"line {line} ", 1))
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
            if self._cleaned:
                raise InputError(f"the filters left nothing of the input: {', '.join(f'{n:,} {why}' for why, n in self._cleaned.items())}")
            raise InputError("the input holds no text: nothing but empty or blank documents")

    def _changed(self, piece: Piece | None) -> InputError:
        name = self._sources[piece.source].name if piece is not None else self._sources[-1].name
        return InputError(
            f"{name}: the input up to here is not the one that the interrupted run read; give the same input,"
            " or start again with --overwrite"
        )

    def _interrupted(self, number: int) -> Interrupted:
        return Interrupted(f"stopped; {self._folder.kept()}; run the same command again to go on", signal_number=number)
