"""Where prompts are split and cut, and how windows cover a text."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmctl.core.errors import InputError
from llmctl.core.evals.items import Item
from llmctl.core.evals.tokens import Prefix, Question, encode_items, windows
from tests.core.data.chat_tokenizers import byte_tokenizer

_PLAIN = byte_tokenizer()
_WITH_BOS = byte_tokenizer(bos="<|im_start|>")


def _encode(prompt: str, *continuations: str, bos: str = "no", context_size: int = 64) -> Question:
    item = Item(0, 1, prompt, continuations, continuations, 0)
    tokenizer = _PLAIN if bos == "no" else _WITH_BOS
    (question,) = encode_items(tokenizer, [item], prefix=Prefix(tokenizer, bos), context_size=context_size)
    return question


@given(st.integers(0, 200), st.integers(1, 40), st.data())
def test_windows_score_every_token_but_the_first_once_with_the_promised_context(num_tokens: int, size: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, size))
    scored = []
    for window in windows(num_tokens, context_size=size, stride=stride):
        assert 0 <= window.start < window.end - window.num_scored < window.end <= num_tokens
        assert window.end - 1 - window.start <= size
        for target in range(window.end - window.num_scored, window.end):
            assert target - window.start >= min(target, size - stride + 1)
            scored.append(target)
    assert scored == list(range(1, num_tokens))


def test_without_overlap_windows_are_as_the_rolling_log_likelihood_of_the_harness() -> None:
    # lm_eval/utils.py, get_rolling_token_windows, documents the case of 10 tokens, max_seq_len 4, context_len 1, whose
    # prefix token stands for x_0 here: inputs (-1 0 1 2), (3 4 5 6), (5 6 7 8), targets (0-3), (4-7), (8 9).
    cut = [(w.start - 1, w.end - 1, w.num_scored) for w in windows(11, context_size=4, stride=4)]
    assert cut == [(-1, 4, 4), (3, 8, 4), (5, 10, 2)]


def test_prompt_and_continuation_are_encoded_whole_and_split_at_the_prompt() -> None:
    question = _encode("in", " the hen", " a")
    context, (first, second) = question.groups[0].context, question.groups[0].continuations
    assert list(context) == _PLAIN.encode("in")
    assert list(context + first) == _PLAIN.encode("in the hen")
    assert list(context + second) == _PLAIN.encode("in a")


def test_spaces_at_the_prompts_end_move_to_the_continuation() -> None:
    assert _encode("in  ", "the hen").groups == _encode("in", "  the hen").groups


def test_bos_stands_before_the_prompt_once() -> None:
    plain, with_bos = _encode("in", " the"), _encode("in", " the", bos="yes")
    assert with_bos.groups[0].context == (_WITH_BOS.bos_id, *plain.groups[0].context)
    assert with_bos.groups[0].continuations == plain.groups[0].continuations


def test_an_empty_prompt_is_stood_for_by_the_start_token() -> None:
    assert _encode("", "the").groups[0].context == (_PLAIN.eos_id,)
    assert _encode("", "the", bos="yes").groups[0].context == (_WITH_BOS.bos_id,)


def test_what_does_not_fit_is_cut_on_the_left_as_the_harness_does_and_counted() -> None:
    prompt, choices = "x" * 20, ("abc", "defgh")
    question = _encode(prompt, *choices, context_size=10)
    for group, choice in zip(question.groups, choices, strict=True):
        whole = _PLAIN.encode(prompt + choice)
        kept = whole[-11:]  # context_size inputs and the token that is only predicted
        assert list(group.context + group.continuations[0]) == kept
    assert question.num_cut_tokens == 20 + 5 - 11
    assert question.longest == 10
    assert _encode("x" * 6, "defgh", context_size=10).num_cut_tokens == 0
    assert _encode("x" * 7, "defgh", context_size=10).num_cut_tokens == 1


def test_a_continuation_that_fits_no_context_is_refused() -> None:
    assert _encode("xyz", "a" * 10, context_size=10).longest == 10
    with pytest.raises(InputError, match=r"item 0 \(line 1\): a continuation has 11 tokens, more than the context of 10"):
        _encode("xyz", "a" * 11, context_size=10)


def test_a_prefix_that_the_tokenizer_lacks_is_refused(tmp_path: Path) -> None:
    bare = byte_tokenizer(())
    with pytest.raises(InputError, match="neither a BOS nor an EOS"):
        Prefix(bare, "yes")
    assert Prefix(bare, "auto").ids == ()
    item = Item(0, 1, "", ("a",), ("a",), 0)
    with pytest.raises(InputError, match="the prompt is empty"):
        list(encode_items(bare, [item], prefix=Prefix(bare, "no"), context_size=8))
