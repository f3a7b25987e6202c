"""Shards of a batch job: where they lie, and how they become one result file. Knows result files; knows no model."""

import contextlib
import fcntl
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from llmctl.core.errors import InputError, LockedError, NotFoundError, UsageError
from llmctl.core.files import atomic_write, parse_json, read_json, write_json
from llmctl.core.infer.openai_rows import is_answer
from llmctl.core.infer.results import errors_path_of, job_path_of, key_of, to_line

_OF_SHARD = ("shard", "num_results")
"""What a shard's job says of itself; all the rest must be the same in every shard."""


_Place = tuple[int, int, int, int]
"""Where a result belongs and where it stands: its line of the input, its sample, the number of its shard, its offset there."""


@dataclass(frozen=True, kw_only=True)
class Merged:
    """A merge is done."""

    num_shards: int
    num_results: int
    num_failed: int
    errors_path: Path


def shard_path(path: Path, shard: tuple[int, int]) -> Path:
    """The result file of shard (i, n), beside `path`: answers.jsonl becomes answers.shard-2-of-4.jsonl."""
    stem = path.name.removesuffix(".jsonl")
    return path.with_name(f"{stem}.shard-{shard[0]}-of-{shard[1]}{path.name[len(stem) :]}")


def merge_shards(path: Path, *, overwrite: bool = False) -> Merged:
    """Join the shards of `path` into it, in the order of the input: what one job with --ordered would have written.

    The shards stay. Raises NotFoundError when there are none or one is missing, InputError when they are of different
    jobs, not whole or hold an id twice, LockedError when one is still being written, UsageError when `path` is there and
    not to be replaced.
    """
    if path.exists() and path.stat().st_size and not overwrite:
        raise UsageError(f"--output {path}: is there already; choose another name, or use --overwrite")
    shards = _find(path)
    seen: set[str] = set()
    places: list[_Place] = []
    errors: list[tuple[int, bytes]] = []
    common: dict[str, Any] | None = None
    with ExitStack() as stack:
        files = [stack.enter_context(_locked(shard)) for shard in shards]
        for number, (shard, file) in enumerate(zip(shards, files, strict=True)):
            job = _job(shard, number + 1, len(shards))
            shared = {name: value for name, value in job.items() if name not in _OF_SHARD}
            common = shared if common is None else common
            if differing := [name for name in {**common, **shared} if common.get(name) != shared.get(name)]:
                raise InputError(f"{shard} is of another job than {shards[0]}: {', '.join(differing)} differ; make it again")
            num_texts = 0
            for place, row in _rows(shard, file, number):
                key = key_of(row)
                if key in seen:
                    id = json.dumps(row.get("custom_id") if is_answer(row) else row["id"])
                    raise InputError(f"{shard}: the id {id} has been used before, by this shard or another")
                seen.add(key)
                places.append(place)
                num_texts += job.get("num_samples", 1) if is_answer(row) else 1
            failed = _errors(errors_path_of(shard), errors)
            lacking = job["num_results"] - num_texts - sum(1 if single else job.get("num_samples", 1) for single in failed)
            if lacking > 0:
                raise InputError(f"{shard}: {lacking:,} of its {job['num_results']:,} results are missing; run that shard again")
        places.sort()
        with atomic_write(path) as out:
            for _, _, number, offset in places:
                files[number].seek(offset)
                row = parse_json(files[number].readline(), where=str(shards[number]))
                out.write(to_line({name: value for name, value in row.items() if name != "line"}))
    if errors:
        with atomic_write(errors_path_of(path)) as out:
            out.writelines(line for _, line in sorted(errors, key=lambda error: error[0]))
    else:
        errors_path_of(path).unlink(missing_ok=True)
    write_json(job_path_of(path), common)
    return Merged(num_shards=len(shards), num_results=len(places), num_failed=len(errors), errors_path=errors_path_of(path))


def _find(path: Path) -> list[Path]:
    """All shards of `path`, in order."""
    stem = path.name.removesuffix(".jsonl")
    pattern = re.compile(re.escape(stem) + r"\.shard-(\d+)-of-(\d+)" + re.escape(path.name[len(stem) :]))
    found = [(int(match[1]), int(match[2])) for file in path.parent.iterdir() if (match := pattern.fullmatch(file.name))]
    if not found:
        raise NotFoundError(f"no shards of {path} are there; they are made by --shard I/N with the same --output")
    counts = {count for _, count in found}
    if len(counts) > 1:
        raise InputError(f"shards of {path} by {' and by '.join(map(str, sorted(counts)))} are there; remove those that are not wanted")
    (count,) = counts
    if missing := sorted(set(range(1, count + 1)) - {index for index, _ in found}):
        raise NotFoundError(f"{shard_path(path, (missing[0], count))} is not there; run --shard {missing[0]}/{count}")
    return [shard_path(path, (index, count)) for index in range(1, count + 1)]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[Any]:
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            raise LockedError(f"{path} is being written by another run; wait for it") from error
        yield file


def _job(shard: Path, index: int, count: int) -> dict[str, Any]:
    path = job_path_of(shard)
    if not path.is_file():
        raise InputError(f"{shard}: no {path.name} says what made it; run that shard again")
    job = read_json(path)
    if not isinstance(job, dict) or job.get("shard") != f"{index}/{count}" or not isinstance(job.get("num_results"), int):
        raise InputError(f"{path}: is not of shard {index}/{count}; run that shard again")
    return job


def _rows(shard: Path, file: IO[bytes], number: int) -> Iterator[tuple[_Place, dict[str, Any]]]:
    """The result rows of shard `number`, and where they stand."""
    offset = 0
    for count, line in enumerate(file, start=1):
        row = parse_json(line, where=f"{shard}: line {count}") if line.endswith(b"\n") else None
        if not isinstance(row, dict) or "id" not in row or not isinstance(row.get("line"), int):
            raise InputError(f"{shard}: line {count} is not a whole result row of a shard; run that shard again")
        sample = row.get("sample", 0)
        yield (row["line"], sample if isinstance(sample, int) else 0, number, offset), row
        offset += len(line)


def _errors(path: Path, errors: list[tuple[int, bytes]]) -> list[bool]:
    """Add the error rows of a shard to `errors`, each with its line; for each whether it is of a single sample."""
    if not path.exists():
        return []
    singles = []
    with open(path, "rb") as file:
        for count, line in enumerate(file, start=1):
            row = parse_json(line, where=f"{path}: line {count}")
            if not isinstance(row, dict) or not isinstance(row.get("line"), int):
                raise InputError(f"{path}: line {count} is not an error row; run that shard again")
            singles.append("sample" in row)
            errors.append((row["line"], line))
    return singles
