r"""Tasks: small TOML files that say how rows of a data set become questions. Knows TOML; knows no model and no tokenizer.

    name = "piqa"                          # how results call it
    kind = "multiple_choice"               # or "continuation"
    dataset = ["piqa_valid.jsonl"]         # the first of these that is in the data folder; JSON objects, one a line, .gz too
    labels = "piqa_valid-labels.lst"       # optional: a text file of one label a line, read as the field `label`
    context = "Question: {{ goal }}\nAnswer:"          # jinja2, sandboxed; the names are the row's fields
    choices = ["{{ sol1 }}", "{{ sol2 }}"] # multiple_choice: templates, or the name of a field that holds a list
    gold = "{{ label }}"                   # multiple_choice: the right one's index from 0 (or its text: gold_is = "text")
    target = "{{ word }}"                  # continuation: the one right text
    target_delimiter = " "                 # between context and choice or target
    fewshot_delimiter = "\n\n"             # between the examples of --num-fewshot
    fewshot_dataset = ["train.jsonl"]      # optional: where examples come from; else from other rows of `dataset`
    description = ""                       # before everything, examples too
    strip = true                           # optional: strip the rendered context and choices ...
    replace = [{ pattern = '\[.*?\]', with = "" }]     # ... then replace, in order: `text` literally or `pattern` as a regex
    metrics = ["acc", "acc_norm"]          # multiple_choice: acc, acc_norm, acc_bytes; continuation: acc, perplexity

The words are lm-evaluation-harness's where they mean the same, so a task is ported by copying its templates.
"""

import dataclasses
import difflib
import hashlib
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmctl.core.errors import InputError, NotFoundError, UsageError
from llmctl.core.evals.metrics import METRICS
from llmctl.core.files import safe_relative

BUILT_IN_FOLDER = Path(__file__).parent / "tasks"
KINDS = ("multiple_choice", "continuation")
_RESERVED_KINDS = ("generate",)
_MAX_TASK_BYTES = 1 << 20


@dataclass(frozen=True)
class Replacement:
    """One clean-up step: `pattern` (a compiled regex, or a literal text) is replaced `with_text`."""

    pattern: re.Pattern[str] | str
    with_text: str

    def apply(self, text: str) -> str:
        """`text` with every match replaced."""
        if isinstance(self.pattern, str):
            return text.replace(self.pattern, self.with_text)
        return self.pattern.sub(self.with_text, text)


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task file, checked. See the module's docstring for the meaning of each field.

    A record of another kind (generation, say) adds its own fields with defaults and an entry in METRICS.
    """

    name: str
    kind: str
    dataset: tuple[str, ...]
    context: str
    labels: str | None = None
    choices: str | tuple[str, ...] | None = None
    gold: str | None = None
    gold_is: str = "index"
    target: str | None = None
    target_delimiter: str = " "
    fewshot_delimiter: str = "\n\n"
    fewshot_dataset: tuple[str, ...] = ()
    description: str = ""
    strip: bool = False
    replace: tuple[Replacement, ...] = ()
    metrics: tuple[str, ...]
    path: Path
    """The TOML file; its folder is where the data is looked for when no data folder is given."""
    sha256: str
    """Of the TOML file's bytes."""

    def clean(self, text: str) -> str:
        """`text` after `strip` and `replace`."""
        if self.strip:
            text = text.strip()
        for step in self.replace:
            text = step.apply(text)
        return text


def built_in_tasks() -> list[str]:
    """The names of the tasks that come with the program."""
    return sorted(path.stem for path in BUILT_IN_FOLDER.glob("*.toml"))


def load_task(reference: str) -> Task:
    """A task by built-in name or by the path of a TOML file.

    Raises UsageError for a name that is not built in, NotFoundError for a path that is not there, and InputError that
    names file and key for anything wrong inside.
    """
    if reference.endswith(".toml") or "/" in reference:
        path = Path(reference)
        if not path.is_file():
            raise NotFoundError(f"--tasks {reference}: no such file")
    else:
        path = BUILT_IN_FOLDER / f"{reference}.toml"
        if not re.fullmatch(r"[\w.-]+", reference) or not path.is_file():
            names = built_in_tasks()
            close = difflib.get_close_matches(reference, names, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"the built-in ones are {', '.join(names)}; a path to a .toml works too"
            raise UsageError(f"--tasks {reference}: no such task; {hint}")
    return parse_task(path)


def parse_task(path: Path) -> Task:
    """Read and check one task file. Raises InputError that begins with the path."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot read the task: {error.strerror}") from error
    if not data.strip():
        raise InputError(f"{path}: the task file is empty; it needs at least name, kind, dataset, context and metrics")
    if len(data) > _MAX_TASK_BYTES:
        raise InputError(f"{path}: {len(data):,} bytes, more than the {_MAX_TASK_BYTES:,} that a task file may have")
    try:
        table = tomllib.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}") from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InputError(f"{path}: not valid TOML: {error}") from error
    return _Checker(path, table).task(hashlib.sha256(data).hexdigest())


class _Checker:
    """Takes a task's TOML table apart, key by key, so that every message can name the key."""

    def __init__(self, path: Path, table: dict[str, Any]) -> None:
        self._path = path
        self._table = table

    def fail(self, what: str) -> InputError:
        return InputError(f"{self._path}: {what}")

    def task(self, sha256: str) -> Task:
        known = {field.name for field in dataclasses.fields(Task)} - {"path", "sha256"}
        for key in self._table:
            if key not in known:
                close = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.5)
                hint = f"did you mean {close[0]!r}?" if close else f"the keys are {', '.join(sorted(known))}"
                raise self.fail(f"unknown key {key!r}; {hint}")
        kind = self.text("kind")
        if kind in _RESERVED_KINDS:
            raise self.fail(f"kind {kind!r} is not supported by this version; use {' or '.join(KINDS)}")
        if kind not in KINDS:
            raise self.fail(f"kind {kind!r} is not one of {', '.join(KINDS)}")
        values: dict[str, Any] = {
            "name": self.text("name"),
            "kind": kind,
            "dataset": self.file_names("dataset", needed=True),
            "context": self.text("context", empty=True),
            "replace": self.replacements(),
            "metrics": self.metric_names(kind),
            "fewshot_dataset": self.file_names("fewshot_dataset", needed=False),
        }
        for key in ("target_delimiter", "fewshot_delimiter", "description"):
            if key in self._table:
                values[key] = self.text(key, empty=True)
        if "strip" in self._table:
            values["strip"] = self._table["strip"]
            if not isinstance(values["strip"], bool):
                raise self.fail(f"strip = {values['strip']!r}: true or false is wanted")
        if "labels" in self._table:
            values["labels"] = str(safe_relative(self.text("labels"), where=f"{self._path}: labels"))
        values |= self.answers(kind)
        if not re.fullmatch(r"[\w.-]+", values["name"]):
            raise self.fail(f"name = {values['name']!r}: letters, digits, '_', '-' and '.' only")
        return Task(**values, path=self._path, sha256=sha256)

    def answers(self, kind: str) -> dict[str, Any]:
        """The keys that say what the right answer is; those of the other kind are refused."""
        wanted = {"multiple_choice": ("choices", "gold", "gold_is"), "continuation": ("target",)}
        for other, keys in wanted.items():
            for key in keys:
                if other != kind and key in self._table:
                    raise self.fail(f"{key} belongs to kind = {other!r}, not to {kind!r}")
        if kind == "continuation":
            return {"target": self.text("target")}
        choices = self._table.get("choices")
        if isinstance(choices, list) and len(choices) > 1 and all(isinstance(choice, str) and choice for choice in choices):
            choices = tuple(choices)
        elif not isinstance(choices, str) or not choices:
            raise self.fail("choices: a list of at least two templates is wanted, or the name of a field that holds a list")
        gold_is = self._table.get("gold_is", "index")
        if gold_is not in ("index", "text"):
            raise self.fail(f"gold_is = {gold_is!r}: 'index' or 'text' is wanted")
        return {"choices": choices, "gold": self.text("gold"), "gold_is": gold_is}

    def text(self, key: str, *, empty: bool = False) -> str:
        value = self._table.get(key)
        if value is None:
            raise self.fail(f"the key {key!r} is missing")
        if not isinstance(value, str) or (not value and not empty):
            raise self.fail(f"{key} = {value!r}: a text is wanted")
        return value

    def file_names(self, key: str, *, needed: bool) -> tuple[str, ...]:
        value = self._table.get(key)
        if value is None and not needed:
            return ()
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list) or not names:
            raise self.fail(f"{key}: a file name, or a list of them, is wanted")
        return tuple(str(safe_relative(name, where=f"{self._path}: {key}")) for name in names)

    def metric_names(self, kind: str) -> tuple[str, ...]:
        names = self._table.get("metrics")
        if not isinstance(names, list) or not names:
            raise self.fail("metrics: a list of at least one name is wanted")
        for name in names:
            if name not in METRICS[kind]:
                raise self.fail(f"metrics: {name!r} is not a metric of kind {kind!r}; those are {', '.join(METRICS[kind])}")
        if len(set(names)) != len(names):
            raise self.fail("metrics: a name appears twice")
        return tuple(names)

    def replacements(self) -> tuple[Replacement, ...]:
        steps = self._table.get("replace", [])
        if not isinstance(steps, list):
            raise self.fail("replace: a list of tables is wanted")
        return tuple(self.replacement(step, number) for number, step in enumerate(steps, start=1))

    def replacement(self, step: Any, number: int) -> Replacement:
        where = f"replace, step {number}"
        if not isinstance(step, dict) or set(step) not in ({"text", "with"}, {"pattern", "with"}):
            raise self.fail(f"{where}: a table of `with` and either `text` or `pattern` is wanted")
        source, with_text = step.get("text", step.get("pattern")), step["with"]
        if not isinstance(source, str) or not source or not isinstance(with_text, str):
            raise self.fail(f"{where}: texts are wanted")
        if "text" in step:
            return Replacement(source, with_text)
        try:
            compiled = re.compile(source)
            compiled.sub(with_text, "")
        except (re.error, IndexError) as error:
            raise self.fail(f"{where}: bad regular expression: {error}") from error
        return Replacement(compiled, with_text)
