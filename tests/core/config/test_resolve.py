"""One config truth: which layer wins, where a value came from, and how a wrong one is named."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.core.config import check_fields, option, resolve
from llmctl.core.config.fields import flag_of, options_of, types_of
from llmctl.core.config.resolve import parse_text
from llmctl.core.errors import LlmctlError, NotFoundError, UsageError


@dataclass(frozen=True)
class Settings:
    """One field of each type."""

    max_steps: int = option(10, "h", minimum=0, maximum=1000)
    top_p: float = option(1.0, "h", above=0, maximum=1)
    device: str = option("auto", "h", choices=("auto", "cpu"))
    compile: bool = option(False, "h")
    stop: tuple[str, ...] = option((), "h")
    model: str | None = option(None, "h")
    out_dir: Path | None = option(None, "h")
    inner: int = 3

    def __post_init__(self) -> None:
        check_fields(self)


VALUES: dict[str, list[Any]] = {
    "max_steps": [1, 2, 3],
    "top_p": [0.1, 0.2, 0.3],
    "device": ["cpu", "auto", "cpu"],
    "compile": [True, False, True],
    "stop": [("a",), ("b", "c"), ()],
    "model": ["m1", "m2", "m3"],
    "out_dir": [Path("o1"), Path("o2"), Path("o3")],
}


def as_text(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)


def as_toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ",".join(as_toml(v) for v in value) + "]"
    return repr(value) if isinstance(value, int | float) else f'"{value}"'


def layered(
    flags: dict[str, Any] | None = None, environ: dict[str, str] | None = None, toml: str | bytes | None = None, folder: Path | None = None
) -> Any:
    """Resolve Settings from the given layers, for the command "tokenize pack"."""
    path = None
    if toml is not None:
        assert folder is not None
        path = folder / "run.toml"
        path.write_bytes(toml.encode() if isinstance(toml, str) else toml)
    return resolve(Settings, command="tokenize pack", flags=flags or {}, config_file=path, environ=environ or {})


def test_defaults() -> None:
    resolved = layered()
    assert resolved.config == Settings()
    assert set(resolved.origins.values()) == {"default"}
    assert "inner" not in resolved.origins


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(list(VALUES)), st.sets(st.sampled_from(["flag", "environment", "file"]))))
def test_the_strongest_layer_that_gives_a_value_wins(tmp_path_factory: pytest.TempPathFactory, given_in: dict[str, set[str]]) -> None:
    folder = tmp_path_factory.mktemp("layers")
    flags = {name: VALUES[name][0] for name, layers in given_in.items() if "flag" in layers}
    environ = {
        f"LLMCTL_TOKENIZE_PACK_{name.upper()}": as_text(VALUES[name][1]) for name, layers in given_in.items() if "environment" in layers
    }
    toml = "".join(f"{name} = {as_toml(VALUES[name][2])}\n" for name, layers in given_in.items() if "file" in layers)
    resolved = layered(flags, environ, toml, folder)
    for name in VALUES:
        layers = given_in.get(name, set())
        if "flag" in layers:
            expected, origin = VALUES[name][0], "flag"
        elif "environment" in layers:
            expected, origin = VALUES[name][1], f"environment LLMCTL_TOKENIZE_PACK_{name.upper()}"
        elif "file" in layers:
            expected, origin = VALUES[name][2], f"file {folder / 'run.toml'}"
        else:
            expected, origin = getattr(Settings(), name), "default"
        assert (getattr(resolved.config, name), resolved.origins[name]) == (expected, origin)


def test_llmctl_model_is_read_and_the_commands_own_variable_is_stronger() -> None:
    assert layered(environ={"LLMCTL_MODEL": "a"}).config.model == "a"
    resolved = layered(environ={"LLMCTL_MODEL": "a", "LLMCTL_TOKENIZE_PACK_MODEL": "b"})
    assert (resolved.config.model, resolved.origins["model"]) == ("b", "environment LLMCTL_TOKENIZE_PACK_MODEL")
    assert layered({"model": "c"}, {"LLMCTL_MODEL": "a"}).origins["model"] == "flag"


def test_pretrain_does_not_start_from_llmctl_model() -> None:
    resolved = resolve(Settings, command="pretrain", flags={}, config_file=None, environ={"LLMCTL_MODEL": "a"})
    assert resolved.config.model == Settings().model
    assert resolve(Settings, command="pretrain", flags={}, config_file=None, environ={"LLMCTL_PRETRAIN_MODEL": "b"}).config.model == "b"


def test_another_commands_variables_do_not_matter() -> None:
    assert layered(environ={"LLMCTL_PRETRAIN_MAX_STEPS": "x", "LLMCTL_TEST_DATA": "/data"}).config == Settings()


def test_kebab_case_keys_are_accepted_in_a_file(tmp_path: Path) -> None:
    assert layered(toml="max-steps = 7\n", folder=tmp_path).config.max_steps == 7


def test_a_whole_number_is_a_number_but_not_the_other_way_round(tmp_path: Path) -> None:
    assert layered(toml="top_p = 1\n", folder=tmp_path).config.top_p == 1.0
    with pytest.raises(UsageError, match=r"max_steps.*whole number.*7\.0"):
        layered(toml="max_steps = 7.0\n", folder=tmp_path)


@pytest.mark.parametrize(
    ("toml", "parts"),
    [
        ("max_stepz = 1", ["run.toml", "max_stepz", "did you mean 'max_steps'"]),
        ("zzzzzzzz = 1", ["zzzzzzzz", "the keys are", "top_p"]),
        ("inner = 1", ["inner"]),
        ("max_steps = 1\nmax_steps = 2", ["run.toml", "line 2", "max_steps = 2"]),
        ("max_steps = ", ["run.toml", "line 1"]),
        ("max_steps = true", ["max_steps", "whole number", "True"]),
        ("compile = 1", ["compile", "true or false"]),
        ("compile = 'yes'", ["compile", "true or false"]),
        ("stop = 'x'", ["stop", "list"]),
        ("stop = ['x', 3]", ["stop", "text", "3"]),
        ("device = 'tpu'", ["run.toml", "--device", "tpu", "auto, cpu"]),
        ("top_p = nan", ["run.toml", "--top-p", "finite"]),
        ("top_p = 0", ["run.toml", "--top-p", "above 0"]),
        ("max_steps = 1001", ["run.toml", "--max-steps", "at most 1000"]),
        ("[tokenize.pack]\nmax_steps = 1", ["run.toml", "tokenize"]),
        (b"model = '\xff'", ["run.toml", "UTF-8", "byte 9"]),
    ],
)
def test_a_wrong_file_is_named_with_its_key(toml: str | bytes, parts: list[str], tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        layered(toml=toml, folder=tmp_path)
    for part in parts:
        assert part in str(caught.value)


def test_a_wrong_value_in_the_file_is_named_even_if_a_flag_overrides_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"run\.toml"):
        layered({"max_steps": 1}, toml="max_steps = -1", folder=tmp_path)


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such file"):
        resolve(Settings, command="x", flags={}, config_file=tmp_path / "none.toml", environ={})
    with pytest.raises(UsageError, match="directory"):
        resolve(Settings, command="x", flags={}, config_file=tmp_path, environ={})


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("MAX_STEPS", "abc", ["LLMCTL_TOKENIZE_PACK_MAX_STEPS", "'abc'", "whole number"]),
        ("MAX_STEPS", "1.5", ["LLMCTL_TOKENIZE_PACK_MAX_STEPS", "whole number"]),
        ("MAX_STEPS", "-1", ["LLMCTL_TOKENIZE_PACK_MAX_STEPS", "at least 0"]),
        ("TOP_P", "inf", ["LLMCTL_TOKENIZE_PACK_TOP_P", "finite"]),
        ("COMPILE", "perhaps", ["LLMCTL_TOKENIZE_PACK_COMPILE", "neither true nor false"]),
        ("DEVICE", "tpu", ["LLMCTL_TOKENIZE_PACK_DEVICE", "auto, cpu"]),
        ("MAX_STEP", "1", ["LLMCTL_TOKENIZE_PACK_MAX_STEP", "llmctl tokenize pack", "did you mean 'max_steps'"]),
    ],
)
def test_a_wrong_variable_is_named(name: str, text: str, parts: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        layered(environ={f"LLMCTL_TOKENIZE_PACK_{name}": text})
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("text", ["1", "true", "YES", "On"])
def test_words_for_true(text: str) -> None:
    assert layered(environ={"LLMCTL_TOKENIZE_PACK_COMPILE": text}).config.compile is True


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, -1.0, 1.0001])
def test_numbers_out_of_bounds_are_refused_by_the_dataclass_itself(value: float) -> None:
    with pytest.raises(UsageError, match="--top-p"):
        Settings(top_p=value)


@pytest.mark.parametrize(
    ("name", "value"), [("max_steps", None), ("max_steps", "1"), ("max_steps", True), ("device", None), ("stop", (1,))]
)
def test_values_of_another_type_are_refused_by_the_dataclass_itself(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match="--" + name.replace("_", "-")):
        Settings(**{name: value})


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.binary(max_size=60), st.text(max_size=60).map(lambda text: ("max_steps = " + text).encode("utf-8", "ignore"))))
def test_no_file_content_escapes_as_another_exception(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    try:
        layered(toml=content, folder=tmp_path_factory.mktemp("fuzz"))
    except LlmctlError as error:
        message = str(error)
    else:
        return
    assert "run.toml" in message


@settings(deadline=None)
@given(st.text(max_size=20), st.sampled_from([f.name for f in options_of(Settings)]))
def test_no_text_escapes_as_another_exception(text: str, name: str) -> None:
    try:
        parse_text(text, types_of(Settings)[name], "here")
    except UsageError as error:
        message = str(error)
    else:
        return
    assert message.startswith("here: ")


def test_the_flags_are_the_fields_in_kebab_case() -> None:
    assert [flag_of(f) for f in options_of(Settings)] == [
        "--max-steps", "--top-p", "--device", "--compile", "--stop", "--model", "--out-dir",
    ]  # fmt: skip
