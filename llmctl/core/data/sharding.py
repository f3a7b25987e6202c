"""A corpus divided among machines: each packs a run of it, and the runs in order are the whole. Knows files and lines; knows no ids.

The corpus is taken as one run of bytes, file after file, and divided evenly. Lines and JSON records fall to the part in
which they begin, so that a single file is divided too; what cannot be divided without reading it through (a text that is
one document, paragraphs, compressed files) falls whole to the part in which it begins.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

from llmctl.core.data.sources import Source, is_compressed
from llmctl.core.errors import InputError, NotFoundError, UsageError

_BLOCK_BYTES = 1 << 20


def part_of(sources: Sequence[Source], index: int, count: int) -> list[Source]:
    """The sources, or parts of them, that part `index` (from 0) of `count` packs, in order.

    Raises UsageError for stdin, which has no length.
    """
    sizes = []
    for source in sources:
        if source.num_bytes is None:
            raise UsageError(f"--shard: {source.name} has no length that could be divided; name files")
        sizes.append(source.num_bytes)
    ends = list(itertools.accumulate(sizes))
    total = ends[-1] if ends else 0
    low, high = total * index // count, total * (index + 1) // count
    result = []
    for source, end, num_bytes in zip(sources, ends, sizes, strict=True):
        begin = end - num_bytes
        if source.path is not None and source.format in ("lines", "jsonl") and not is_compressed(source.path):
            first, last = (_line_start(source.path, min(max(place - begin, 0), num_bytes), num_bytes) for place in (low, high))
            if first < last:
                result.append(dataclasses.replace(source, start=first, num_bytes=last - first))
        elif low <= begin < high:
            result.append(source)
    return result


def _line_start(path: Path, place: int, num_bytes: int) -> int:
    """Where the first line begins that begins at `place` or after it; the end of the file if there is none."""
    if place == 0 or place >= num_bytes:
        return place
    try:
        with open(path, "rb") as file:
            file.seek(place - 1)
            offset = place - 1
            while block := file.read(_BLOCK_BYTES):
                newline = block.find(b"\n")
                if newline >= 0:
                    return offset + newline + 1
                offset += len(block)
    except FileNotFoundError as error:
        raise NotFoundError(f"{path}: no such file; it went away") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    return num_bytes


def lines_before(source: Source) -> int:
    """How many lines of its file come before the part of it that `source` is."""
    if source.path is None or not source.start:
        return 0
    count, left = 0, source.start
    with open(source.path, "rb") as file:
        while left and (block := file.read(min(left, _BLOCK_BYTES))):
            count += block.count(b"\n")
            left -= len(block)
    return count
