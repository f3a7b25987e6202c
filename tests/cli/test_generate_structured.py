"""Structured answers by the command's flags and in the rows of a batch; parameters of single rows; what is refused."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.cli.generate_tools import Llmctl

pytest.importorskip("llguidance")

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["ok", "n"],
    "additionalProperties": False,
}
BASE = ("-n", 120, "--seed", 4, "--temp", 1.4)


def test_each_flag_gives_what_it_asks_for(llmctl: Llmctl, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA))
    given = llmctl("-m", model, *BASE, "x", "--json-schema", json.dumps(SCHEMA))
    assert given.code == 0
    jsonschema.validate(json.loads(given.out), SCHEMA)
    assert llmctl("-m", model, *BASE, "x", "--json-schema", file).out == given.out
    assert re.fullmatch("[a-f]{3}-[0-9]+\n", llmctl("-m", model, *BASE, "x", "--regex", "[a-f]{3}-[0-9]{1,4}").out)
    texts = llmctl("-m", model, *BASE, "x", "--choice", "red", "--choice", "light blue", "--num-samples", 12).out
    assert set(texts.split("\n---\n")[:-1]) == {"red", "light blue"}
    grammar = tmp_path / "pairs.lark"
    grammar.write_text('start: "<" start ">" | /[ab]/\n')
    answer = llmctl("-m", model, *BASE, "--temp", 0.5, "x", "--grammar", grammar, "--json").rows[0]
    depth = answer["text"].count("<")
    assert answer["finish"] == "length" or re.fullmatch("<" * depth + "[ab]" + ">" * depth, answer["text"])
    lines = llmctl("-m", model, *BASE, "--lines", "--choice", "yes", "--choice", "no", stdin=b"a\nb\n\nc\n")
    assert [line in ("yes", "no", "") for line in lines.out.splitlines()] == [True] * 4


def test_an_answer_that_was_cut_is_told(llmctl: Llmctl, model: Path) -> None:
    result = llmctl("-m", model, "-n", 4, "--seed", 1, "x", "--json-schema", json.dumps(SCHEMA))
    assert (result.code, result.out) == (0, '{"ok\n')
    assert "the answer is not whole: it was cut after 4 tokens" in result.err


def test_rows_have_their_own_shapes_and_parameters(llmctl: Llmctl, model: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"id": "schema", "prompt": "a", "json_schema": SCHEMA},
        {"id": "text", "prompt": "a", "json_schema": json.dumps(SCHEMA)},
        {"id": "regex", "prompt": "b", "regex": "[0-9]{4}"},
        {"id": "choice", "prompt": "c", "choice": ["up", "down"]},
        {"id": "grammar", "prompt": "d", "grammar": 'root ::= "a" [bc] "d"'},
        {"id": "job", "prompt": "e"},
        {"id": "bad", "prompt": "f", "regex": "("},
        {"id": "two", "prompt": "f", "regex": "a", "choice": ["b"]},
        {"id": "none", "prompt": "f", "choice": "b"},
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = ("-m", model, *BASE, "-i", source, "-o", target)
    result = llmctl(*base, "--regex", "[xyz]{2,5}")
    assert result.code == 3
    done = {row["id"]: row for row in map(json.loads, target.read_text().splitlines())}
    for name in ("schema", "text"):
        jsonschema.validate(json.loads(done[name]["text"]), SCHEMA)
    assert re.fullmatch("[0-9]{4}", done["regex"]["text"])
    assert done["choice"]["text"] in ("up", "down")
    assert re.fullmatch("a[bc]d", done["grammar"]["text"])
    assert re.fullmatch("[xyz]{2,5}", done["job"]["text"])
    assert all(row["finish"] == "eos" and "regex" not in row and "choice" not in row for row in done.values())
    errors = {row["id"]: row["error"] for row in map(json.loads, (tmp_path / "out.errors.jsonl").read_text().splitlines())}
    assert errors["bad"].startswith("line 7: regex: ")
    assert errors["two"] == "line 8: regex does not go with choice: an answer follows one of them"
    assert errors["none"] == "line 9: choice: a list of strings, none empty, is wanted"
    assert llmctl(*base, "--regex", "[xyz]{2,5}").code == 3, "the same job goes on"
    assert llmctl(*base, "--regex", "[xyz]{2,6}").code == 4
    assert llmctl(*base).code == 4


def test_rows_have_their_own_parameters(llmctl: Llmctl, model: Path) -> None:
    base = ("-m", model, "-n", 6, "--seed", 3, "--temp", 1.3, "--dtype", "float32", "-i", "-", "--ordered")

    def run(*rows: dict[str, Any], flags: tuple[Any, ...] = ()) -> list[dict[str, Any]]:
        result = llmctl(*base, *flags, stdin="".join(json.dumps({"id": "a", **row}) + "\n" for row in rows).encode())
        return [{name: rounded(value) for name, value in row.items()} for row in result.rows]

    def rounded(value: Any) -> Any:
        """torch's last digits depend on what else is in the batch."""
        if isinstance(value, list):
            return [rounded(item) for item in value]
        if isinstance(value, dict):
            return {name: rounded(item) for name, item in value.items()}
        return pytest.approx(value, abs=1e-4) if isinstance(value, float) else value

    mixed = run(
        {"prompt": "Once"},
        {"id": "b", "prompt": "Once", "best_of": 4},
        {"id": "c", "prompt": "Once", "logprobs": 2},
        {"id": "d", "prompt": "Once", "min_new_tokens": 6, "ignore_eos": True},
        {"id": "e", "prompt": "Once", "best_of": 3, "logprobs": 0},
    )
    # each as if the whole job had been asked
    assert run({"prompt": "Once"}) == mixed[:1]
    assert run({"id": "b", "prompt": "Once"}, flags=("--best-of", 4)) == mixed[1:2]
    assert run({"id": "c", "prompt": "Once"}, flags=("--logprobs", 2)) == mixed[2:3]
    assert run({"id": "d", "prompt": "Once"}, flags=("--min-new-tokens", 6, "--ignore-eos")) == mixed[3:4]
    assert run({"id": "e", "prompt": "Once"}, flags=("--best-of", 3, "--logprobs", 0)) == mixed[4:]
    assert [("score" in row, "logprobs" in row) for row in mixed] == [
        (False, False),
        (True, False),
        (False, True),
        (False, False),
        (True, True),
    ]
    bad = run({"prompt": "x", "best_of": 0}, {"id": "b", "prompt": "x", "logprobs": [1]}, {"id": "c", "prompt": "x", "ignore_eos": 1})
    assert [row["error"] for row in bad] == [
        "line 1: best_of: 0 is not a whole number from 1 to 100000",
        "line 2: logprobs: [1] is not a whole number from 0 to 1000",
        "line 3: ignore_eos: 1 is neither true nor false",
    ]
    few = run({"prompt": "x", "best_of": 2}, {"id": "b", "prompt": "x", "best_of": 4}, flags=("--num-samples", 3))
    assert few[0]["error"] == "line 1: best_of is 2, less than the 3 texts that are to be kept"
    assert [row["sample"] for row in few[1:]] == [0, 1, 2]


def test_openai_rows_ask_by_response_format(llmctl: Llmctl, chat_model: Path) -> None:
    def row(wish: dict[str, Any]) -> bytes:
        body = {"messages": [{"role": "user", "content": "x"}], "response_format": wish, "max_tokens": 90}
        return json.dumps({"custom_id": wish["type"], "method": "POST", "url": "/v1/chat/completions", "body": body}).encode() + b"\n"

    rows = row({"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}) + row({"type": "text"})
    found = {line["custom_id"]: line["response"]["body"]["choices"][0] for line in llmctl("-m", chat_model, "-i", "-", stdin=rows).rows}
    jsonschema.validate(json.loads(found["json_schema"]["message"]["content"]), SCHEMA)
    assert found["json_schema"]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (("--json-schema", '{"type": "nope"}'), 2, "--json-schema: Invalid type: nope"),
        (("--json-schema", "{"), 2, "--json-schema: not JSON"),
        (("--json-schema", "nowhere.json"), 10, "--json-schema nowhere.json: no such file, and it does not look like a schema"),
        (("--regex", "a("), 2, "--regex: "),
        (("--grammar", "start: b"), 2, "--grammar: "),
        (("--choice", ""), 2, "--choice: an empty text"),
        (("--choice", "a", "--regex", "b"), 2, "--regex does not go with --choice"),
        (("--regex", "b", "--num-beams", 2), 2, "--regex does not go with --num-beams"),
    ],
)
def test_what_is_wrong_is_one_line(llmctl: Llmctl, model: Path, flags: tuple[Any, ...], code: int, words: str) -> None:
    result = llmctl("-m", model, "x", *flags)
    assert (result.code, result.out) == (code, "")
    assert words in result.last
    assert result.err.count("\n") == 1


def test_a_wrong_file_is_a_bad_input(llmctl: Llmctl, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text('{"type": 3}')
    result = llmctl("-m", model, "x", "--json-schema", file)
    assert result.code == 4
    assert f"--json-schema {file}: " in result.last
    assert llmctl("-m", model, "x", "--grammar", tmp_path).code == 2


def test_without_the_extra_its_installation_is_told(llmctl: Llmctl, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    result = llmctl("-m", model, "x", "--choice", "a")
    assert result.code == 2
    assert "pip install 'llmctl[grammar]'" in result.last
