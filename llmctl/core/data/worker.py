"""Encoding in processes of our own: the pipe between packer and worker, from both sides. Knows no corpus and no shards.

Plain subprocesses rather than multiprocessing: a worker imports this module and nothing of the caller's program, it
ends by itself when the pipe ends, so a killed packer leaves no orphans, and its death is an end of file on the other
side, so nobody waits for it. A frame is the lengths of a JSON header and of the bytes that follow it, then both.
"""

import contextlib
import dataclasses
import json
import os
import queue
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llmctl.core.data.batches import EncodedBatch, Encoders, InlineEncoders, PieceBatch, in_order, open_threads
from llmctl.core.data.documents import Piece, SplitRule
from llmctl.core.data.encode import EncodedPiece, EncoderNote, EncodeRules, PieceEncoder, Segment
from llmctl.core.data.encoders import UnequalError
from llmctl.core.data.quality import QualityRules
from llmctl.core.data.records import RecordError
from llmctl.core.errors import InputError, LlmctlError, UsageError

if TYPE_CHECKING:
    from llmctl.core.tokenizer import Tokenizer

_LENGTHS = struct.Struct("<QQ")
_PACKAGE_ROOT = str(Path(__file__).resolve().parents[3])
_PROGRAM = "import sys; sys.path.insert(0, sys.argv[1]); from llmctl.core.data.worker import worker_main; worker_main()"
_EXIT_WAIT_S = 5.0
"""How long after the end of its pipe a worker may take to be gone, before we stop asking why."""
# One thread each: the workers are the parallelism, and threads that numpy starts take address space for nothing.
_ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def open_encoders(rules: EncodeRules, tokenizer: "Tokenizer", num_workers: int) -> Encoders:
    """This process for one worker, threads of it where they do, else so many processes, which begin to get ready at once."""
    if num_workers == 1:
        return InlineEncoders(rules, tokenizer)
    return open_threads(rules, tokenizer, num_workers) or WorkerPool(rules, tokenizer, num_workers)


class WorkerPool:
    """`num_workers` processes. At most two batches a worker are under way, so memory does not grow with the corpus."""

    def __init__(self, rules: EncodeRules, tokenizer: "Tokenizer", num_workers: int) -> None:
        self._num_workers = num_workers
        self._executor = ThreadPoolExecutor(num_workers, thread_name_prefix="llmctl-pack")
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._workers: list[_Worker] = []
        try:
            self._workers += [_Worker(number) for number in range(num_workers)]
            order = rules_to_frame(rules, tokenizer)  # while they start
            for worker in self._workers:
                self._executor.submit(self._order, worker, order)
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> tuple[int, ...]:
        """The process ids of the workers."""
        return tuple(worker.process.pid for worker in self._workers)

    def run(self, batches: Iterator[PieceBatch]) -> Iterator[EncodedBatch]:
        """See Encoders. Raises LlmctlError when a worker dies or fails, UnequalError as PieceEncoder does."""
        return in_order(batches, lambda batch: self._executor.submit(self._encode, batch), most=2 * self._num_workers)

    def _order(self, worker: "_Worker", order: tuple[Any, bytes]) -> None:
        """In a thread: it is more than a pipe holds, and the worker reads it only when all is imported."""
        try:
            worker.order(order)
        finally:
            self._idle.put(worker)

    def _encode(self, batch: PieceBatch) -> EncodedBatch:
        worker = self._idle.get()
        try:
            return EncodedBatch(batch, *worker.encode(batch), worker.number)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """End the workers at once: they hold nothing that could be lost."""
        for worker in self._workers:
            worker.end()
        self._executor.shutdown(wait=True, cancel_futures=True)


class _Worker:
    """The packer's side of one worker process."""

    def __init__(self, number: int) -> None:
        self.number = number
        command = [sys.executable, "-P", "-c", _PROGRAM, _PACKAGE_ROOT]
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, **_ENVIRONMENT},
                process_group=0,  # the terminal's Ctrl-C is for the packer, which then ends us in order
            )
        except OSError as error:
            raise LlmctlError(f"cannot start a worker process: {error.strerror}; try --workers 1") from error

    def order(self, order: tuple[Any, bytes]) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # it died at once, or all is closed: the first batch finds out and says so
            write_frame(self.process.stdin, *order)

    def encode(self, batch: PieceBatch) -> tuple[list[EncodedPiece], EncoderNote]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            write_frame(self.process.stdin, *batch_to_frame(batch))
            answer = read_frame(self.process.stdout)
        except (OSError, ValueError):  # ValueError: the pipe was closed from this side
            answer = None
        if answer is None:
            raise LlmctlError(self._obituary())
        header, data = answer
        if "input_error" in header:
            raise InputError(header["input_error"])
        if "missing_extra" in header:
            raise UsageError(header["missing_extra"])
        if "unequal" in header:
            raise UnequalError(header["unequal"])
        if "failure" in header:
            raise LlmctlError(f"a worker failed: {header['failure']}")
        return results_from_frame(header, data)

    def _obituary(self) -> str:
        try:
            code = self.process.wait(_EXIT_WAIT_S)
        except subprocess.TimeoutExpired:
            return "a worker closed its pipe but goes on; run the same command again"
        advice = "; run the same command again to go on, with fewer --workers if memory is short"
        if code == -signal.SIGKILL:
            return "worker died (signal 9, out of memory?)" + advice
        return (f"worker died (signal {-code})" if code < 0 else f"worker ended with status {code}") + advice

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what was buffered for a worker that is gone
                    pipe.close()


def worker_main() -> None:
    """The worker's side: reads rules, then batches, from descriptor 0, and answers each on descriptor 1."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the packer decides; the end of the pipe is the order to stop
    source, sink = os.fdopen(0, "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing that prints may get between the frames
    with contextlib.suppress(BrokenPipeError):
        try:
            first = read_frame(source)
            if first is None:
                return
            encoder = PieceEncoder(*rules_from_frame(*first))
            while (frame := read_frame(source)) is not None:
                batch = batch_from_frame(*frame)
                results = encoder.encode(batch.pieces, wants_train=batch.wants_train, wants_val=batch.wants_val)
                write_frame(sink, *results_to_frame(results, encoder.note))
        except BrokenPipeError:
            raise
        except InputError as error:
            write_frame(sink, {"input_error": str(error)}, b"")
        except UsageError as error:
            write_frame(sink, {"missing_extra": str(error)}, b"")
        except UnequalError as error:
            write_frame(sink, {"unequal": str(error)}, b"")
        except MemoryError:
            write_frame(sink, {"failure": "out of memory; try fewer --workers"}, b"")
        except BaseException as error:  # whatever it is, the packer has to hear of it
            write_frame(sink, {"failure": f"{type(error).__name__}: {error}"}, b"")
    os._exit(0)  # the last flush of a broken pipe would fail again


def write_frame(file: IO[bytes], header: Any, data: bytes) -> None:
    """Send one frame."""
    text = json.dumps(header).encode()
    file.write(_LENGTHS.pack(len(text), len(data)))
    file.write(text)
    file.write(data)
    file.flush()


def read_frame(file: IO[bytes]) -> tuple[Any, bytes] | None:
    """Receive one frame; None at the end of the pipe, also in the middle of a frame."""
    lengths = file.read(_LENGTHS.size)
    if len(lengths) < _LENGTHS.size:
        return None
    header_bytes, data_bytes = _LENGTHS.unpack(lengths)
    header, data = file.read(header_bytes), file.read(data_bytes)
    if len(header) < header_bytes or len(data) < data_bytes:
        return None
    return json.loads(header), data


def rules_to_frame(rules: EncodeRules, tokenizer: "Tokenizer") -> tuple[Any, bytes]:
    """EncodeRules and the tokenizer as header and bytes."""
    names = [tokenizer.bos_token, tokenizer.eos_token]
    return {"rules": dataclasses.asdict(rules), "names": names}, tokenizer.to_json(pretty=False).encode()


def rules_from_frame(header: Any, data: bytes) -> tuple[EncodeRules, "Tokenizer"]:
    """The inverse of rules_to_frame."""
    import tokenizers

    from llmctl.core.tokenizer import Tokenizer

    given = header["rules"]
    settings: dict[str, Any] = {name: tuple(map(_hashable, v)) if isinstance(v, list) else v for name, v in given["quality"].items()}
    rules = EncodeRules(**{**given, "split": SplitRule(**given["split"]), "quality": QualityRules(**settings)})
    bos, eos = header["names"]
    return rules, Tokenizer.from_parts(tokenizers.Tokenizer.from_buffer(data), bos=bos, eos=eos, pad=None)


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def batch_to_frame(batch: PieceBatch) -> tuple[Any, bytes]:
    """A batch as header and bytes."""
    rows = [[p.source, p.line, p.offset, len(p.data), p.form, p.starts_document, p.ends_document, p.is_val, p.error] for p in batch.pieces]
    header = {"first": batch.first_piece, "wants": [batch.wants_train, batch.wants_val], "taken": batch.num_bytes_taken, "pieces": rows}
    return header, b"".join(p.data for p in batch.pieces)


def batch_from_frame(header: Any, data: bytes) -> PieceBatch:
    """The inverse of batch_to_frame."""
    pieces, start = [], 0
    for source, line, offset, num_bytes, *flags in header["pieces"]:
        pieces.append(Piece(source, line, offset, data[start : start + num_bytes], *flags))
        start += num_bytes
    wants_train, wants_val = header["wants"]
    return PieceBatch(header["first"], tuple(pieces), wants_train, wants_val, header["taken"])


def results_to_frame(results: Sequence[EncodedPiece], note: EncoderNote) -> tuple[Any, bytes]:
    """Results as header and bytes: all document ends, then all ids, in order."""
    rows: list[Any] = []
    keys: list[npt.NDArray[Any]] = []
    sizes: list[npt.NDArray[Any]] = []
    ends: list[npt.NDArray[Any]] = []
    ids: list[npt.NDArray[Any]] = []
    for result in results:
        segments = []
        for segment in result.segments:
            num_ids = None if segment.ids is None else len(segment.ids)
            num_keys = None if segment.keys is None else segment.keys.shape[1]
            segments.append([segment.is_val, segment.num_documents, segment.num_bytes, num_ids, len(segment.ends), num_keys])
            if segment.keys is not None and segment.sizes is not None:
                keys.append(segment.keys)
                sizes.append(segment.sizes)
            ends.append(segment.ends)
            if segment.ids is not None:
                ids.append(segment.ids)
        errors = [[e.source, e.line, e.offset, e.reason] for e in result.errors]
        rows.append([segments, errors, result.digest.hex(), result.num_special, result.has_text, result.cleaned])
    dtype = ids[0].dtype.str if ids else "<u4"
    return {"results": rows, "dtype": dtype, "note": dataclasses.astuple(note)}, b"".join(
        [array.data for array in (*keys, *sizes, *ends, *ids)]
    )


def results_from_frame(header: Any, data: bytes) -> tuple[list[EncodedPiece], EncoderNote]:
    """The inverse of results_to_frame."""
    found_segments = [segment for row in header["results"] for segment in row[0]]
    num_ends = sum(segment[4] for segment in found_segments)
    num_sizes = sum(segment[1] for segment in found_segments if segment[5] is not None)
    num_keys = sum(segment[1] * segment[5] for segment in found_segments if segment[5] is not None)
    all_keys = np.frombuffer(data, dtype="<u8", count=num_keys)
    all_sizes = np.frombuffer(data, dtype="<u4", offset=8 * num_keys, count=num_sizes)
    all_ends = np.frombuffer(data, dtype="<u4", offset=8 * num_keys + 4 * num_sizes, count=num_ends)
    all_ids = np.frombuffer(data, dtype=header["dtype"], offset=8 * num_keys + 4 * (num_sizes + num_ends))
    results: list[EncodedPiece] = []
    end, start, key, size = 0, 0, 0, 0
    for rows, errors, digest, num_special, has_text, cleaned in header["results"]:
        segments = []
        for is_val, num_documents, num_bytes, num_ids, num_ends, width in rows:
            ids = None if num_ids is None else all_ids[start : start + num_ids]
            keys = sizes = None
            if width is not None:
                keys = all_keys[key : key + num_documents * width].reshape(num_documents, width)
                sizes = all_sizes[size : size + num_documents]
                key, size = key + num_documents * width, size + num_documents
            segments.append(Segment(is_val, num_documents, num_bytes, ids, all_ends[end : end + num_ends], keys, sizes))
            end, start = end + num_ends, start + (num_ids or 0)
        found = tuple(RecordError(*error) for error in errors)
        results.append(EncodedPiece(tuple(segments), found, bytes.fromhex(digest), num_special, has_text, cleaned))
    return results, EncoderNote(*header["note"])
