#!/usr/bin/env python3
"""Rebuild the storyteller's corpus of public-domain children's stories from Project Gutenberg.

    python recipes/fetch_stories.py corpus/

writes corpus/stories.jsonl.gz and corpus/stories_heldout.jsonl.gz: one JSON object a line with title, section, author,
gutenberg_id and text. The books are listed in stories_books.tsv beside this file. Standard library only.

Each book is fetched once, with a pause between requests, and kept in corpus/cache/; run the command again after a broken
connection and it goes on. Please keep the pause: Gutenberg is run by volunteers, and robots are asked to be slow.

What may differ from the corpus that the built-in model was trained on: that one was made from older copies of the same
books, by another script. Gutenberg corrects its texts now and then, and the rules below find headings, verse and front
matter by their looks, so that some sections begin or end elsewhere, and a few prefaces, notes and title pages are kept or
dropped otherwise. Expect the same books, about 44 MB and some 5,000 sections, and a model of the same kind, but neither the
same bytes nor the same scores. The rules for what is left out are the same: books whose header says COPYRIGHTED or another
language than English, licence text and credits, illustrations, footnotes, contents, prefaces, paragraphs with racial
slurs, and sections that mostly repeat an earlier one (the held-out books come first, which keeps them out of training).
"""

import argparse
import gzip
import hashlib
import json
import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

URL = "https://www.gutenberg.org/cache/epub/{number}/pg{number}.txt"
USER_AGENT = "llmctl-fetch-stories/1.0 (rebuilds a small corpus once; stdlib urllib)"
BOOKS_FILE = Path(__file__).with_name("stories_books.tsv")

MIN_SECTION_CHARS = 180
LONG_PARAGRAPH_CHARS = 100
MAX_REPEATED = 0.3
"""A section is dropped when more than this part of its long paragraphs stood in an earlier one."""


@dataclass(frozen=True)
class Book:
    """One line of stories_books.tsv. `split` is "train" or "heldout"."""

    split: str
    number: int
    title: str
    author: str


@dataclass(frozen=True)
class Section:
    """One record of the corpus."""

    title: str
    section: str
    author: str
    gutenberg_id: int
    text: str


class NotUsable(Exception):
    """A book that must not or cannot be used; the message says why."""


# ---- From the file of a book to its text

_START = re.compile(
    r"^(?:\*\*\* ?START OF (?:THE|THIS) PROJECT GUTENBERG.{0,300}?\*\*\*|\*END[* ]*THE SMALL PRINT[^\n]*)[ \t]*$",
    re.MULTILINE | re.DOTALL | re.IGNORECASE,
)
_END = re.compile(r"^(?:\*\*\* ?END OF|End of (?:the |this )?Project Gutenberg)", re.MULTILINE | re.IGNORECASE)


def body_of(raw: str) -> str:
    """The text between Gutenberg's header and footer. Raises NotUsable for a copyrighted or not English book."""
    text = raw.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    start = _START.search(text)
    if start is None:
        raise NotUsable("no START OF THE PROJECT GUTENBERG EBOOK line; is it a book?")
    header = text[: start.start()]
    if re.search(r"\bCOPYRIGHTED\b", header):
        raise NotUsable("its header says COPYRIGHTED")
    language = re.search(r"^Language:\s*(.+)$", header, re.MULTILINE)
    if language is not None and language[1].strip() != "English":
        raise NotUsable(f"its language is {language[1].strip()}")
    text = text[start.end() :]
    end = _END.search(text)
    return text[: end.start()] if end is not None else text


_ASCII: dict[str, str | int | None] = {
    "\u201c": '"', "\u201d": '"', "\u201e": '"', "\u2018": "'", "\u2019": "'", "\u201a": "'", "\u201b": "'", "\u2032": "'",
    "\u2014": "--", "\u2015": "--", "\u2013": "-", "\u2010": "-", "\u2011": "-", "\u2026": "...", "\u00a0": " ", "\u00ad": "",
    "\u2003": " ", "\u2009": " ", "\u00ab": '"', "\u00bb": '"', "\u0153": "oe", "\u00e6": "ae", "\u0152": "OE", "\u00c6": "AE",
}  # fmt: skip


def plain(text: str) -> str:
    """ASCII quotes and dashes; no illustration tags, footnotes and their marks, italic or bold marks, or page numbers."""
    text = text.translate(str.maketrans(_ASCII))
    for name in ("Illustration", "Footnote", "Transcriber", "Editor", "Frontispiece", "Music", "Sidenote"):
        text = re.sub(rf"\[{name}[^\[\]]*(?:\[[^\[\]]*\][^\[\]]*)*\]", "", text, flags=re.IGNORECASE)
    text = re.sub(r"\[(?:\d+|[A-Z*])\]|\{\d+\}|\[Pg\.? ?\d+\]", "", text)
    text = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", "", text)
    return re.sub(r"(?m)(?<!\S)([=*~+])([^\s=*~+][^=*~+\n]*)\1(?!\S)", r"\2", text)


# ---- From the text to sections


@dataclass(frozen=True)
class Block:
    """Lines without a blank one between them, and the number of blank lines before."""

    gap: int
    lines: tuple[str, ...]


def blocks_of(text: str) -> list[Block]:
    """The paragraphs, headings and verses of a text."""
    blocks: list[Block] = []
    lines: list[str] = []
    gap = blank = 0
    for line in [*text.split("\n"), ""]:
        line = line.rstrip()
        if line:
            if not lines:
                gap, blank = blank, 0
            lines.append(line)
            continue
        if lines:
            blocks.append(Block(gap, tuple(lines)))
            lines = []
        blank += 1
    return blocks


_NUMBERED = re.compile(
    r"(?:(?:CHAPTER|BOOK|PART|STORY|TALE|LEGEND|SECTION|VOLUME|EVENING|NIGHT)\b|[IVXLC]+\b\.?(?:\s|$|-)|\d+\.?(?:\s|$))", re.IGNORECASE
)
_ONLY_NUMBER = re.compile(r"(?:(?:CHAPTER|BOOK|PART|STORY|TALE|LEGEND)\s+)?(?:[IVXLC]+|\d+|(?:the )?[A-Z]+)\.?:?", re.IGNORECASE)
_ORNAMENT = re.compile(r"[\s*.\-_~+=#o]*")
_PAGE_AT_END = re.compile(r"(?:\s{2,}|\.{2,}\s*|\s\.\s)(?:page\s+)?(?:\d+|[ivxl]+)$", re.IGNORECASE)
_LEFT_OUT = re.compile(
    r"(?:(?:table of |the )?contents|(?:list of )?(?:illustrations|.{0,12}plates)|facing page|by the same author"
    r"|books? by .*|other books.*|advertisements?|the end|finis"
    r"|(?:(?:author|translator|editor|publisher|transcriber)'?s? )?(?:preface|foreword|introduction|introductory(?: note)?|notes?)"
    r"|notes and references|footnotes?|dedication|appendix|index|glossary|bibliography|to the reader|a word to .*|(?:the )?life of .*)\W*",
    re.IGNORECASE,
)
_SMALL_WORDS = frozenset(
    re.findall(
        r"\w+", "a an and as at but by de for from how in into la le nor of on or so than that the to up upon was were when who with"
    )
)


def is_heading(block: Block) -> bool:
    """Whether a block looks like the title of a chapter or a tale, or like its number."""
    text = " ".join(line.strip() for line in block.lines)
    letters = [c for c in text if c.isalpha()]
    if len(block.lines) > 4 or len(text) > 110 or not letters or sum(bool(_PAGE_AT_END.search(line)) for line in block.lines):
        return False
    if text[0] in "\"'(" and text[-1] in "\"').!?" and not text.isupper():
        return False
    if text[-1] in ",;:" and not _ONLY_NUMBER.fullmatch(text):
        return False
    if _NUMBERED.match(text) and (block.gap >= 2 or text.isupper()) and len(text) <= 90:
        return not re.match(r"I [a-z]", text)
    if text.isupper():
        return block.gap >= 2 or (len(block.lines) == 1 and len(text) > 3 and text[-1] not in '!?"')
    words = [word for word in re.findall(r"[A-Za-z']+", text) if word not in _SMALL_WORDS]
    titled = sum(word[:1].isupper() or word[0] == "'" for word in words)
    return block.gap >= 2 and bool(words) and titled >= 0.75 * len(words) and (text[-1] not in '.!?"' or block.gap >= 3)


def _names_number(before: Block, block: Block) -> bool:
    """Whether a block in capitals stands under a bare number: IV, and then WHO WAS THE SINNER?"""
    return len(block.lines) == 1 and block.lines[0].isupper() and _ONLY_NUMBER.fullmatch(" ".join(before.lines).strip()) is not None


def heading_text(run: list[Block]) -> str:
    """What a run of heading blocks says: the last title, with its number or first half before it."""
    parts = [" ".join(" ".join(line.split()) for line in block.lines) for block in run]
    last = parts[-1]
    if len(parts) > 1 and (_ONLY_NUMBER.fullmatch(last) or _ONLY_NUMBER.fullmatch(parts[-2]) or run[-1].gap <= 1):
        return f"{parts[-2]} - {last}"
    return last


def sections_of(text: str) -> Iterator[tuple[str, str]]:
    """(heading, text) of each chapter or tale, front and back matter left out. Paragraphs are unwrapped, verse is not."""
    heading, run, paragraphs = "", [], []  # type: ignore[var-annotated]
    started = False
    for block in [*blocks_of(text), None]:
        if block is not None and all(_ORNAMENT.fullmatch(line) for line in block.lines):
            continue
        if block is None or is_heading(block) or (run and _names_number(run[-1], block)):
            if paragraphs and started and not any(map(_LEFT_OUT.fullmatch, heading.split(" - "))):
                yield heading, lower_opening("\n\n".join(paragraphs))
            if paragraphs:
                run = []
            paragraphs = []
            if block is not None:
                run.append(block)
                started = True
            continue
        if run:
            # A title page or a list of contents without page numbers is a run of headings: the last ones are the tale's.
            heading, run = heading_text(run), []
        if not _is_list(block):
            paragraphs.append(unwrap(block))


def _is_list(block: Block) -> bool:
    """Whether a block is (part of) a table of contents: most of its lines end in a page number."""
    return 2 * sum(bool(_PAGE_AT_END.search(line)) for line in block.lines) > len(block.lines)


def unwrap(block: Block) -> str:
    """The block as one line, or as its lines where it is verse, a letter or an inscription."""
    lines = [" ".join(line.split()) for line in block.lines]
    indented = all(line.startswith("  ") for line in block.lines)
    capitals = all(re.match(r"['\"(-]*[A-Z]", line) for line in lines) and max(map(len, lines)) <= 58
    verse = len(lines) > 1 and (indented or capitals)
    return ("\n" if verse else " ").join(lines)


def lower_opening(text: str) -> str:
    """`text` without the printer's capitals of its first words: "A BAT who fell" begins "A Bat who fell" if there is a Bat in it."""
    opening = re.match(r"[\"']*(?:[A-Z][A-Z']*,?[ \n]+)*[A-Z][A-Z']+(?=[\s,])", text)
    if opening is None or not re.search(r"[A-Z]{2}", opening[0]):
        return text

    def lowered(word: re.Match[str]) -> str:
        proper = word[0].capitalize()
        first = not re.search(r"[A-Z]", opening[0][: word.start()])
        return proper if first or word[0] == "I" or re.search(rf"\b{re.escape(proper)}\b", text[opening.end() :]) else word[0].lower()

    return re.sub(r"[A-Z][A-Z']*", lowered, opening[0]) + text[opening.end() :]


# ---- What is left out


# Racial slurs, as the first 16 hex digits of the sha256 of the word, so that nobody has to read them here.
_SLURS = frozenset(
    re.findall(
        r"\w+",
        """
        11ee63a73ffec0f0 120f6e5b4ea32f65 268651b3ece98010 358e01df75c781bd 448b303c89bef071 49764bce30ef5e2f
        565ed74643e0189a 5b3ae48be122f7ed 6122fdf4ae1474fb 6939937b0ac62334 701033ae26411908 77ccd22350728f06
        7dc7079a7ceee46e 9d57436661e1dce7 9ee4d2748732a9bb a7bf072c97a0779f ad412adb493df95a b3cec2f6ece2cef2
        bb87adf8aa783887 be00f1af522eaa99 c1b4ed05397df5ee c3de533e9b7fe63b ce20df7259154252 eea2991640d1a5ca
        """,
    )
)


def has_slur(paragraph: str) -> bool:
    """Whether one of the words that we leave out stands in a paragraph."""
    return any(hashlib.sha256(word.encode()).hexdigest()[:16] in _SLURS for word in set(re.findall(r"[a-z]+", paragraph.lower())))


class Repeats:
    """Remembers the long paragraphs seen so far."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def mostly_repeated(self, text: str) -> bool:
        """Whether a section mostly repeats earlier ones. If not, its own paragraphs count as seen from now on."""
        keys = [
            hashlib.sha256(re.sub(r"\W+", "", paragraph.lower()).encode()).digest()[:12]
            for paragraph in text.split("\n\n")
            if len(paragraph) >= LONG_PARAGRAPH_CHARS
        ]
        if keys and sum(key in self._seen for key in keys) > MAX_REPEATED * len(keys):
            return True
        self._seen.update(keys)
        return False


def sections_of_book(book: Book, raw: str, repeats: Repeats) -> list[Section]:
    """The records of one book. Raises NotUsable."""
    found = []
    body = plain(body_of(raw))
    whole = "\n\n".join(unwrap(block) for block in blocks_of(body))
    for heading, text in list(sections_of(body)) or [(book.title, whole)]:
        kept = "\n\n".join(p for p in text.split("\n\n") if not has_slur(p) and "gutenberg" not in p.lower())
        if len(kept) >= MIN_SECTION_CHARS and not repeats.mostly_repeated(kept):
            found.append(Section(book.title, heading, book.author, book.number, kept))
    if not found:
        raise NotUsable("no sections were found in it")
    return found


# ---- Fetching


def read_books(path: Path) -> list[Book]:
    """The books of a .tsv file with the columns split, gutenberg_id, title, author; held-out ones first."""
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[1:] if line]
    books = [Book(split, int(number), title, author) for split, number, title, author in rows]
    return sorted(books, key=lambda book: book.split != "heldout")


def get(url: str) -> bytes:
    """One HTTP GET. Raises OSError (urllib's errors are such)."""
    request = urllib.request.Request(url, headers={"User-Agent": USER_AGENT})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return bytes(answer.read())


def fetch(
    number: int,
    cache: Path,
    *,
    delay_s: float,
    retries: int,
    offline: bool,
    get: Callable[[str], bytes] = get,
    sleep: Callable[[float], None] = time.sleep,
) -> str:
    """The file of a book as text, from the cache or the network. Waits `delay_s` after each request, longer after each failure."""
    path = cache / f"pg{number}.txt"
    if not path.exists():
        if offline:
            raise NotUsable(f"{path} is not there, and --offline was given")
        for attempt in range(retries + 1):
            try:
                write_whole(path, get(URL.format(number=number)))
                break
            except OSError as error:
                gone = isinstance(error, urllib.error.HTTPError) and error.code in (404, 410)
                if gone or attempt == retries:
                    raise NotUsable(f"cannot fetch {URL.format(number=number)}: {error}") from error
                sleep(delay_s * 2 ** (attempt + 1))
        sleep(delay_s)
    data = path.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    temporary = path.with_name(f".tmp-{path.name}")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def packed(sections: list[Section]) -> bytes:
    """The records as gzipped JSON lines, the same bytes for the same records."""
    lines = "".join(json.dumps(asdict(section), ensure_ascii=False) + "\n" for section in sections)
    return gzip.compress(lines.encode("utf-8"), mtime=0)


def main() -> int:
    """The command line. Returns 0, or 1 when books are missing from the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip(), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", type=Path, metavar="DIR", help="folder to write into; made if it is not there")
    parser.add_argument("--books", type=Path, default=BOOKS_FILE, metavar="FILE", help="list of books (default: %(default)s)")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="where fetched files are kept (default: DIR/cache)")
    parser.add_argument("--delay", type=float, default=3.0, metavar="S", help="seconds between requests (default: 3)")
    parser.add_argument("--retries", type=int, default=4, metavar="N", help="tries again after a failure (default: 4)")
    parser.add_argument("--offline", action="store_true", help="use what is in the cache, fetch nothing")
    arguments = parser.parse_args()
    cache = arguments.cache or arguments.out_dir / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    arguments.out_dir.mkdir(parents=True, exist_ok=True)

    results: dict[str, list[Section]] = {"heldout": [], "train": []}
    missing = []
    repeats = Repeats()
    for book in read_books(arguments.books):
        try:
            raw = fetch(book.number, cache, delay_s=arguments.delay, retries=arguments.retries, offline=arguments.offline)
            sections = sections_of_book(book, raw, repeats)
        except NotUsable as error:
            missing.append(book)
            print(f"{book.number} {book.title}: left out: {error}", file=sys.stderr)
            continue
        results[book.split] += sections
        print(f"{book.number} {book.title}: {len(sections)} sections", file=sys.stderr)
    for split, name in (("train", "stories.jsonl.gz"), ("heldout", "stories_heldout.jsonl.gz")):
        write_whole(arguments.out_dir / name, packed(results[split]))
        num_bytes = sum(len(section.text.encode("utf-8")) for section in results[split])
        print(f"{arguments.out_dir / name}: {len(results[split])} sections, {num_bytes:,} bytes of text", file=sys.stderr)
    if missing:
        print(f"{len(missing)} books are missing, see above; run the same command again to try them once more", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
