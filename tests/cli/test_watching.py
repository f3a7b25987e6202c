"""Watching a run: the report command, the live panel."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from llmctl.cli.main import run
from llmctl.cli.shell import Shell
from llmctl.cli.training_panel import LivePanel, sparkline
from tests.core.report.runs import make_run
from tests.core.train.test_trackers import events


def test_a_report_is_written_and_its_name_is_the_result(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first, second = make_run(tmp_path / "a", losses=[3.0, 2.0]), make_run(tmp_path / "b", losses=[4.0])
    assert run(["pretrain", "--report", str(first), "--report", str(second)]) == 0
    out, err = capfd.readouterr()
    assert (out, err) == (f"{first}/report.html\n", "")
    assert "2 runs" in (first / "report.html").read_text()
    assert run(["pretrain", "--report", str(first)]) == 0  # a report of before is replaced
    assert "1 run." in (first / "report.html").read_text()


@pytest.mark.parametrize(
    ("name", "arguments", "code", "said"),
    [
        ("no run", ["--report", "nothing"], 10, "no such run folder"),
        ("nine runs", ["--report", "a"] * 9, 2, "at most 8"),
        ("a file of somebody's", ["--report", "a", "--report-file", "mine.txt"], 2, "is no report of llmctl"),
        ("a folder", ["--report", "a", "--report-file", "a"], 2, "is a folder"),
        ("no folder to write in", ["--report", "a", "--report-file", "x/y.html"], 2, "x"),
        ("nothing to report on", ["--report-file", "r.html"], 2, "--report"),
        ("no step", ["--report", "empty"], 4, "no step yet"),
    ],
)
def test_what_cannot_be_reported_is_refused(
    name: str,
    arguments: list[str],
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "a", losses=[1.0])
    make_run(tmp_path / "empty", losses=[])
    (tmp_path / "mine.txt").write_text("precious")
    assert run(["pretrain", *arguments]) == code, name
    out, err = capfd.readouterr()
    assert out == ""
    assert said in err
    assert err.startswith("llmctl: error: ")
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_a_sparkline_is_high_where_the_numbers_are() -> None:
    assert sparkline([3.0, 2.0, 1.0]) == "█▅▁"
    assert sparkline([1.0, float("nan"), 1.0]) == "▁▁"
    assert sparkline([]) == ""
    assert len(sparkline([float(n) for n in range(1000)], 20)) == 20


@pytest.mark.parametrize("width", [1, 20, 80, 200])
def test_the_panel_fits_any_terminal(width: int, tmp_path: Path) -> None:
    panel = LivePanel(Shell())
    for event in events(tmp_path):
        panel.show(event)
    shown = io.StringIO()
    Console(file=shown, width=width).print(panel.panel())
    assert all(len(line.rstrip("\n")) <= max(width, 1) for line in shown.getvalue().splitlines())
    if width == 200:
        for text in ("loss", "4.0000", "2.5000, 1.2500 bits/byte at step 6", "Es war <einmal>"):
            assert text in shown.getvalue()
