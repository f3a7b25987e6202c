"""Conversations put together from a template's skeleton, against the template itself run each time."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.core.data.supervised import PLAIN_TEMPLATE
from llmctl.core.tokenizer import CHATML_TEMPLATE, Tokenizer
from llmctl.core.tokenizer.chat import ChatEncoder
from tests.core.data.chat_tokenizers import CHATML_TOKENS, byte_tokenizer

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRIMMED = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ ': ' ~ (m.content | trim) ~ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)
TWICE = (
    "{% set ns = namespace(all='') %}{% for m in messages %}{% set ns.all = ns.all + m.content.strip() %}"
    "<|im_start|>{{ m.role }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{{ ns.all }}{{ messages | length }}{% endif %}"
)
BLIND = {"chatml": CHATML_TEMPLATE, "plain": PLAIN_TEMPLATE, "smollm2": SMOLLM2, "trimmed": TRIMMED}
"""Templates that never look at a text."""

LOOKS = {
    "compares": "{% if m.content == 'x' %}!{% endif %}",
    "compares backwards": "{% if 'x' == m.content %}!{% endif %}",
    "is in": "{% if m.content in 'xyz' %}!{% endif %}",
    "has in it": "{% if 'x' in m.content %}!{% endif %}",
    "starts": "{% if m.content.startswith('x') %}!{% endif %}",
    "splits": "{{ m.content.split('x')[0] }}",
    "slices": "{{ m.content[1:] }}",
    "counts": "{{ m.content | length }}",
    "loops": "{% for c in m.content %}{{ c }}.{% endfor %}",
    "upper": "{{ m.content | upper }}",
    "json": "{{ m.content | tojson }}",
    "json of all": "{{ messages | tojson }}",
    "words": "{{ m.content | wordcount }}",
    "formats": "{{ '%.1s' % m.content }}",
    "formats in a tuple": "{{ '%.1s' % (m.content,) }}",
    "format method": "{{ '{:.1}'.format(m.content) }}",
    "replaces in it": "{{ m.content.replace('x', 'y') }}",
    "replaces by it": "{{ 'x'.replace('x', m.content) | upper }}",
    "joins": "{{ [m.content, 'x'] | join('-') | upper }}",
    "joins by method": "{{ ','.join([m.content]) }}",
    "selects": "{{ messages | selectattr('content', 'equalto', 'x') | list | length }}",
    "set block": "{% set t %}{{ m.content }}{% endset %}{{ t | length }}",
    "macro": "{% macro t(a) %}{{ a }}{% endmacro %}{{ t(m.content) }}",
    "filter block": "{% filter upper %}{{ m.content }}{% endfilter %}",
    "grown": "{% set t = 'a' + m.content %}{% if t[0] == 'b' %}!{% endif %}{{ t | length }}",
    "grown by ~": "{% set t = 'a' ~ m.content %}{{ t | length }}",
    "strips some": "{{ m.content.strip('x') }}",
    "strips a whole": "{{ ('  ' + m.content).strip() }}",
    "key": "{{ {'x': 1}[m.content] }}",
    "multiplies": "{{ m.content * 2 }}",
    "is equal": "{% if m.content is eq 'x' %}!{% endif %}",
    "is lower": "{% if m.content is lower %}!{% endif %}",
    "written in a list": "{{ [m.content] }}",
    "date": "{{ strftime_now('%d') }}",
    "repr": "{{ '%r' % m.content }}",
}


def looking(part: str) -> str:
    start = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    return "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}" + part + "<|im_end|>\n{% endfor %}" + start


def encoder(template: str) -> tuple[ChatEncoder, Tokenizer]:
    tokenizer = byte_tokenizer(CHATML_TOKENS, chat_template=template, bos="<|endoftext|>")
    return ChatEncoder(tokenizer), tokenizer


def without(template: str) -> ChatEncoder:
    """One that always runs its template."""
    made = encoder(template)[0]
    made._put_together = lambda messages: None  # type: ignore[method-assign]
    return made


def roles_of(count: int, *, system: bool) -> list[str]:
    return [*(["system"] if system else []), *(["user", "assistant"] * count)]


CONTENT = st.text(st.sampled_from("ab \n\t<|_>imend\u00a0\ue000é"), min_size=0, max_size=12) | st.sampled_from(
    ["<|im_end|>", " x ", "<|im_", "end|>", "x<|im_start|>assistant\nhi", "\ue000\ue001", "\n"]
)


@pytest.mark.parametrize("name", BLIND)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_ids_and_answers_are_those_of_the_template(name: str, data: Any) -> None:
    """Whatever the texts hold: white space, names of control tokens and parts of them, private-use characters."""
    fast, slow = ENCODERS[name]
    for _ in range(3):
        roles = roles_of(data.draw(st.integers(1, 3)), system=data.draw(st.booleans()))
        messages = [{"role": role, "content": data.draw(CONTENT)} for role in roles]
        outcomes = []
        for made in (fast, slow):
            try:
                outcomes.append(made.encode_turns(messages))
            except Exception as error:
                outcomes.append(str(error))
        assert outcomes[0] == outcomes[1]


ENCODERS = {name: (encoder(template)[0], without(template)) for name, template in BLIND.items()}


@pytest.mark.parametrize("name", BLIND)
def test_templates_that_do_not_look_have_skeletons(name: str) -> None:
    made = encoder(BLIND[name])[0]
    assert made._skeleton(("system", "user", "assistant", "user", "assistant")) is not None


@pytest.mark.parametrize("name", LOOKS)
def test_templates_that_look_have_none(name: str) -> None:
    """Any other text would then be a wrong one: each of these writes something that hangs on what a text says."""
    made = encoder(looking(LOOKS[name]))[0]
    assert made._skeleton(("user", "assistant")) is None
    messages = [{"role": "user", "content": "xx"}, {"role": "assistant", "content": "x y"}]
    outcomes = []
    for each in (made, without(looking(LOOKS[name]))):
        try:
            outcomes.append(each.encode_turns(messages))
        except Exception as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]


def test_a_text_may_stand_in_several_places_and_be_stripped_in_some() -> None:
    fast, slow = encoder(TWICE)[0], without(TWICE)
    messages = [{"role": "user", "content": " what "}, {"role": "assistant", "content": " that\n"}]
    assert fast.encode_turns(messages) == slow.encode_turns(messages)


def test_templates_are_run_for_messages_with_more_than_a_text() -> None:
    made = encoder(CHATML_TEMPLATE)[0]
    assert made._put_together([{"role": "user", "content": "a", "name": "b"}, {"role": "assistant", "content": "c"}]) is None
    assert made._put_together([{"role": "user", "content": " \n"}, {"role": "assistant", "content": "c"}]) is None
    assert made._put_together([{"role": "user", "content": "a<|im_end|>"}, {"role": "assistant", "content": "c"}]) is None
    assert made._put_together([{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}]) is not None
