"""Stop strings against a reader who goes character by character over the whole text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.core.infer.stopping import StopMatcher


def oracle(text: str, stops: list[str]) -> tuple[str, bool]:
    """Read until the text so far ends with a stop string; the longest one that ends there is cut off."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


small = st.text(alphabet="ab\u4f60\U0001f642", max_size=12)


@settings(deadline=None)
@given(st.lists(small, max_size=8), st.lists(st.text(alphabet="ab\u4f60\U0001f642", min_size=1, max_size=4), max_size=3))
def test_any_cutting_gives_what_a_reader_by_characters_sees(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    given_out = ""
    expected, found = oracle("".join(pieces), stops)
    for piece in pieces:
        given_out += matcher.push(piece)
        assert expected.startswith(given_out), "nothing may be shown that a stop string takes back"
    given_out += matcher.finish()
    assert (given_out, matcher.matched is not None) == (expected, found)


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    matcher = StopMatcher(["END"])
    assert [matcher.push(piece) for piece in ("the E", "N", "d E", "ND more")] == ["the ", "", "ENd ", ""]
    assert matcher.matched == "END"
    assert matcher.push("more") == ""
    assert matcher.finish() == ""


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopMatcher(["x", ""])
