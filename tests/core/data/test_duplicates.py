"""The table of documents seen beside Python's sets, in memory and in a file."""

import random
from pathlib import Path

import numpy as np
import pytest

from llmctl.core.data import duplicates
from llmctl.core.data.duplicates import Duplicates
from llmctl.core.errors import WriteError


def by_sets(rows: list[list[int]]) -> list[bool]:
    seen: list[set[int]] = [set() for _ in rows[0]]
    result = []
    for row in rows:
        result.append(not any(key in known for key, known in zip(row, seen, strict=True)))
        if result[-1]:
            for key, known in zip(row, seen, strict=True):
                known.add(key)
    return result


@pytest.mark.parametrize("num_keys", [1, 16])
@pytest.mark.parametrize("memory_bytes", [1 << 30, 1 << 15])
def test_documents_are_fresh_as_sets_have_it(num_keys: int, memory_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "MEMORY_BYTES", memory_bytes)
    monkeypatch.setattr(duplicates, "_CHUNK", 1 << 12)
    generator = random.Random(num_keys)
    keys = [1, (1 << 64) - 1, *(generator.getrandbits(64) for _ in range(60_000))]
    rows = [[generator.choice(keys) for _ in range(num_keys)] for _ in range(4000 if num_keys > 1 else 60_000)]
    rows[5] = rows[3]
    wanted = by_sets(rows)
    for size in (1, 7, 5000):  # however the documents come
        table = Duplicates(tmp_path)
        parts = [table.fresh(np.array(rows[start : start + size], dtype=np.uint64)) for start in range(0, min(len(rows), 900 * size), size)]
        found = np.concatenate(parts).tolist()
        assert found == wanted[: len(found)]
    assert not any(wanted) or not all(wanted)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_asked(tmp_path: Path) -> None:
    assert len(Duplicates(tmp_path).fresh(np.empty((0, 1), dtype=np.uint64))) == 0


def test_a_folder_that_takes_no_file_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "MEMORY_BYTES", 0)
    with pytest.raises(WriteError, match="--dedupe"):
        Duplicates(tmp_path / "none").fresh(np.arange(1, 9000, dtype=np.uint64).reshape(-1, 1))
