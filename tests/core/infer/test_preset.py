"""Presets: those that come along, a user's own, and what is refused; and code between fences, against markdown-it's rules."""

from pathlib import Path

import pytest

from llmctl.core.errors import InputError, NotFoundError, UsageError
from llmctl.core.infer.fences import fenced_code
from llmctl.core.infer.order import InOrder
from llmctl.core.infer.preset import load_preset, preset_names


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    folder = tmp_path / "llmctl" / "presets"
    folder.mkdir(parents=True)
    return folder


def test_those_that_come_along_are_whole() -> None:
    assert preset_names() == ["code", "qa", "summarize", "translate", "write"]
    for name in preset_names():
        preset = load_preset(name)
        assert preset.description
        assert "the {input}" in preset.user_text("the {input}"), "braces in a prompt are text"
        assert "{" not in (preset.system_text() or "")


def test_parameters_are_filled_in_and_set() -> None:
    preset = load_preset("translate", ("to=German = Deutsch",))
    assert preset.system_text() == (
        "You translate into German = Deutsch. You keep meaning, tone and layout, and answer with the translation alone."
    )
    assert preset.user_text("Hi {to}\n") == "Translate the following text into German = Deutsch.\n\nHi {to}\n"
    assert preset.plain_text("x") == f"{preset.system_text()}\n\n{preset.user_text('x')}"
    assert load_preset("translate").user_text("x").startswith("Translate the following text into English.")


def test_a_users_own_comes_first_and_a_path_is_a_path(own_folder: Path, tmp_path: Path) -> None:
    (own_folder / "qa.toml").write_text('template = "mine: {input} {json: 1}"\n')
    (own_folder / "limerick.toml").write_text('template = "{input}"\n[sampling]\ntop_k = 3\n')
    assert load_preset("qa").plain_text("x") == "mine: x {json: 1}"
    assert load_preset("limerick").sampling == {"top_k": 3}
    assert "limerick" in preset_names()
    other = tmp_path / "other.toml"
    other.write_text('template = "other {input}"\n')
    assert load_preset(str(other)).plain_text("x") == "other x"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("template = 3", "template: text is wanted"),
        ('template = "no place"', "{input} must stand in it"),
        ('template = "{input} {to}"', "{to} is not among the parameters (input)"),
        ('system = "{input}"\n', "system: {input} is not among the parameters"),
        ('prompt = "{input}"', "unknown key 'prompt'"),
        ("[parameters]\nto = 3", "parameters.to: text is wanted"),
        ('[parameters]\ninput = "x"', "parameters.input"),
        ("[sampling]\nheat = 3", "sampling.heat: unknown"),
        ("[sampling]\ntop_p = 3.0", "sampling.top_p: 3.0 is out of range"),
        ("template = ", "not valid TOML"),
        ("parameters = 3", "parameters: a table is wanted"),
    ],
)
def test_a_bad_file_is_told_with_its_name(own_folder: Path, content: str, words: str) -> None:
    (own_folder / "bad.toml").write_text(content + "\n")
    with pytest.raises(InputError) as caught:
        load_preset("bad")
    assert words in str(caught.value)
    assert str(own_folder / "bad.toml") in str(caught.value)


def test_what_is_not_there_is_told_with_what_is() -> None:
    with pytest.raises(NotFoundError, match=r"did you mean translate\?"):
        load_preset("tranlate")
    with pytest.raises(NotFoundError, match=r"there are code, qa"):
        load_preset("zzz")
    with pytest.raises(NotFoundError, match=r"no such file"):
        load_preset("./zzz.toml")
    with pytest.raises(UsageError, match=r"no such parameter; its parameters are to"):
        load_preset("translate", ("from=x",))
    with pytest.raises(UsageError, match=r"NAME=VALUE"):
        load_preset("translate", ("to",))


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("no code", None),
        ("`inline` and ``` not at the start", None),
        ("Sure:\n```python\nprint(1)\n```\nDone.", "print(1)\n"),
        ("```\na\n\n  b\n```\nthen\n~~~c\n```\n~~~\n", "a\n\n  b\n```\n"),
        ("````md\n```\ninner\n```\n````", "```\ninner\n```\n"),
        ("```\nnever closed\n", "never closed\n"),
        ("```\nnever closed", "never closed\n"),
        ("   ```x\n   y\n   ```", "   y\n"),
        ("    ```\nindented by four\n", None),
        ("```a`b\nnot a fence\n", None),
        ("```\n```\n", ""),
        ("```\r\na\r\n```\r\n", "a\r\n"),
    ],
)
def test_code_between_fences(text: str, code: str | None) -> None:
    assert fenced_code(text) == code


def test_things_come_out_in_order() -> None:
    order = InOrder[str]()
    assert [order.put(place, str(place)) for place in (2, 0, 3, 1, 4)] == [[], ["0"], [], ["1", "2", "3"], ["4"]]
