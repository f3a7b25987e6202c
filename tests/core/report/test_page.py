"""The page: whole HTML that asks nobody for anything, and shows what the runs hold."""

from html.parser import HTMLParser
from pathlib import Path

import pytest

from llmctl.core.report.page import labels, render
from llmctl.core.report.record import read_run
from tests.core.report.runs import make_run

VOID = {"meta", "input", "br", "line", "rect", "circle", "polyline"}


class Reader(HTMLParser):
    """Checks nesting, collects text and addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.addresses: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        self.addresses += [value or "" for key, value in attrs if key in ("src", "href", "action", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


def test_the_page_shows_the_runs_and_needs_nothing_else(tmp_path: Path) -> None:
    runs = [
        read_run(make_run(tmp_path / "a", losses=[5.0, 4.0, 3.5], settings={"seed": 1}, sample="a fox <b>ran</b>")),
        read_run(make_run(tmp_path / "b", losses=[6.0, 5.0], settings={"seed": 2})),
    ]
    page = render(runs)
    reader = read(page)
    text = " ".join(" ".join(reader.text).split())
    assert reader.addresses == []
    assert "url(http" not in page
    assert "@import" not in page
    assert reader.scripts == 1
    for shown in ("3.5000", "5.0000", "1.2500", "a fox <b>ran</b>", "Settings that differ", "seed", "300", "Energy was not measured"):
        assert shown in text


def test_hostile_samples_and_names_stay_text(tmp_path: Path) -> None:
    evil = "</pre><script>alert(1)</script>"
    folder = make_run(tmp_path / "<img src=x onerror=alert(1)>", losses=[5.0, 4.0], settings={"sample_prompt": evil}, sample=evil)
    reader = read(render([read_run(folder)]))
    assert reader.scripts == 1
    assert evil in "".join(reader.text)
    assert reader.addresses == []


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    paths = [tmp_path / "x" / "run", tmp_path / "y" / "run"]
    assert labels(paths) == ["x/run", "y/run"]
    assert labels([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
    assert len(set(labels([tmp_path / "a", tmp_path / "a"]))) == 2


def test_too_many_runs_are_refused(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "a", losses=[1.0]))
    for runs in ([], [run] * 9):
        with pytest.raises(ValueError, match="1 to 8"):
            render(runs)
