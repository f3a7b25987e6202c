"""Chat templates from strangers: what must be refused, and what must render as in transformers."""

import re
from typing import Any

import pytest

from llmctl.core.errors import InputError
from llmctl.core.tokenizer import meter
from llmctl.core.tokenizer.template import ChatTemplate

MESSAGES = [{"role": "user", "content": "Hi <b>&\n  there", "tools": [{"name": "f", "args": {"x": [1, 2.5, None, True]}}]}]

GROW = "{{% set ns = namespace(x='0123456789') %}}{{% for i in range(60) %}}{{% set ns.x = {} %}}{{% endfor %}}{{{{ ns.x }}}}"
BIG = "{% set a = 'a' * 9000000 %}"

HOSTILE = {
    "class": "{{ ''.__class__ }}",
    "class by item": "{{ ''['__class__'] }}",
    "class by filter": "{{ ''|attr('__class__') }}",
    "class by map": "{{ ['']|map(attribute='__class__')|list }}",
    "lipsum": "{{ lipsum.__globals__ }}",
    "cycler": "{{ cycler.__init__.__globals__ }}",
    "namespace": "{{ namespace.__init__.__globals__ }}",
    "own function": "{{ raise_exception.__globals__ }}",
    "context": "{{ self._TemplateReference__context }}",
    "underscored field of a namespace": "{% set ns = namespace(**{'__class__': 1}) %}",
    "format reaches in": "{{ '{0.__class__}'.format(messages) }}",
    "change of the messages": "{{ messages.append(1) }}",
    "change of a message": "{{ messages[0].update(role='system') }}",
    "include": "{% include 'x' %}",
    "import": "{% import 'x' as y %}",
    "from import": "{% from 'x' import y %}",
    "extends": "{% extends 'x' %}",
    "times": "{{ 'x' * 10**9 }}",
    "times, the other way round": "{{ 1000000000 * 'x' }}",
    "times a list": "{{ ([1] * 10**9)|length }}",
    "power": "{{ 99999999 ** 99999999 }}",
    "bytes of a number": "{{ (5).to_bytes(1000000000, 'big') }}",
    "nested ranges": "{% for i in range(99999) %}{% for j in range(99999) %}"
    "{% for k in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "nested loops over a text": "{% set a = 'a' * 99999 %}{% for i in a %}{% for j in a %}"
    "{% for k in a %}{% endfor %}{% endfor %}{% endfor %}",
    "long range": "{% for i in range(10**12) %}{% endfor %}",
    "growing by ~": GROW.format("ns.x ~ ns.x"),
    "growing by +": GROW.format("ns.x + ns.x"),
    "growing by join": GROW.format("[ns.x, ns.x]|join"),
    "growing by replace": GROW.format("ns.x.replace('0', '00')"),
    "growing by format": GROW.format("'%s%s'|format(ns.x, ns.x)"),
    "growing by a block": "{% set ns = namespace(x='0123456789') %}{% for i in range(60) %}"
    "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}{{ ns.x }}",
    "growing lists": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "center": "{{ 'a'|center(1000000000) }}{{ 'a'.center(1000000000) }}",
    "ljust": "{{ 'a'.ljust(1000000000) }}",
    "zfill": "{{ 'a'.zfill(1000000000) }}",
    "expandtabs": "{{ '\t\t'.expandtabs(1000000000) }}",
    "width by %": "{{ '%1000000000s' % 'a' }}",
    "width by % and *": "{{ '%*s' % (1000000000, 'a') }}",
    "width by format": "{{ '{:1000000000}'.format('a') }}",
    "width of a width": "{{ '{:{}}'.format('a', 1000000000) }}",
    "width of a date": "{{ strftime_now('%1000000000Y') }}",
    "indent": "{{ 'a\nb'|indent(1000000000) }}",
    "tojson": "{{ {'a': 1}|tojson(indent=1000000000) }}",
    "replace of nothing": BIG + "{{ a.replace('', a) }}",
    "replace filter": BIG + "{{ a|replace('a', a) }}",
    "join of letters": BIG + "{{ a.join(a) }}",
    "the same text again and again": BIG + "{% for i in range(99999) %}{{ a }}{% endfor %}",
    "the same in a block": BIG + "{% set x %}{% for i in range(99999) %}{{ a }}{% endfor %}{% endset %}",
    "the same in a macro": BIG + "{% macro m() %}{% for i in range(99999) %}{{ a }}{% endfor %}{% endmacro %}{% set x = m() %}",
    "the template's own text": "{% for i in range(99999) %}{% for j in range(99999) %}" + "x" * 999 + "{% endfor %}{% endfor %}",
    "copies by slices": "{% set a = 'a' * 999999 %}{% set ns = namespace(l=[]) %}"
    "{% for i in range(99999) %}{% set ns.l = ns.l + [a[1:]] %}{% endfor %}",
    "copies by a filter": "{% set a = 'a' * 999999 %}{{ (range(99999)|list)|map('replace', 0, a)|list|length }}",
    "sum of lists": "{{ ([[1]] * 99999)|sum(start=[]) }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "branching recursion": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "recursive loop": "{% for i in range(99999) recursive %}{{ loop(range(99999)) }}{% endfor %}",
    "nested brackets": "{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}",
    "syntax": "{% for %}",
    "unknown filter": "{{ 1|magic }}",
    "raises": "{{ raise_exception('System role not supported') }}",
    "field of nothing": "{{ nothing.field }}",
    "division by zero": "{{ 1 / 0 }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_an_input_error_within_its_limits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter, "MAX_SECONDS", 0.3)
    with pytest.raises(InputError, match="chat template") as caught:
        ChatTemplate(HOSTILE[name]).render({"messages": MESSAGES})
    assert "\n" not in str(caught.value)


def test_a_refusal_says_what_the_template_says() -> None:
    with pytest.raises(InputError, match="System role not supported"):
        ChatTemplate(HOSTILE["raises"]).render({})
    with pytest.raises(InputError, match="line 3"):
        ChatTemplate("a\n\n{% for %}").render({})


TAME = [
    "{{ messages[0].content }}|{{ messages[0]['role'] }}",
    "{%- for m in messages %}\n  {{- m.role | upper }}:\n{{ m.content | trim }}\n{% endfor %}\nend\n",
    "{{ messages | tojson }} {{ messages | tojson(indent=2) }} {{ 'é' | tojson(ensure_ascii=True) }}",
    "{% set ns = namespace(n=0) %}{% for c in messages[0].content %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "{% for m in messages %}{{ loop.index0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.previtem is defined }}{% endfor %}",
    "{% for i in range(5) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "{% for i in [1, 2, 3] if i != 2 %}{{ i }}{% else %}none{% endfor %}{% for i in [] %}{% else %}none{% endfor %}",
    "{% for k, v in messages[0] | items %}{{ k }}={{ v }};{% endfor %}{% for k, v in messages[0].items() %}{{ k }}{% endfor %}",
    "{% macro m(x, y=2) %}[{{ x }}{{ y }}]{% endmacro %}{{ m(1) }}{{ m('a', y='b') ~ 'c' ~ 1 }}",
    "{{ 'a,b,c'.split(',')[1:] | join('-') }}{{ 'a-b'.split('-')[-1] }}{{ '  x '.strip() }}{{ 'xay'.replace('a', 'b') }}",
    "{{ 'abc'.startswith('ab') }}{{ 'abc'.endswith(('c', 'd')) }}{{ 'b' in 'abc' }}{{ 'abc'[::-1] }}{{ messages[::-1] | length }}",
    "{{ '%s is %d' % ('a', 3) }}{{ '%s'|format('x') }}{{ '{} {k}'.format(1, k=2) }}"
    "{{ 'a' * 3 }}{{ 2 ** 5 }}{{ 7 // 2 }}{{ 7 % 4 }}{{ 1.5 + 2 }}",
    "{% set x %}block {{ messages[0].role }}{% endset %}{{ x }}{{ x is string }}{{ messages is iterable }}{{ 3 is odd }}",
    "{{ messages | map(attribute='role') | list }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
    "{{ messages | rejectattr('role', 'equalto', 'user') | list }}{{ [3, 1, 2] | sort | first }}{{ [1, 2] | last }}{{ [1, 2] | sum }}",
    "{{ nothing | default('d') }}{{ nothing is defined }}{{ messages[5] is defined }}{{ messages[0].nothing }}{{ nothing }}",
    "{{ dict(a=1, b='x') }}{{ {'a': [1, (2, 3)], 'b': none} }}{{ true }}{{ [1] + [2] }}{{ (1, 2) }}",
    "{% generation %}said{% endgeneration %}{% filter upper %}low{% endfilter %}{% call(x) m2() %}{{ x }}{% endcall %}"
    "{% macro m2() %}{{ caller('in') }}{% endmacro %}",
    "{{- '\\n' }}   {%- if messages and messages[0].content is string and not false %} yes {% elif 1 %} no {% endif -%}   \n  x",
    "{{ 'x' if messages else 'y' }}{{ messages[0].content | length }}{{ 'abc' | replace('b', '') | capitalize }}{{ 'a\nb' | indent(2) }}",
    "{{ messages[0].tools[0].args.x[1] | int }}{{ '3' | int + 1 }}{{ 2.567 | round(1) }}{{ [1, 1, 2] | unique | list }}{{ 'x' | string }}",
]


@pytest.mark.parametrize("source", TAME)
def test_a_tame_template_renders_as_in_transformers(source: str) -> None:
    from transformers.utils.chat_template_utils import _compile_jinja_template

    # A macro has to stand before its use in both.
    source = re.sub(r"(\{% call.*endcall %\})(.*)", r"\2\1", source, flags=re.S)
    variables: dict[str, Any] = {"messages": MESSAGES, "bos_token": "<s>", "add_generation_prompt": True}
    assert ChatTemplate(source).render(variables)[0] == _compile_jinja_template(source).render(**variables)


def test_what_a_template_marks_as_generated_is_found() -> None:
    source = (
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}!{% endgeneration %}{% endif %}{% endfor %}"
    )
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bc"}, {"role": "assistant", "content": "d"}]
    text, answers = ChatTemplate(source).render({"messages": messages})
    assert [text[start:end] for start, end in answers] == ["bc!", "d!"]


def test_a_long_but_honest_chat_renders() -> None:
    source = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] | trim + '<|im_end|>' }}{% endfor %}"
    messages = [{"role": "user", "content": "word " * 200}] * 2000
    text, _ = ChatTemplate(source).render({"messages": messages})
    assert text.count("word") == 400_000
