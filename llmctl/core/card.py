"""Model cards: the README.md that goes with every model. Facts in, text out; knows no file and no model."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_LICENSE = re.compile(r"^license(?:_name)?:\s*[\"']?([^\"'\n]+?)[\"']?\s*$", re.MULTILINE)
_SCORES, _DATA, _MADE_FROM = ("measure", "value"), ("data", "sha256"), "Made from"
_NO_PARENT = "random weights"
_FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a card tells. Whatever is not known is left out of the text."""

    name: str
    family: str
    num_parameters: int
    num_format: str
    """How the weights are stored: "float32", "int4 in groups of 32", "Q8_0"."""
    architecture: Mapping[str, Any] = field(default_factory=dict)
    tokenizer_fingerprint: str | None = None
    parent: str | None = None
    """The model that this one was made from: a hub id, a name."""
    license: str | None = None
    """That of the parent; None is not known."""
    data: Mapping[str, str] = field(default_factory=dict)
    """What it was trained on -> hash."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    made_by: str = ""
    """The command, in words."""
    adapter: str | None = None
    """Of a card for adapters on that model, what they are: "rank 16, alpha 32, 1,000 parameters". `num_parameters` is the model's."""


def model_card(facts: CardFacts) -> str:
    """The card in Markdown, with the front matter that the Hugging Face hub reads. The same facts give the same text."""
    head = {"license": facts.license, "base_model": facts.parent if facts.parent and "/" in facts.parent else None}
    lines = ["---", *(f"{key}: {_yaml(value)}" for key, value in head.items() if value), "pipeline_tag: text-generation"]
    if facts.adapter is not None:
        lines += ["library_name: peft", *(["base_model_relation: adapter"] if head["base_model"] else [])]
    lines += ["tags:", "- llmctl", f"- {facts.family}", "---", "", f"# {facts.name}", ""]
    shape = ", ".join(f"{key.replace('_', ' ')} {value:,}" for key, value in facts.architecture.items())
    what = "A language model" if facts.adapter is None else f"LoRA adapters ({facts.adapter}) for a language model"
    lines.append(f"{what} of the {facts.family} family with {facts.num_parameters:,} parameters{f' ({shape})' if shape else ''}.")
    lines += [f"{facts.made_by}", ""] if facts.made_by else [""]
    rows = [
        ("Weights", facts.num_format),
        ("Tokenizer", f"sha256 `{facts.tokenizer_fingerprint}`" if facts.tokenizer_fingerprint else "none"),
        (_MADE_FROM, facts.parent or _NO_PARENT),
        ("Licence of that model", facts.license or "not stated: ask its makers before you pass it on") if facts.parent else ("", ""),
    ]
    lines += _table(("", ""), [(name, value) for name, value in rows if name])
    lines += _section("Data", _DATA, {name: f"`{value}`" for name, value in facts.data.items()})
    lines += _section("Recipe", ("setting", "value"), {name: f"`{_shown(value)}`" for name, value in facts.recipe.items()})
    lines += _section("Scores", _SCORES, {name: f"{value:.6g}" for name, value in facts.scores.items()})
    lines += _section("Versions", ("program", "version"), facts.versions)
    lines += [
        "## Limits",
        "",
        "A model repeats what its text holds, prejudice and untruth included. Look at its answers before you rely on them.",
        "",
    ]
    return "\n".join(lines)


@dataclass(frozen=True)
class Told:
    """What a card of ours says, for the card of a model that is made from it. Empty for a card of others."""

    parent: str | None
    data: Mapping[str, str]
    scores: Mapping[str, float]


def told_by(card: str) -> Told:
    """Read a card back, as far as `Told` goes."""
    text = card.replace("\r\n", "\n")
    parent = dict(_rows(text, ("", ""))).get(_MADE_FROM)
    scores = {}
    for name, value in _rows(text, _SCORES):
        try:
            scores[name] = float(value)
        except ValueError:
            continue
    return Told(None if parent == _NO_PARENT else parent, {name: value.strip("`") for name, value in _rows(text, _DATA)}, scores)


def _rows(text: str, head: tuple[str, str]) -> list[tuple[str, str]]:
    """The cells of the first table of two columns with this head."""
    _, found, rest = text.partition(f"\n| {head[0]} | {head[1]} |\n|---|---|\n")
    rows = []
    for line in rest.split("\n") if found else ():
        cells = re.split(r"(?<!\\) \| ", line.removeprefix("| ").removesuffix(" |"))
        if not line.startswith("| ") or len(cells) != 2:
            break
        rows.append((cells[0].replace("\\|", "|"), cells[1].replace("\\|", "|")))
    return rows


def license_of(card: str) -> str | None:
    """The licence that the front matter of a card states."""
    matter = _FRONT_MATTER.match(card.replace("\r\n", "\n"))
    found = _LICENSE.search(matter[1]) if matter is not None else None
    return found[1].strip()[:100] if found is not None else None


def _section(title: str, head: tuple[str, str], rows: Mapping[str, str]) -> list[str]:
    return [f"## {title}", "", *_table(head, list(rows.items()))] if rows else []


def _table(head: tuple[str, str], rows: list[tuple[str, str]]) -> list[str]:
    return [f"| {head[0]} | {head[1]} |", "|---|---|", *(f"| {_cell(a)} | {_cell(b)} |" for a, b in rows), ""]


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _yaml(value: str) -> str:
    """A string as YAML: JSON's form is valid there too, and no bare word turns into a number or a boolean."""
    return json.dumps(value, ensure_ascii=False)
