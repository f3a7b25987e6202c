"""Task files: the built-in ones, and what is refused, by file and key."""

from pathlib import Path

import pytest

from llmctl.core.errors import InputError, NotFoundError, UsageError
from llmctl.core.evals.task import built_in_tasks, load_task, parse_task
from tests.core.evals.tiny import CHOICE_TASK, WORD_TASK


def test_the_built_in_tasks_are_read() -> None:
    assert {"hellaswag", "lambada_openai", "piqa"} <= set(built_in_tasks())
    for name in built_in_tasks():
        task = load_task(name)
        assert task.name == name
        assert task.metrics


def test_an_unknown_name_gets_the_nearest_one() -> None:
    with pytest.raises(UsageError, match="did you mean 'hellaswag'"):
        load_task("helaswag")
    with pytest.raises(UsageError, match="built-in ones are"):
        load_task("zzz")


def test_a_missing_path_is_not_found() -> None:
    with pytest.raises(NotFoundError, match=r"nowhere\.toml"):
        load_task("nowhere.toml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "task file is empty"),
        ("= 1", "not valid TOML.*line 1"),
        (CHOICE_TASK.replace('"animals"', '"a b"'), "letters, digits"),
        (CHOICE_TASK + 'metric = ["acc"]', "unknown key 'metric'; did you mean 'metrics'"),
        (CHOICE_TASK.replace("multiple_choice", "generate"), "not supported by this version"),
        (CHOICE_TASK.replace("multiple_choice", "essay"), "is not one of"),
        (CHOICE_TASK.replace('"acc_norm"', '"perplexity"'), "'perplexity' is not a metric of kind"),
        (CHOICE_TASK.replace('"acc_norm"', '"acc"'), "twice"),
        (CHOICE_TASK.replace('choices = "options"', "choices = ['only']"), "choices: a list of at least two"),
        (CHOICE_TASK.replace('gold = "{{ answer }}"', ""), "'gold' is missing"),
        (CHOICE_TASK + 'target = "x"', "target belongs to kind = 'continuation'"),
        (WORD_TASK + 'choices = "x"', "choices belongs to kind = 'multiple_choice'"),
        (CHOICE_TASK.replace('"animals.jsonl"', '"../secret.jsonl"'), "leaves its folder"),
        (CHOICE_TASK.replace('"animals.jsonl"', '"/etc/passwd"'), "leaves its folder"),
        (CHOICE_TASK + "strip = 1", "true or false"),
        (CHOICE_TASK + 'gold_is = "letter"', "'index' or 'text'"),
        (CHOICE_TASK + 'replace = [{ pattern = "(", with = "" }]', "step 1: bad regular expression"),
        (CHOICE_TASK + "replace = [{ pattern = '(a)', with = '\\2' }]", "step 1: bad regular expression"),
        (CHOICE_TASK + 'replace = [{ text = "a" }]', "step 1: a table of `with`"),
        (CHOICE_TASK + "context = 1", "not valid TOML"),
    ],
)
def test_a_bad_task_file_is_named_with_its_key(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "task.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        parse_task(path)
    assert str(caught.value).startswith(str(path))


def test_a_task_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "task.toml").write_bytes(b'name = "\xff"')
    with pytest.raises(InputError, match="not UTF-8 at byte 8"):
        parse_task(tmp_path / "task.toml")


def test_clean_up_steps_run_in_order(tmp_path: Path) -> None:
    path = tmp_path / "task.toml"
    path.write_text(CHOICE_TASK + "strip = true\nreplace = [{ text = 'a', with = 'b' }, { pattern = 'b+', with = 'c' }]")
    assert parse_task(path).clean("  aab d ") == "c d"
