"""Prompts: chat template or not, what fits the context, and what is cut."""

import pytest
import tokenizers

from llmctl.core.errors import InputError
from llmctl.core.infer.prompting import Prompter
from llmctl.core.tokenizer import Tokenizer

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(*, template: str | None = TEMPLATE, with_bos: bool = False) -> Tokenizer:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|bos|>"])
    if with_bos:
        backend.post_processor = tokenizers.processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 258)])
    return Tokenizer.from_parts(backend, bos="<|bos|>", eos="<|im_end|>", pad=None, chat_template=template)


def test_text_becomes_a_chat_where_there_is_a_template() -> None:
    words = make_tokenizer()
    ids = Prompter(words, context=100).from_text("hi").ids
    assert words.decode(ids) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    ids = Prompter(words, context=100, system="be kind").from_text("hi").ids
    assert words.decode(ids).startswith("<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhi")
    ids = Prompter(words, context=100, system="be kind").from_text("hi", system="be brief").ids
    assert words.decode(ids).startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi")
    ids = Prompter(words, context=100, system="be kind").from_messages([{"role": "user", "content": "hi"}]).ids
    assert words.decode(ids).startswith("<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhi")


def test_raw_text_is_taken_as_it_is_and_special_names_are_text() -> None:
    words = make_tokenizer()
    raw = Prompter(words, context=100, chat=False)
    assert words.decode(raw.from_text("hi").ids) == "hi"
    assert words.special_ids.isdisjoint(raw.from_text("<|im_end|>").ids)
    special = Prompter(words, context=100, chat=False, allow_special=True)
    assert special.from_text("<|im_end|>").ids == (257,)


def test_without_a_template_text_is_raw_and_chat_is_refused() -> None:
    words = make_tokenizer(template=None)
    assert words.decode(Prompter(words, context=100).from_text("hi").ids) == "hi"
    for options in ({"chat": True}, {"system": "s"}):
        with pytest.raises(InputError, match="--chat-template"):
            Prompter(words, context=100, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="chat template"):
        Prompter(words, context=100).from_messages([{"role": "user", "content": "x"}])
    with pytest.raises(InputError, match="chat template"):
        Prompter(words, context=100).from_text("x", system="s")


@pytest.mark.parametrize("messages", [[], "x", [1], [{"role": "user"}], [{"role": 1, "content": "x"}], [{"role": "user", "content": None}]])
def test_malformed_messages_are_refused(messages: object) -> None:
    with pytest.raises(InputError, match="messages"):
        Prompter(make_tokenizer(), context=100).from_messages(messages)


def test_the_answer_gets_the_room_that_is_left() -> None:
    raw = Prompter(make_tokenizer(), context=1000, chat=False)
    assert raw.from_text("x" * 10).max_new_tokens == 256
    assert raw.from_text("x" * 900).max_new_tokens == 100
    assert raw.from_text("x" * 999).max_new_tokens == 1
    assert raw.from_text("x" * 900, max_new_tokens=100).max_new_tokens == 100


@pytest.mark.parametrize(
    ("length", "wish", "words"),
    [(1000, None, "1,000 prompt tokens fill"), (900, 101, "900 prompt tokens and 101 new ones exceed"), (5, 1000, "ask for fewer tokens")],
)
def test_what_does_not_fit_is_an_error(length: int, wish: int | None, words: str) -> None:
    with pytest.raises(InputError, match=words):
        Prompter(make_tokenizer(), context=1000, chat=False).from_text("x" * length, max_new_tokens=wish)
    if wish == 1000:
        with pytest.raises(InputError, match=words):
            Prompter(make_tokenizer(), context=1000, chat=False, truncate="left").from_text("x" * length, max_new_tokens=wish)


@pytest.mark.parametrize("truncate", ["left", "right"])
@pytest.mark.parametrize("with_bos", [True, False])
def test_truncation_keeps_the_other_end_and_the_bos(truncate: str, with_bos: bool) -> None:
    words = make_tokenizer(with_bos=with_bos)
    text = "".join(chr(0x41 + i % 50) for i in range(300))
    prompt = Prompter(words, context=100, chat=False, truncate=truncate).from_text(text, max_new_tokens=40)  # type: ignore[arg-type]
    assert len(prompt.ids) == 60
    assert prompt.max_new_tokens == 40
    assert prompt.num_cut == 300 + with_bos - 60
    kept = words.decode(prompt.ids[with_bos:])
    assert kept == (text[-(60 - with_bos) :] if truncate == "left" else text[: 60 - with_bos])
    assert (prompt.ids[0] == words.bos_id) == with_bos
    short = Prompter(words, context=100, chat=False, truncate=truncate).from_text("abc", max_new_tokens=40)  # type: ignore[arg-type]
    assert short.num_cut == 0


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(InputError, match="empty"):
        Prompter(make_tokenizer(), context=100).from_text("")
