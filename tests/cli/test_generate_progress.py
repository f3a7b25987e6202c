"""How far a batch is, told on stderr; and that a job of many rows needs no more memory than one of few."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from llmctl.cli.generate_batch import Progress
from llmctl.cli.shell import Shell
from tests.cli.alphabet_model import make_alphabet_model

ROOT = Path(__file__).parents[2]


def test_off_a_terminal_a_line_comes_every_half_minute(capfd: pytest.CaptureFixture[str]) -> None:
    now = [100.0]
    with Progress(Shell(), 1000, 2, 200, now_s=lambda: now[0]) as progress:
        for _ in range(700):
            now[0] += 0.125
            progress.row(20, 1)
    told = capfd.readouterr().err.splitlines()
    # 240 of 1,800 rows in 30 s: the 1,560 that are left take 195 s
    assert told == [
        "440 of 2,000 rows, 160.0 tokens/s, about 0:03:15 left",
        "680 of 2,000 rows, 160.0 tokens/s, about 0:02:45 left",
    ]
    with Progress(Shell(), None, 1, 0, now_s=lambda: now[0]) as progress:
        now[0] += 40
        progress.row(80, 1)
    assert capfd.readouterr().err == "1 rows, 2.0 tokens/s\n"
    with Progress(Shell(quiet=True), 10, 1, 0, now_s=lambda: now[0]) as progress:
        now[0] += 40
        progress.row(80, 1)
    assert capfd.readouterr().err == ""


@pytest.mark.slow
def test_a_hundred_thousand_rows_need_hardly_more_memory_than_a_thousand(tmp_path: Path) -> None:
    make_alphabet_model(tmp_path / "model")
    peaks = []
    for count in (1_000, 120_000):
        file, out = tmp_path / f"{count}.jsonl", tmp_path / f"{count}.out.jsonl"
        with file.open("w") as rows:
            rows.writelines(f'{{"id": "row {number}", "prompt": "a", "text_of_row": "{"x" * 1000}"}}\n' for number in range(count))
        command = [sys.executable, "-m", "llmctl", "generate", "-m", tmp_path / "model", "-t", "0", "-n", "1", "-b", "64", "--threads", "1"]
        job = subprocess.run([*command, "-i", file, "-o", out, "--stats"], cwd=ROOT, capture_output=True, text=True)
        assert job.returncode == 0, job.stderr
        with out.open() as results:
            assert sum(1 for _ in results) == count
        found = re.search(r"peak memory: ([\d,]+) MB", job.stderr)
        assert found is not None
        peaks.append(int(found[1].replace(",", "")))
    # 119,000 rows of over a kilobyte, of which nothing but their ids may stay
    assert peaks[1] - peaks[0] < 40, peaks
