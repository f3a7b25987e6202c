"""The recipe that rebuilds the corpus: on a made-up book, with a made-up network."""

import gzip
import importlib.util
import json
import sys
import urllib.error
from email.message import Message
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent.parent


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fetch_stories", ROOT / "recipes" / "fetch_stories.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fetch_stories"] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


recipe = load()

FOX = """\
The fox went into the wood one morning, and he met a hare who was
counting the mushrooms, and he asked her how many there were in all
of the wood, and whether they were good to eat."""
HARE = """\
\u201cThere are nine,\u201d said the hare\u2014for she was honest\u2014\u201cand eight of
them are mine.\u201d The fox looked at the _ninth_,[1] and it was red with
white spots, and he said that she might have it too."""
VERSE = "  Nine in the morning,\n  Eight for my own,\n  One for the fox\n  Who is dining alone."

RAW = f"""\ufeffThe Project Gutenberg eBook of The Fox and the Hare

Title: The Fox and the Hare

Language: English

*** START OF THE PROJECT GUTENBERG EBOOK THE FOX AND THE HARE ***

Produced by nobody




THE FOX AND THE HARE

By A. N. Author



CONTENTS


     I. THE MUSHROOMS                                   1

     II. THE WINTER                                     9



PREFACE

These are old tales, and they are told here as my grandmother told them to
me, with nothing put in and nothing left out, except the noises, which
cannot be printed, and which were the best part of all.



I

THE MUSHROOMS


[Illustration: The fox with his hat
in his hand]

{FOX}

{HARE}

{VERSE}

       *       *       *       *       *

And that was the end of the summer.

[Footnote 1: A mushroom [of a kind].]



II

WHO WAS COLD?


IN THE WINTER the Fox was cold. In the winter the hare was cold. They looked at
one another over the snow for a long time, and neither of them said a word
about mushrooms, though both of them were thinking of nothing else at all.


THE END



*** END OF THE PROJECT GUTENBERG EBOOK THE FOX AND THE HARE ***

Small print.
""".replace("\n", "\r\n")

BOOK = recipe.Book("train", 7, "The Fox and the Hare", "A. N. Author")


def sections(raw: str = RAW) -> list[tuple[str, str]]:
    return [(s.section, s.text) for s in recipe.sections_of_book(BOOK, raw, recipe.Repeats())]


def test_a_book_becomes_its_tales() -> None:
    found = sections()
    assert [heading for heading, _ in found] == ["I - THE MUSHROOMS", "II - WHO WAS COLD?"]
    first, second = (text for _, text in found)
    paragraphs = first.split("\n\n")
    assert paragraphs[0] == FOX.replace("\n", " ")
    assert paragraphs[1].startswith(
        '"There are nine," said the hare--for she was honest--"and eight of them are mine." The fox looked at the ninth, and'
    )
    assert paragraphs[2] == VERSE.replace("  ", "")
    assert paragraphs[3] == "And that was the end of the summer."
    assert len(paragraphs) == 4
    assert second.startswith("In the winter the Fox was cold. In the winter the hare was cold. They looked at one another")
    assert second.endswith("nothing else at all.")


def test_nothing_of_gutenberg_stays() -> None:
    for _, text in sections():
        for word in ("gutenberg", "Produced", "Illustration", "Footnote", "grandmother", "CONTENTS", "[", "_", "\r"):
            assert word not in text


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("Title: The", "This is a COPYRIGHTED book\r\n\r\nTitle: The", "COPYRIGHTED"),
        ("Language: English", "Language: German", "German"),
        ("*** START OF", "START OF", "START OF"),
    ],
)
def test_books_that_must_not_be_used_are_refused(old: str, new: str, why: str) -> None:
    with pytest.raises(recipe.NotUsable, match=why):
        sections(RAW.replace(old, new))


def test_a_book_without_headings_is_one_section() -> None:
    raw = f"*** START OF THIS PROJECT GUTENBERG EBOOK X ***\n\n{FOX}\n\n{HARE}\n\n*** END OF THIS PROJECT GUTENBERG EBOOK X ***"
    assert [heading for heading, _ in sections(raw)] == [BOOK.title]


def test_a_section_that_mostly_repeats_an_earlier_one_is_dropped() -> None:
    repeats = recipe.Repeats()
    assert len(recipe.sections_of_book(BOOK, RAW, repeats)) == 2
    with pytest.raises(recipe.NotUsable):
        recipe.sections_of_book(BOOK, RAW.upper().replace("\u201c", '"'), repeats)


def test_verse_keeps_its_lines_and_prose_does_not() -> None:
    assert recipe.unwrap(recipe.Block(1, ("a b", "c d"))) == "a b c d"
    assert recipe.unwrap(recipe.Block(1, ("Roses are red", "Violets too"))) == "Roses are red\nViolets too"


@pytest.mark.parametrize(
    ("gap", "lines", "heading"),
    [
        (4, ["CHAPTER I. Down the Rabbit-Hole"], True),
        (1, ["THE BRONZE RING"], True),
        (4, ["The Wolf and the Crane"], True),
        (1, ["The Wolf and the Crane"], False),
        (2, ["XIV"], True),
        (1, ["I went to the wood and"], False),
        (1, ['"NEVER!"'], False),
        (3, ['"Never again," said the fox.'], False),
        (2, ["He went on, and on, and on"], False),
        (2, ["BUSTER BEAR GOES FISHING          12"], False),
        (1, ["One", "two", "three", "four", "five"], False),
    ],
)
def test_what_a_heading_looks_like(gap: int, lines: list[str], heading: bool) -> None:
    assert recipe.is_heading(recipe.Block(gap, tuple(lines))) == heading


def test_the_list_of_books() -> None:
    books = recipe.read_books(recipe.BOOKS_FILE)
    assert len({book.number for book in books}) == len(books) == 149
    assert [book.split for book in books] == ["heldout"] * 4 + ["train"] * 145


def test_a_broken_connection_is_tried_again_and_a_fetched_book_is_not_fetched_twice(tmp_path: Path) -> None:
    calls, pauses = [], []

    def get(url: str) -> bytes:
        calls.append(url)
        if len(calls) < 3:
            raise urllib.error.URLError("reset")
        return RAW.encode()

    options = {"delay_s": 2.0, "retries": 4, "offline": False, "get": get, "sleep": pauses.append}
    assert recipe.fetch(7, tmp_path, **options) == RAW
    assert recipe.fetch(7, tmp_path, **options) == RAW
    assert calls == ["https://www.gutenberg.org/cache/epub/7/pg7.txt"] * 3
    assert pauses == [4.0, 8.0, 2.0]
    assert [path.name for path in tmp_path.iterdir()] == ["pg7.txt"]


def test_a_book_that_is_gone_is_not_asked_for_again(tmp_path: Path) -> None:
    calls = []

    def get(url: str) -> bytes:
        calls.append(url)
        raise urllib.error.HTTPError(url, 404, "Not Found", Message(), None)

    with pytest.raises(recipe.NotUsable, match="404"):
        recipe.fetch(7, tmp_path, delay_s=0, retries=4, offline=False, get=get, sleep=lambda _: None)
    assert len(calls) == 1


def test_the_whole_recipe_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "books.tsv").write_text(
        "split\tgutenberg_id\ttitle\tauthor\ntrain\t7\tThe Fox and the Hare\tA. N. Author\nheldout\t8\tNone\tX\n"
    )
    cache = tmp_path / "out" / "cache"
    cache.mkdir(parents=True)
    (cache / "pg7.txt").write_bytes(RAW.encode())
    monkeypatch.setattr(sys, "argv", ["fetch_stories.py", str(tmp_path / "out"), "--books", str(tmp_path / "books.tsv"), "--offline"])
    assert recipe.main() == 1
    assert "8 None: left out" in capsys.readouterr().err
    data = (tmp_path / "out" / "stories.jsonl.gz").read_bytes()
    rows = [json.loads(line) for line in gzip.decompress(data).splitlines()]
    assert [row["section"] for row in rows] == ["I - THE MUSHROOMS", "II - WHO WAS COLD?"]
    assert list(rows[0]) == ["title", "section", "author", "gutenberg_id", "text"]
    assert recipe.main() == 1
    assert (tmp_path / "out" / "stories.jsonl.gz").read_bytes() == data
