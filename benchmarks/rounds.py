"""Measurements that are made in rounds and kept as they come. Knows no engine and no task.

A file of JSON lines: one of settings, one a measurement, one where a round ends. A run that was stopped goes on after its last
whole round; what a broken round had measured is dropped, since only neighbours in time are compared.
"""

import json
import platform
import statistics
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any


class Rounds:
    """The rounds measured so far, and the file that they are in (None: kept in memory alone)."""

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        """Take up what the file holds; SystemExit where it was measured with other settings."""
        self.records: list[dict[str, Any]] = []
        self.done = 0
        self._path = path
        if path is None:
            return
        settings = json.loads(json.dumps(settings, default=str))
        if path.exists():
            first, *lines = path.read_text().splitlines()
            if json.loads(first) != settings:
                raise SystemExit(f"{path} was measured with other settings; name another file, or remove it")
            found = [json.loads(line) for line in lines if line.endswith("}")]
            self.done = sum("end" in record for record in found)
            self.records = [record for record in found if record["round"] < self.done and "end" not in record]
        whole = [settings, *self.records, *({"round": number, "end": True} for number in range(self.done))]
        path.write_text("".join(json.dumps(record) + "\n" for record in whole))

    def add(self, **record: Any) -> None:
        """A measurement of the round under way."""
        self.records.append({"round": self.done, **record})
        self._write(self.records[-1])

    def end(self) -> None:
        """The round is whole."""
        self._write({"round": self.done, "end": True})
        self.done += 1

    def _write(self, record: dict[str, Any]) -> None:
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(record) + "\n")

    def find(self, field: str, **wanted: Any) -> dict[int, Any]:
        """By round, this field of the records that hold the wanted values."""
        return {r["round"]: r[field] for r in self.records if field in r and all(r.get(key) == value for key, value in wanted.items())}


def spread(values: Iterable[float], digits: int = 1) -> str:
    """Median, range, and how many there are."""
    found = list(values)
    return f"{statistics.median(found):.{digits}f} ({min(found):.{digits}f} to {max(found):.{digits}f}; {len(found)})" if found else ""


def ratios(ours: dict[int, float], theirs: dict[int, float]) -> list[float]:
    """Ours to theirs in each round that has both."""
    return [ours[number] / theirs[number] for number in sorted(ours.keys() & theirs.keys())]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)) + "\n"


def machine() -> str:
    """The processor, as Linux names it, what it can do that matters here, and today's date."""
    facts: dict[str, str] = {}
    if Path("/proc/cpuinfo").exists():
        facts = {key.strip(): value.strip() for key, _, value in (s.partition(":") for s in Path("/proc/cpuinfo").read_text().splitlines())}
    flags = [name for name in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8") if name in facts.get("flags", "").split()]
    family = f"family {facts['cpu family']} model {facts['model']}, " if "cpu family" in facts else ""
    return f"{facts.get('model name', platform.machine())}, {family}{' '.join(flags)}; {date.today().isoformat()}"
