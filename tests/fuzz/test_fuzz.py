"""Damaged and hostile model files: a model or exit code 4, no crash, no hang; by hypothesis, with the JSON's structure in mind."""

import copy
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import FILES, GGUFS, content, open_with, parsed, sound

_FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
_ODD = st.sampled_from(
    [
        None,
        True,
        False,
        0,
        -1,
        1,
        2,
        1 << 31,
        1 << 63,
        -(1 << 70),
        0.5,
        -0.0,
        1e-30,
        1e30,
        1e400,
        "",
        "a",
        "\x00",
        "../../etc/passwd",
        "/",
        "{}",
    ]
)
_JSON = st.recursive(
    _ODD | st.text(max_size=8) | st.integers(-3, 300),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path to every value in a JSON document; of long lists and tables, to the first few."""
    inside = list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    return [path, *(place for key, inner in inside[:40] for place in places(inner, (*path, key)))]


def changed(document: Any, path: tuple[Any, ...], value: Any, *, remove: bool) -> Any:
    """A copy of the document with one value changed, or taken out."""
    if not path:
        return value
    document = copy.deepcopy(document)
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    if remove:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return document


@pytest.mark.parametrize("name", FILES + GGUFS)
def test_the_sound_files_are_taken(name: str) -> None:
    assert open_with(name, content(name))


@pytest.mark.parametrize("name", FILES)
@_FUZZ
@given(data=st.data())
def test_any_value_in_a_json_file_of_a_model_is_taken_or_refused(name: str, data: st.DataObject) -> None:
    document = parsed(name)
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(places(document)))
        document = changed(document, path, data.draw(_JSON), remove=bool(path) and data.draw(st.booleans()))
    open_with(name, json.dumps(document).encode("utf-8", "surrogatepass"))


@pytest.mark.parametrize("name", FILES + GGUFS)
@_FUZZ
@given(position=st.integers(0, 1 << 20), change=st.binary(min_size=1, max_size=8), cut=st.integers(0, 1 << 20) | st.none())
def test_any_damage_to_the_bytes_is_taken_or_refused(name: str, position: int, change: bytes, cut: int | None) -> None:
    damaged = bytearray(content(name))
    position %= len(damaged)
    damaged[position : position + len(change)] = change
    open_with(name, bytes(damaged if cut is None else damaged[: cut % len(damaged)]))


def _entries(raw: bytes) -> list[tuple[int, int]]:
    """(start, bytes) of every number in a GGUF file's header: lengths, counts, kinds, values; where damage hurts most."""
    from llmctl.core.gguf import GgufFile

    path = sound() / "parse.gguf"
    path.write_bytes(raw)
    first = min(tensor.start for tensor in GgufFile(path).tensors.values())
    return [(start, 8) for start in range(0, first - 8, 4)]


@pytest.mark.parametrize("name", GGUFS)
@_FUZZ
@given(
    data=st.data(), number=st.sampled_from([0, 1, 2, 9, 31, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 64) - 1])
)
def test_any_number_in_a_gguf_header_is_taken_or_refused(name: str, data: st.DataObject, number: int) -> None:
    damaged = bytearray(content(name))
    start, num_bytes = data.draw(st.sampled_from(_entries(bytes(damaged))))
    damaged[start : start + num_bytes] = (number % (1 << 64)).to_bytes(8, "little")
    open_with(name, bytes(damaged))
