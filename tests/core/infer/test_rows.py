"""Rows of a batch: what is understood, what is refused, and lines that come in any pieces."""

import io
import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.core.infer import rows
from llmctl.core.infer.rows import BadRow, Row, file_lines, parse_row, polled_lines


def test_a_full_row_is_understood() -> None:
    raw = {
        "id": "a/1",
        "prompt": "你好",
        "system": "brief",
        "seed": 5,
        "stop": "\n",
        "max_tokens": 9,
        "temperature": 0.5,
        "top_k": 3,
        "label": {"kept": [1, None]},
        "top_p": None,
    }
    assert parse_row(json.dumps(raw).encode(), 7) == Row(
        line=7,
        id="a/1",
        prompt="你好",
        system="brief",
        seed=5,
        stop=("\n",),
        max_new_tokens=9,
        sampling={"temperature": 0.5, "top_k": 3},
        extra={"label": {"kept": [1, None]}},
    )


def test_without_an_id_the_line_number_is_the_id() -> None:
    row = parse_row(b'{"messages": [], "id": null}', 12)
    assert isinstance(row, Row)
    assert (row.id, row.messages, row.prompt) == (12, [], None)


@pytest.mark.parametrize(
    ("raw", "id", "words"),
    [
        (b"not json", 4, "line 4: not valid JSON"),
        (b'{"prompt": "x"', 4, "not valid JSON"),
        (b"[1]", 4, "not a JSON object"),
        (b'{"prompt": "\xff"}', 4, "not UTF-8 at byte 12"),
        (b'{"id": "n", "prompt": "\\ud800"}', "n", "lone surrogate at character 0"),
        (b'{"id": "n"}', "n", "one of prompt and messages"),
        (b'{"id": "n", "prompt": "x", "messages": []}', "n", "not both"),
        (b'{"id": "n", "prompt": 3}', "n", "prompt: a string"),
        (b'{"id": 1.5, "prompt": "x"}', 4, "neither a string nor a whole number"),
        (b'{"id": true, "prompt": "x"}', 4, "neither a string nor a whole number"),
        (b'{"id": 9, "prompt": "x", "text": "y"}', 9, "'text' has a meaning in results"),
        (b'{"id": 9, "prompt": "x", "seed": -1}', 9, "seed: -1"),
        (b'{"id": 9, "prompt": "x", "max_tokens": 0}', 9, "max_tokens: 0"),
        (b'{"id": 9, "prompt": "x", "max_tokens": 1, "max_new_tokens": 2}', 9, "give one"),
        (b'{"id": 9, "prompt": "x", "stop": [""]}', 9, "none empty"),
        (b'{"id": 9, "prompt": "x", "x": 1, "x": 2}', 4, "appears twice"),
        (b'{"id": 9, "prompt": "x", "x": NaN}', 4, "NaN is not JSON"),
        (b'{"id": 9, "prompt": "x", "x": 1e999}', 9, "too large"),
        (b'{"id": 9, "messages": [], "system": "s"}', 9, "system goes with prompt"),
        (b"[" * 100_000, 4, "nested too deeply"),
    ],
)
def test_a_bad_row_is_told_with_its_id_and_line(raw: bytes, id: int | str, words: str) -> None:
    row = parse_row(raw, 4)
    assert isinstance(row, BadRow)
    assert row.id == id
    assert row.error.startswith("line 4: ")
    assert words in row.error
    assert row.error.count("line 4") == 1


def test_a_byte_order_mark_is_allowed_at_the_start_only() -> None:
    assert isinstance(parse_row(b'\xef\xbb\xbf{"prompt": "x"}', 1), Row)
    assert isinstance(parse_row(b'\xef\xbb\xbf{"prompt": "x"}', 2), BadRow)


def test_a_line_beyond_the_limit_is_one_bad_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_LINE_BYTES", 100)
    data = b'{"prompt": "a"}\n{"prompt": "' + b"x" * 200_000 + b'"}\r\n{"prompt": "b"}'
    parsed = [parse_row(line, number) for number, line in enumerate(file_lines(io.BytesIO(data)), start=1)]
    assert [type(row) for row in parsed] == [Row, BadRow, Row]
    assert isinstance(parsed[1], BadRow)
    assert "longer than 100 bytes" in parsed[1].error


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=12), max_size=8))
def test_piped_lines_equal_splitting_the_whole(pieces: list[bytes]) -> None:
    reader, writer = os.pipe()
    lines = polled_lines(reader)
    found = []
    with pytest.MonkeyPatch.context() as patch, open(reader, "rb"):
        patch.setattr(rows, "_IDLE_S", 0.001)
        for piece in pieces:
            os.write(writer, piece)
            if (line := next(lines)) is not None:
                found.append(line)
        os.close(writer)
        found += [line for line in lines if line is not None]
    whole = b"".join(pieces)
    expected = whole.split(b"\n")
    expected = [line.removesuffix(b"\r") for line in expected[:-1]] + ([expected[-1]] if expected[-1] else [])
    assert found == expected


def test_a_silent_pipe_gives_none_so_that_other_work_goes_on() -> None:
    reader, writer = os.pipe()
    lines = polled_lines(reader)
    assert next(lines) is None
    os.write(writer, b"half")
    assert next(lines) is None
    os.write(writer, b" whole\nrest")
    assert next(lines) == b"half whole"
    os.close(writer)
    assert list(lines) == [b"rest"]
    os.close(reader)
