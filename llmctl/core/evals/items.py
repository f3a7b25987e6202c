"""Rows of a data set turned into prompts and answers. Knows tasks, templates and JSON lines; knows no model and no tokenizer."""

import gzip
import hashlib
import random
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmctl.core.errors import InputError, NotFoundError, UsageError
from llmctl.core.evals.task import Task
from llmctl.core.files import parse_json
from llmctl.core.tokenizer.template import ChatTemplate

_MAX_LINE_BYTES = 16 << 20


@dataclass(frozen=True)
class Row:
    """One row of a data set: its number from 0, its line in the file from 1, its fields."""

    index: int
    line: int
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class DataSet:
    """The rows of a file, and what identifies them. `sha256` covers the uncompressed bytes, labels included."""

    path: Path
    sha256: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Item:
    """One question: the full prompt, and the continuations to score, each with its delimiter in front."""

    index: int
    line: int
    prompt: str
    texts: tuple[str, ...]
    """The choices' (or the target's) texts alone: acc_norm divides by their lengths."""
    continuations: tuple[str, ...]
    gold: int


def find_file(names: Sequence[str], folder: Path, *, task: Task) -> Path:
    """The first of `names` that is in `folder`. Raises NotFoundError that names them."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise NotFoundError(f"task {task.name}: {folder} holds no {' or '.join(names)}; give the folder of the task's data with --data DIR")


def load_rows(names: Sequence[str], folder: Path, *, task: Task, labels: str | None) -> DataSet:
    """Read a data set whole. Raises NotFoundError, or InputError with file and line; an empty file is an error."""
    path = find_file(names, folder, task=task)
    digest = hashlib.sha256()
    rows: list[Row] = []
    for line_number, line in _lines(path, digest):
        fields = parse_json(line, where=f"{path}:{line_number}")
        if not isinstance(fields, dict):
            raise InputError(f"{path}:{line_number}: a JSON object is wanted, a {type(fields).__name__} was found")
        rows.append(Row(len(rows), line_number, fields))
    if not rows:
        raise InputError(f"{path}: no rows; a score of nothing means nothing")
    if labels is not None:
        label_path = find_file([labels], folder, task=task)
        values = [line.decode("utf-8", "replace").strip() for _, line in _lines(label_path, digest)]
        if len(values) != len(rows):
            raise InputError(f"{label_path}: {len(values):,} labels for the {len(rows):,} rows of {path}")
        rows = [Row(row.index, row.line, {**row.fields, "label": value}) for row, value in zip(rows, values, strict=True)]
    return DataSet(path, digest.hexdigest(), tuple(rows))


def _lines(path: Path, digest: Any) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, numbered from 1, and all bytes into `digest`."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            number = 0
            while line := file.readline(_MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > _MAX_LINE_BYTES:
                    raise InputError(f"{path}:{number}: a line of more than {_MAX_LINE_BYTES:,} bytes")
                digest.update(line)
                if line.strip():
                    yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: the gzip stream is cut or corrupt ({error})") from error
    except OSError as error:
        raise InputError(f"{path}: cannot read: {error.strerror or error}") from error


class Renderer:
    """Makes items from rows, with templates in a sandbox that bounds time and size. One for each run of a task.

    `num_fewshot` solved examples come before each question. They are drawn without replacement from `examples` by a
    generator seeded with (seed, task name, row number), never the question's own row, so an item's prompt does not
    depend on --limit or on the other items.
    """

    def __init__(self, task: Task, data: DataSet, *, num_fewshot: int, seed: int, examples: DataSet | None = None) -> None:
        self._task = task
        self._data = data
        self._examples = data if examples is None else examples
        self._same_rows = examples is None
        self._num_fewshot = num_fewshot
        self._seed = seed
        sources = {"context": task.context, "gold": task.gold, "target": task.target}
        if isinstance(task.choices, tuple):
            sources |= {f"choices[{index}]": source for index, source in enumerate(task.choices)}
        self._templates = {
            key: ChatTemplate(source, what=f"template {key} of {task.path}", strict=True)
            for key, source in sources.items()
            if source is not None
        }
        spare = len(self._examples.rows) - (1 if self._same_rows else 0)
        if num_fewshot > spare:
            raise UsageError(f"--num-fewshot {num_fewshot}: {self._examples.path} has only {spare:,} examples to draw from")

    def item(self, row: Row) -> Item:
        """The question of one row. Raises InputError that names file, line and field."""
        question, texts, gold = self._question(row, self._data)
        parts = [self._example(shot) for shot in self._shots(row)] + [question]
        prompt = self._task.description + self._task.fewshot_delimiter.join(parts)
        delimiter = self._task.target_delimiter
        return Item(row.index, row.line, prompt, texts, tuple(delimiter + text for text in texts), gold)

    def _shots(self, row: Row) -> list[Row]:
        if self._num_fewshot == 0:
            return []
        rows = self._examples.rows
        draw = random.Random(f"{self._seed}:{self._task.name}:{row.index}")
        picked = draw.sample(range(len(rows)), self._num_fewshot + (1 if self._same_rows else 0))
        others = [index for index in picked if not (self._same_rows and index == row.index)]
        return [rows[index] for index in others[: self._num_fewshot]]

    def _example(self, row: Row) -> str:
        question, texts, gold = self._question(row, self._examples)
        return question + self._task.target_delimiter + texts[gold]

    def _question(self, row: Row, data: DataSet) -> tuple[str, tuple[str, ...], int]:
        where = f"{data.path}:{row.line}"
        task = self._task
        context = task.clean(self._render("context", row, where))
        if task.kind == "continuation":
            texts: tuple[str, ...] = (task.clean(self._render("target", row, where)),)
            gold = 0
        else:
            texts = tuple(task.clean(text) for text in self._choices(row, where))
            gold = self._gold(self._render("gold", row, where).strip(), texts, where)
        for number, text in enumerate(texts):
            if not text:
                what = "the target" if task.kind == "continuation" else f"choice {number}"
                raise InputError(f"{where}: {what} is empty; nothing can be scored")
        return context, texts, gold

    def _choices(self, row: Row, where: str) -> list[str]:
        choices = self._task.choices
        if isinstance(choices, tuple):
            return [self._render(f"choices[{index}]", row, where) for index in range(len(choices))]
        value = row.fields.get(choices or "")
        if not isinstance(value, list) or len(value) < 2 or not all(isinstance(text, str) for text in value):
            raise InputError(f"{where}: the field {choices!r} must be a list of at least two texts (task {self._task.path})")
        if any("\ud800" <= character <= "\udfff" for text in value for character in text):
            raise InputError(f"{where}: half a surrogate pair in {choices!r}; that is not text")
        return value

    def _gold(self, text: str, texts: tuple[str, ...], where: str) -> int:
        if self._task.gold_is == "text":
            if self._task.clean(text) not in texts:
                raise InputError(f"{where}: the right answer {text!r} is not among the choices")
            return texts.index(self._task.clean(text))
        if not text.isascii() or not text.isdigit() or int(text) >= len(texts):
            raise InputError(f"{where}: the label {text!r} is not an index from 0 to {len(texts) - 1}")
        return int(text)

    def _render(self, key: str, row: Row, where: str) -> str:
        try:
            text = self._templates[key].render(row.fields)[0]
            text.encode("utf-8")
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        except UnicodeEncodeError as error:
            raise InputError(f"{where}: half a surrogate pair in {key}; that is not text") from error
        return text
