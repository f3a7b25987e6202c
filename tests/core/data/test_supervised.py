"""Examples as ids and marks: what is learned, what is cut, what is refused. transformers' chat templating is the oracle."""

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmctl.core.data.chat import Completion, Conversation, Message
from llmctl.core.data.supervised import (
    CHATML_TEMPLATE,
    PLAIN_TEMPLATE,
    EncodedExamples,
    ExampleEncoder,
    Loaded,
    default_chat_template,
    default_seq_len,
    fit_examples,
    with_template,
)
from llmctl.core.data.supervised import load_examples as loading
from llmctl.core.errors import InputError, Interrupted
from llmctl.core.tokenizer import Tokenizer
from tests.core.data.chat_tokenizers import CHATML_TOKENS, byte_tokenizer, reference_tokenizer
from tests.core.data.test_chat import chat, write_jsonl


def load_examples(*arguments: Any, **options: Any) -> Loaded:
    """What loading returns in the end."""
    return drained(loading(*arguments, **options))[1]


def drained(generator: Any) -> tuple[list[int], Loaded]:
    """(what it yields, what it returns)."""
    told = []
    while True:
        try:
            told.append(next(generator))
        except StopIteration as done:
            return told, done.value


CHATS = [
    [("user", "Hi"), ("assistant", "Hello there")],
    [("system", "Be brief."), ("user", "the  end?\n\n"), ("assistant", " yes "), ("user", "你好"), ("assistant", "🙂")],
    [("user", ""), ("assistant", "x")],
]
TEMPLATES = {
    "chatml": CHATML_TEMPLATE,
    "plain": PLAIN_TEMPLATE,
    "default system": "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    + CHATML_TEMPLATE,
    "stripping": CHATML_TEMPLATE.replace("message['content']", "(message['content'] | trim)"),
}


def encoder_of(tokenizer: Tokenizer, *, mask_prompt: bool = True, templated: bool = True) -> ExampleEncoder:
    return ExampleEncoder(plain=tokenizer, chat=tokenizer, templated=templated, mask_prompt=mask_prompt)


def reference_marks(reference: Any, messages: list[dict[str, str]], end: str) -> tuple[list[int], list[bool]]:
    """Ids by transformers, and as learned those from the end of each generation prompt to the answer's end token."""
    ids = reference.apply_chat_template(messages, return_dict=False)
    learn = [False] * len(ids)
    end_id = reference.convert_tokens_to_ids(end)
    for place, message in enumerate(messages):
        if message["role"] == "assistant":
            before = reference.apply_chat_template(messages[:place], add_generation_prompt=True, return_dict=False)
            assert ids[: len(before)] == before
            last = ids.index(end_id, len(before))
            learn[len(before) : last + 1] = [True] * (last + 1 - len(before))
    return ids, learn


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("turns", CHATS)
def test_ids_and_learned_tokens_are_those_of_transformers(name: str, turns: list[tuple[str, str]]) -> None:
    template = TEMPLATES[name]
    tokenizer = byte_tokenizer(chat_template=template)
    end = "<|endoftext|>" if name == "plain" else "<|im_end|>"
    messages = [{"role": role, "content": content} for role, content in turns]
    wanted = reference_marks(reference_tokenizer(chat_template=template), messages, end)
    assert encoder_of(tokenizer).encode(chat(*turns)) == wanted


def test_the_ids_before_an_answer_are_those_that_generate_feeds() -> None:
    tokenizer = byte_tokenizer()
    ids, learn = encoder_of(tokenizer).encode(chat(*CHATS[0]))
    prompt = tokenizer.encode_chat([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert ids[: learn.index(True)] == prompt


def test_an_answer_that_begins_with_white_space_leaves_its_prompt_as_generate_feeds_it() -> None:
    """The tokenizer has a token for two newlines, which would join the template's with the answer's."""
    tokenizer = byte_tokenizer()
    ids, learn = encoder_of(tokenizer).encode(chat(("user", "Hi"), ("assistant", "\n\nHello")))
    prompt = tokenizer.encode_chat([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert ids[: learn.index(True)] == prompt
    assert tokenizer.decode([i for i, m in zip(ids, learn, strict=True) if m][:-1]) == "\n\nHello"


FRAGMENTS = [*CHATML_TOKENS, "<|im_end|>\n<|im_start|>system\n", "### Response:\n", "a", " ", "\n", "<|im_", "end|>", "é", "\u2063"]
texts = st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=6).map("".join)


@given(texts, texts, texts)
def test_control_ids_stand_only_where_the_template_put_them(system: str, user: str, answer: str) -> None:
    """Also where a turn spells out control tokens, for every special token (an attack, or a text about chat formats)."""
    tokenizer = byte_tokenizer()

    def control(*contents: str) -> list[int]:
        turns = zip(("system", "user", "assistant"), contents, strict=True)
        ids, _ = encoder_of(tokenizer).encode(chat(*turns))
        return [i for i in ids if i in tokenizer.special_ids]

    assert control(system, user, answer) == control("x", "x", "x")
    ids, learn = encoder_of(tokenizer).encode(chat(("system", system), ("user", user), ("assistant", answer)))
    learned = [i for i, m in zip(ids, learn, strict=True) if m]
    assert tokenizer.decode(learned[:-1]) == answer
    assert learned[-1] == tokenizer.token_id("<|im_end|>")


def test_without_masking_every_token_is_learned() -> None:
    ids, learn = encoder_of(byte_tokenizer(), mask_prompt=False).encode(chat(*CHATS[0]))
    assert learn == [True] * len(ids)


def test_a_completion_without_a_template_is_concatenated_and_ended() -> None:
    tokenizer = byte_tokenizer(chat_template=None)
    ids, learn = encoder_of(tokenizer, templated=False).encode(Completion("Say <|endoftext|>", " the end"))
    prompt = tokenizer.encode("Say <|endoftext|>")
    assert ids == [*prompt, *tokenizer.encode(" the end"), tokenizer.eos_id]
    assert learn == [False] * len(prompt) + [True] * (len(ids) - len(prompt))
    assert tokenizer.eos_id not in ids[:-1]


def test_a_completion_with_a_template_is_a_turn_of_the_user_and_its_answer() -> None:
    encoder = encoder_of(byte_tokenizer())
    assert encoder.encode(Completion("Hi", "Hello")) == encoder.encode(chat(("user", "Hi"), ("assistant", "Hello")))


def test_the_default_template_follows_what_the_tokenizer_has() -> None:
    assert default_chat_template(byte_tokenizer(chat_template=None)) == CHATML_TEMPLATE
    assert default_chat_template(byte_tokenizer(("<|endoftext|>",), chat_template=None)) == PLAIN_TEMPLATE
    with pytest.raises(InputError, match="no end-of-text token"):
        default_chat_template(byte_tokenizer((), chat_template=None))
    assert with_template(byte_tokenizer(chat_template=None), "x").chat_template == "x"


def load(tmp_path: Path, rows: list[Any], **options: Any) -> Any:
    return load_examples([write_jsonl(tmp_path / "rows.jsonl", rows)], encoder_of(byte_tokenizer()), **{"skip_bad": False, **options})


def pairs(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"number {i}", "completion": f"it is {i}"} for i in range(count)]


def test_a_bad_row_stops_with_its_number_or_is_skipped_and_listed(tmp_path: Path) -> None:
    rows = [*pairs(2), {"prompt": "x"}, *pairs(1)]
    with pytest.raises(InputError, match=r"rows\.jsonl: row 3: .*--on-error skip"):
        load(tmp_path, rows)
    loaded = load(tmp_path, rows, skip_bad=True)
    assert [bad.number for bad in loaded.bad_rows] == [3]
    assert len(loaded.train.rows) == 3
    assert loaded.num_rows == 4
    assert loaded.train.name(2).endswith("rows.jsonl: row 4")


def test_no_good_row_is_an_error_also_when_skipping(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none of 2 rows is good"):
        load(tmp_path, [{"prompt": "x"}] * 2, skip_bad=True)
    with pytest.raises(InputError, match="no rows"):
        load(tmp_path, [], skip_bad=True)


def test_a_template_that_refuses_names_the_row_and_gives_up_early(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", pairs(40))
    encoder = encoder_of(byte_tokenizer(chat_template="{{ raise_exception('no such turn') }}"))
    with pytest.raises(InputError, match=r"row 1: .*no such turn"):
        load_examples([path], encoder, skip_bad=False)
    with pytest.raises(InputError, match=r"row 11: .*the 10 rows before it failed too"):
        load_examples([path], encoder, skip_bad=True)


def test_the_held_out_part_follows_from_the_text_of_a_row_alone(tmp_path: Path) -> None:
    def texts_of(examples: EncodedExamples) -> set[tuple[int, ...]]:
        return {tuple(examples.rows.row(i)[0].tolist()) for i in range(len(examples.rows))}

    whole = load(tmp_path, pairs(200), held_out_fraction=0.2)
    part = load(tmp_path, pairs(200)[::-1][:120], held_out_fraction=0.2)
    assert 20 <= len(whole.held_out.rows) <= 60
    assert len(whole.held_out.rows) + len(whole.train.rows) == 200
    assert texts_of(part.held_out) <= texts_of(whole.held_out)
    assert texts_of(part.train) <= texts_of(whole.train)
    twice = load(tmp_path, pairs(50) + pairs(50), held_out_fraction=0.3)
    assert not texts_of(twice.train) & texts_of(twice.held_out)


def test_the_digest_tells_content_and_order(tmp_path: Path) -> None:
    base = load(tmp_path, pairs(5)).digest
    assert load(tmp_path, [{**row, "id": 1} for row in pairs(5)]).digest == base
    assert load(tmp_path, pairs(5)[::-1]).digest != base
    assert load(tmp_path, pairs(6)).digest != base


def test_reading_stops_at_a_signal(tmp_path: Path) -> None:
    with pytest.raises(Interrupted) as caught:
        load(tmp_path, pairs(200), stop=lambda: signal.SIGTERM)
    assert caught.value.exit_code == 143


def test_reading_tells_how_far_it_is(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", pairs(2100))
    told, loaded = drained(loading([path], encoder_of(byte_tokenizer()), skip_bad=False))
    assert told == [1024, 2048]
    assert loaded.num_rows == 2100


def one(prompt: str, completion: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": completion}


def plain_examples(tmp_path: Path, rows: list[dict[str, str]]) -> EncodedExamples:
    """Byte for byte: a prompt of p bytes and a completion of c give p + c + 1 tokens, the last c + 1 learned."""
    encoder = encoder_of(byte_tokenizer(chat_template=None), templated=False)
    return load_examples([write_jsonl(tmp_path / "rows.jsonl", rows)], encoder, skip_bad=False).train


def test_long_rows_are_cut_at_the_end_named_dropped_or_refused(tmp_path: Path) -> None:
    examples = plain_examples(tmp_path, [one("ab", "xyz"), one("abcd", "uvwxyz")])  # 6 and 11 tokens
    cut = fit_examples(examples, seq_len=7, too_long="cut-end", drop_empty=False)
    assert (cut.num_examples, cut.num_cut, cut.num_too_long, cut.num_tokens) == (2, 1, 1, 6 + 8)
    assert cut.rows.row(1)[0].tolist() == examples.rows.row(1)[0].tolist()[:8]
    start = fit_examples(examples, seq_len=7, too_long="cut-start", drop_empty=False)
    assert start.rows.row(1)[0].tolist() == examples.rows.row(1)[0].tolist()[-8:]
    dropped = fit_examples(examples, seq_len=7, too_long="drop", drop_empty=False)
    assert (dropped.num_examples, dropped.num_cut, dropped.num_too_long) == (1, 0, 1)
    with pytest.raises(InputError, match=r"row 2 has 11 tokens, more than the 8"):
        fit_examples(examples, seq_len=7, too_long="error", drop_empty=False)
    whole = fit_examples(examples, seq_len=10, too_long="error", drop_empty=False)
    assert (whole.num_too_long, whole.num_tokens, whole.num_learned) == (0, 17, 4 + 7)


def test_rows_without_an_answer_left_are_counted_and_refused(tmp_path: Path) -> None:
    examples = plain_examples(tmp_path, [one("abcdefgh", "x"), one("a", "x"), one("abcdefghij", "x")])
    with pytest.raises(InputError, match=r"2 of 3 rows have no answer token within --seq-len 4, the first: .*row 1; .*--drop-empty"):
        fit_examples(examples, seq_len=4, too_long="cut-end", drop_empty=False)
    fitted = fit_examples(examples, seq_len=4, too_long="cut-end", drop_empty=True)
    assert (fitted.num_examples, fitted.num_empty) == (1, 2)
    with pytest.raises(InputError, match="none of 3 rows fits"):
        fit_examples(examples, seq_len=1, too_long="drop", drop_empty=True)


def test_the_default_length_follows_the_rows_and_the_model(tmp_path: Path) -> None:
    def default(rows: list[dict[str, str]], max_positions: int = 4096) -> int:
        return default_seq_len(plain_examples(tmp_path, rows), max_positions=max_positions)

    many = [one("a", f"{i:0100}") for i in range(40)]
    assert default(many) == 256
    assert default(many, 64) == 64
    assert default([*many, one("a", "x" * 300)]) == 320
    assert default([*many, one("a", "x" * 3000)]) == 1024
    assert default([one("a", "x" * 100)]) == 128


def test_marks_survive_the_store(tmp_path: Path) -> None:
    examples = plain_examples(tmp_path, [one("ab", "c"), one("", "d")])
    ids, learn = examples.rows.row(0)
    assert ids.dtype == np.int32
    assert learn.tolist() == [False, False, True, True]
    assert examples.rows.row(1)[1].tolist() == [True, True]


def test_canonical_text_tells_turns_apart() -> None:
    assert Conversation((Message("user", "a"),)).canonical() == json.dumps([["user", "a"]])
    assert Completion("a", "bc").canonical() != Completion("ab", "c").canonical()
