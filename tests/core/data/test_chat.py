"""Rows of supervised data: each form is read as people write it, and each broken rule is named with its row."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
import zstandard

from llmctl.core.data.chat import BadRow, Completion, Conversation, Message, Row, read_rows
from llmctl.core.errors import InputError, NotFoundError, UsageError

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rules(path: Path, rows: list[Any]) -> list[str]:
    """The rules that the rows of a file break."""
    return [str(row) for row in read_rows(write_jsonl(path, rows)) if isinstance(row, BadRow)]


def examples(path: Path) -> list[Any]:
    rows = list(read_rows(path))
    assert all(isinstance(row, Row) for row in rows), rows
    return [example for row in rows if isinstance(row, Row) for example in row.examples]


def chat(*pairs: tuple[str, str]) -> Conversation:
    return Conversation(tuple(Message(role, content) for role, content in pairs))


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"messages": [USER, ANSWER]}, chat(("user", "Hi"), ("assistant", "Hello"))),
        (
            {"messages": [{"role": "system", "content": "Be kind."}, USER, ANSWER, USER, ANSWER], "id": 7},
            chat(("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Hi"), ("assistant", "Hello")),
        ),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "system": "Be kind."},
            chat(("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello")),
        ),
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, chat(("user", "Add.\n1 2"), ("assistant", "3"))),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, chat(("user", "Hi"), ("assistant", "Hello"))),
        ({"instruction": "Hi", "output": "Hello"}, chat(("user", "Hi"), ("assistant", "Hello"))),
        (
            {"instruction": "And 3?", "output": "6", "history": [["1 + 2?", "3"]], "system": "Sums."},
            chat(("system", "Sums."), ("user", "1 + 2?"), ("assistant", "3"), ("user", "And 3?"), ("assistant", "6")),
        ),
        ({"prompt": "Once", "completion": " upon a time"}, Completion("Once", " upon a time")),
        ({"prompt": "", "completion": "你好"}, Completion("", "你好")),
    ],
)
def test_every_form_reads_as_the_same_turns(tmp_path: Path, row: dict[str, Any], wanted: Any) -> None:
    assert examples(write_jsonl(tmp_path / "rows.jsonl", [row])) == [wanted]


def test_a_self_instruct_row_gives_one_example_an_instance(tmp_path: Path) -> None:
    row = {"instruction": "Double.", "instances": [{"input": "1", "output": "2"}, {"input": "2", "output": "4"}]}
    assert examples(write_jsonl(tmp_path / "rows.jsonl", [row])) == [
        chat(("user", "Double.\n1"), ("assistant", "2")),
        chat(("user", "Double.\n2"), ("assistant", "4")),
    ]


def test_jsonl_array_archives_and_byte_order_mark_hold_the_same_rows(tmp_path: Path) -> None:
    rows = [{"prompt": str(i), "completion": "ü" * (i + 1)} for i in range(5)]
    plain = write_jsonl(tmp_path / "rows.jsonl", rows)
    wanted = examples(plain)
    variants = {
        "array.json": json.dumps(rows, indent=1).encode(),
        "spaced.json": b"\n  " + json.dumps(rows).encode(),
        "packed.zst": zstandard.compress(plain.read_bytes()),
        "packed.bin": gzip.compress(plain.read_bytes()),
        "array.json.gz": gzip.compress(json.dumps(rows).encode()),
        "marked.jsonl": b"\xef\xbb\xbf" + plain.read_bytes(),
        "crlf.jsonl": plain.read_bytes().replace(b"\n", b"\r\n"),
        "open-end.jsonl": plain.read_bytes().rstrip(b"\n"),
    }
    for name, data in variants.items():
        (tmp_path / name).write_bytes(data)
        assert examples(tmp_path / name) == wanted, name


@pytest.mark.parametrize(
    ("row", "rule"),
    [
        ({"text": "no form"}, "its keys are 'text'; the forms known have: messages; conversations"),
        (7, "a JSON object is wanted, a number was found"),
        ({"messages": []}, "`messages` is an empty list"),
        ({"messages": None}, "`messages` is null"),
        ({"messages": ["Hi"]}, "`messages` item 1 is text"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "message 1 has the role 'bot'"),
        ({"messages": [{"content": "x"}]}, "message 1 has the role None"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "message 2: `content` is null; text is wanted"),
        ({"messages": [USER, {"role": "assistant"}]}, "message 2 has no `content`"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "message 2: the assistant's content is empty"),
        ({"messages": [USER, {"role": "assistant", "content": 3}]}, "message 2: `content` is a number"),
        ({"messages": [USER, ANSWER, ANSWER]}, "message 3: two assistant messages in a row"),
        ({"messages": [USER, USER, ANSWER]}, "message 2: two user messages in a row"),
        ({"messages": [ANSWER]}, "message 1: an assistant message"),
        ({"messages": [USER, {"role": "system", "content": "x"}, ANSWER]}, "message 2 is a system message; only the first may be"),
        ({"messages": [USER]}, "the last message is not the assistant's"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [{}]}]}, "message 2 has tool calls"),
        ({"messages": [USER, {"role": "assistant", "content": "\ud800"}]}, "half a surrogate pair at character 0"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "message 1 is from 'robot'"),
        ({"conversations": [{"from": "human", "value": "x"}], "chosen": {}, "rejected": {}}, "preference data"),
        ({"instruction": "x", "input": 3, "output": "y"}, "`input` is a number"),
        ({"instruction": "x", "output": None}, "`output` is null"),
        ({"instruction": "x", "output": "y", "history": [["only one"]]}, "`history` item 1"),
        ({"instruction": "x", "instances": []}, "`instances` is an empty list"),
        ({"prompt": "x", "completion": ""}, "`completion` is empty"),
        ({"prompt": None, "completion": "y"}, "`prompt` is null"),
    ],
)
def test_each_broken_rule_is_named_with_its_row(tmp_path: Path, row: Any, rule: str) -> None:
    (found,) = rules(tmp_path / "rows.jsonl", [row])
    assert found.startswith(f"{tmp_path / 'rows.jsonl'}: row 1: ")
    assert rule in found


def test_the_first_good_row_decides_the_form_of_the_file(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"messages": [USER, ANSWER]}, {"prompt": "c", "completion": "d"}]
    (found,) = rules(tmp_path / "rows.jsonl", rows)
    assert "row 2: the row has no `completion`" in found


def test_rows_are_numbered_by_line_and_a_broken_line_spoils_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good = json.dumps({"prompt": "a", "completion": "b"}).encode()
    lines = [good, b"", b"{not json", b"\xff\xfe\xff", b'{"prompt": NaN}', b"[" * 100_000, b'{"a": 1, "a": 2}', good]
    path.write_bytes(b"\n".join(lines))
    found = list(read_rows(path))
    assert [row.number for row in found] == [1, 3, 4, 5, 6, 7, 8]
    assert [isinstance(row, BadRow) for row in found] == [False, True, True, True, True, True, False]


def test_a_file_that_cannot_be_read_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such file"):
        list(read_rows(tmp_path / "none.jsonl"))
    with pytest.raises(UsageError, match="is a folder"):
        list(read_rows(tmp_path))
    broken = {
        "utf16.jsonl": ("[]".encode("utf-16"), "UTF-16"),
        "cut.jsonl.gz": (gzip.compress(os.urandom(10_000))[:5_000], "the file was truncated"),
        "array.json": (b'[{"prompt": "a"', "not valid JSON"),
    }
    for name, (data, message) in broken.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=message):
            list(read_rows(tmp_path / name))


@pytest.mark.skipif("LLMCTL_TEST_DATA" not in os.environ, reason="needs $LLMCTL_TEST_DATA")
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("fastchat_dummy_conversation.json", 500),
        ("lf_alpaca_en_demo.json", 999),
        ("lf_identity.json", 91),
        ("self_instruct_seed_tasks.jsonl", 175),
    ],
)
def test_published_instruction_data_reads_without_a_bad_row(name: str, count: int) -> None:
    assert len(examples(Path(os.environ["LLMCTL_TEST_DATA"]) / "instruct" / name)) == count
