"""The file of finished scores: what is damaged, foreign or changed never reaches a result."""

import os
import random
from pathlib import Path

import pytest

from llmctl.core.errors import InputError
from llmctl.core.evals.progress import Progress, _forget_old, default_cache_dir, job_key
from llmctl.core.files import FileLock

DATA = {"/data/a.jsonl": "11" * 32}
UNITS = [(f"{index}:abc", [-index - 0.1, 1.0]) for index in range(20)]


def _open(folder: Path, data: dict[str, str] = DATA, *, restart: bool = False) -> Progress:
    return Progress.open(folder, "key", data=data, restart=restart)


def _write(folder: Path) -> Path:
    progress = _open(folder)
    progress.add(UNITS[:12])
    progress.add(UNITS[12:])
    progress.close()
    return folder / "key.jsonl"


def test_numbers_come_back_bit_for_bit(tmp_path: Path) -> None:
    _write(tmp_path)
    progress = _open(tmp_path)
    assert [(unit, progress.get(unit)) for unit, _ in UNITS] == UNITS
    assert progress.get("20:abc") is None
    assert progress.num_damaged == 0


def test_without_a_folder_it_only_remembers() -> None:
    progress = Progress.open(None, "key", data=DATA, restart=False)
    progress.add(UNITS)
    progress.finish()
    assert progress.get(UNITS[3][0]) == UNITS[3][1]
    assert progress.problem is None


def test_no_flipped_byte_and_no_cut_ever_changes_a_number(tmp_path: Path) -> None:
    path = _write(tmp_path)
    whole = path.read_bytes()
    good = dict(UNITS)
    draw = random.Random(0)
    for _ in range(150):
        position = draw.randrange(len(whole))
        damaged = bytearray(whole)
        damaged[position] ^= 1 << draw.randrange(8)
        if draw.random() < 0.3:
            damaged = damaged[:position]
        path.write_bytes(damaged)
        progress = _open(tmp_path)
        kept = {unit: progress.get(unit) for unit in good}
        progress.close()
        assert all(values is None or values == good[unit] for unit, values in kept.items())


def test_damage_is_counted_and_only_that_row_is_lost(tmp_path: Path) -> None:
    path = _write(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[5] = lines[5].replace(b"-4.1", b"-4.2")
    path.write_bytes(b"".join(lines))
    progress = _open(tmp_path)
    assert progress.num_damaged == 1
    assert [unit for unit, _ in UNITS if progress.get(unit) is None] == ["4:abc"]


def test_a_second_run_reads_the_firsts_rows_and_writes_its_own_file(tmp_path: Path) -> None:
    first = _open(tmp_path)
    first.add(UNITS[:5])
    second = _open(tmp_path)
    assert second.get(UNITS[4][0]) == UNITS[4][1]
    second.add(UNITS[5:])
    assert (tmp_path / "key-1.jsonl").exists()
    first.close()
    second.close()
    third = _open(tmp_path)
    assert [(unit, third.get(unit)) for unit, _ in UNITS] == UNITS
    assert [path.name for path in tmp_path.glob("*.jsonl")] == ["key.jsonl"]


def test_data_changed_under_an_interrupted_run_is_refused_by_name(tmp_path: Path) -> None:
    _write(tmp_path)
    changed = {"/data/a.jsonl": "22" * 32}
    with pytest.raises(InputError, match=r"/data/a\.jsonl has changed since"):
        _open(tmp_path, changed)
    fresh = _open(tmp_path, changed, restart=True)
    assert fresh.get(UNITS[0][0]) is None
    fresh.close()
    _open(tmp_path, changed).close()


def test_data_changed_after_a_finished_run_begins_anew(tmp_path: Path) -> None:
    progress = _open(tmp_path)
    progress.add(UNITS)
    progress.finish()
    progress.close()
    assert _open(tmp_path, {"/data/a.jsonl": "22" * 32}).get(UNITS[0][0]) is None


def test_a_folder_that_cannot_be_written_is_a_problem_and_no_failure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    progress = _open(tmp_path / "file" / "cache")
    assert progress.problem is not None
    progress.add(UNITS)
    assert progress.get(UNITS[0][0]) == UNITS[0][1]


def test_a_disk_that_fills_up_is_a_problem_and_no_failure(tmp_path: Path) -> None:
    progress = _open(tmp_path)
    assert progress._file is not None
    progress._file.close()
    progress._file = open("/dev/full", "wb")  # noqa: SIM115
    progress.add(UNITS)
    assert progress.problem is not None
    assert progress.get(UNITS[0][0]) == UNITS[0][1]


def test_the_key_depends_on_every_fact() -> None:
    assert job_key({"a": 1, "b": 2}) == job_key({"b": 2, "a": 1})
    assert job_key({"a": 1}) != job_key({"a": 2})


def test_the_default_folder_follows_the_xdg_rules() -> None:
    assert default_cache_dir({"XDG_CACHE_HOME": "/x", "HOME": "/h"}) == Path("/x/llmctl/eval")
    assert default_cache_dir({"HOME": "/h"}) == Path("/h/.cache/llmctl/eval")
    assert default_cache_dir({}) is None


def test_the_folder_stays_bounded_and_what_is_in_use_stays(tmp_path: Path) -> None:
    for age, name in enumerate(("own", "oldest", "in-use", "old", "young")):
        (tmp_path / f"{name}.jsonl").write_bytes(b"x" * 100)
        os.utime(tmp_path / f"{name}.jsonl", (1000 + age, 1000 + age))
    with FileLock(tmp_path / "in-use.lock"):
        _forget_old(tmp_path, tmp_path / "own.jsonl", max_bytes=500)
        assert len(list(tmp_path.glob("*.jsonl"))) == 5
        _forget_old(tmp_path, tmp_path / "own.jsonl", max_bytes=350)
    assert sorted(path.stem for path in tmp_path.glob("*.jsonl")) == ["in-use", "own", "young"]
