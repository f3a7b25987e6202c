"""Prompts and answers from rows: the published formulas, few-shot examples, and rows that are wrong."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from llmctl.core.errors import InputError, LlmctlError, NotFoundError, UsageError
from llmctl.core.evals.items import Item, Renderer, load_rows
from llmctl.core.evals.task import Task, load_task, parse_task
from tests.core.evals.tiny import CHOICE_TASK, write_rows, write_tasks


def _items(task: Task, folder: Path, *, num_fewshot: int = 0, seed: int = 1) -> list[Item]:
    data = load_rows(task.dataset, folder, task=task, labels=task.labels)
    renderer = Renderer(task, data, num_fewshot=num_fewshot, seed=seed)
    return [renderer.item(row) for row in data.rows]


def _custom(tmp_path: Path, text: str, rows: list[dict[str, Any]]) -> list[Item]:
    (tmp_path / "task.toml").write_text(text)
    write_rows(tmp_path / "animals.jsonl", rows)
    return _items(parse_task(tmp_path / "task.toml"), tmp_path)


def test_hellaswag_prompts_follow_the_published_clean_up(tmp_path: Path) -> None:
    row = {
        "activity_label": "Baking [title] cakes",
        "ctx_a": "[header] How to bake [title] Mix. [step] Stir  well.",
        "ctx_b": "then the BAKER",
        "endings": [" opens [substeps] the oven.", "sings  [x]loudly", "sleeps", "runs"],
        "label": "1",
    }
    write_rows(tmp_path / "hellaswag_val.jsonl", [row])
    (item,) = _items(load_task("hellaswag"), tmp_path)

    def published(text: str) -> str:
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")

    assert item.prompt == published(f"{row['activity_label']}: {row['ctx_a']} Then the baker")
    assert item.prompt == "Baking. cakes: How to bake. Mix. Stir well. Then the baker"
    assert item.texts == tuple(published(ending) for ending in row["endings"])
    assert item.continuations == tuple(" " + text for text in item.texts)
    assert item.gold == 1


def test_piqa_takes_labels_from_their_own_file(tmp_path: Path) -> None:
    write_rows(
        tmp_path / "piqa_valid.jsonl", [{"goal": "open a jar", "sol1": "twist", "sol2": "shout "}, {"goal": "g", "sol1": "a", "sol2": "b"}]
    )
    (tmp_path / "piqa_valid-labels.lst").write_text("0\n1\n")
    first, second = _items(load_task("piqa"), tmp_path)
    assert first.prompt == "Question: open a jar\nAnswer:"
    assert first.continuations == (" twist", " shout ")
    assert (first.gold, second.gold) == (0, 1)


def test_lambada_asks_for_the_last_word(tmp_path: Path) -> None:
    write_rows(tmp_path / "lambada_test.openai.jsonl", [{"text": "He said\n\nno to Jean-Luc"}])
    (item,) = _items(load_task("lambada_openai"), tmp_path)
    assert (item.prompt, item.continuations, item.gold) == ("He said\n\nno to", (" Jean-Luc",), 0)


def test_labels_of_another_length_are_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "piqa_valid.jsonl", [{"goal": "g", "sol1": "a", "sol2": "b"}])
    (tmp_path / "piqa_valid-labels.lst").write_text("0\n1\n")
    with pytest.raises(InputError, match="2 labels for the 1 rows"):
        _items(load_task("piqa"), tmp_path)


def test_examples_are_solved_distinct_and_never_the_question_itself(tmp_path: Path) -> None:
    path, _ = write_tasks(tmp_path, num_items=5)
    task = parse_task(path)
    plain = _items(task, tmp_path)
    solved = {item.prompt + item.continuations[item.gold]: item.index for item in plain}
    for item in _items(task, tmp_path, num_fewshot=4):
        *shots, question = item.prompt.split("\n\n")
        assert question == plain[item.index].prompt
        assert {solved[shot] for shot in shots} == set(range(5)) - {item.index}


def test_examples_depend_on_seed_and_row_alone(tmp_path: Path) -> None:
    path, _ = write_tasks(tmp_path, num_items=9)
    task = parse_task(path)
    data = load_rows(task.dataset, tmp_path, task=task, labels=None)
    renderer = Renderer(task, data, num_fewshot=2, seed=3)
    forward = [renderer.item(row) for row in data.rows]
    assert [renderer.item(row) for row in reversed(data.rows)][::-1] == forward
    assert _items(task, tmp_path, num_fewshot=2, seed=3) == forward
    assert _items(task, tmp_path, num_fewshot=2, seed=4) != forward
    assert len({item.prompt.rpartition("\n\n")[0] for item in forward}) > 1


def test_more_examples_than_rows_is_a_usage_error(tmp_path: Path) -> None:
    path, _ = write_tasks(tmp_path, num_items=3)
    with pytest.raises(UsageError, match=r"--num-fewshot 3: .* only 2 examples"):
        _items(parse_task(path), tmp_path, num_fewshot=3)


def test_examples_of_their_own_file(tmp_path: Path) -> None:
    write_rows(tmp_path / "animals.jsonl", [{"q": "x", "options": ["a", "b"], "answer": 0}])
    write_rows(tmp_path / "train.jsonl", [{"q": "t", "options": ["c", "d"], "answer": 1}])
    (tmp_path / "task.toml").write_text(CHOICE_TASK + 'description = "Answer.\\n"\nfewshot_dataset = "train.jsonl"\n')
    task = parse_task(tmp_path / "task.toml")
    data = load_rows(task.dataset, tmp_path, task=task, labels=None)
    examples = load_rows(task.fewshot_dataset, tmp_path, task=task, labels=None)
    item = Renderer(task, data, num_fewshot=1, seed=0, examples=examples).item(data.rows[0])
    assert item.prompt == "Answer.\nQ: t\nA: d\n\nQ: x\nA:"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"options": ["a", "b"], "answer": 0}, "template context of .*'q' is undefined"),
        ({"q": "x", "options": ["a"], "answer": 0}, "'options' must be a list of at least two texts"),
        ({"q": "x", "options": ["a", 2], "answer": 0}, "'options' must be a list"),
        ({"q": "x", "answer": 0}, "'options' must be a list"),
        ({"q": "x", "options": ["a", ""], "answer": 0}, "choice 1 is empty"),
        ({"q": "x", "options": ["a", "b"], "answer": 2}, "'2' is not an index from 0 to 1"),
        ({"q": "x", "options": ["a", "b"], "answer": -1}, "'-1' is not an index"),
        ({"q": "x", "options": ["a", "b"], "answer": "²"}, "is not an index"),
        ({"q": "\ud83d", "options": ["a", "b"], "answer": 0}, "half a surrogate pair in context"),
        ({"q": "x", "options": ["a", "\udc00"], "answer": 0}, "half a surrogate pair in 'options'"),
    ],
)
def test_a_wrong_row_is_named_by_file_and_line(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    good = {"q": "x", "options": ["a", "b"], "answer": 0}
    with pytest.raises(InputError, match=message) as caught:
        _custom(tmp_path, CHOICE_TASK, [good, row])
    assert str(caught.value).startswith(f"{tmp_path / 'animals.jsonl'}:2")


def test_gold_may_be_the_text_of_a_choice(tmp_path: Path) -> None:
    text = CHOICE_TASK + 'gold_is = "text"\n'
    (item,) = _custom(tmp_path, text, [{"q": "x", "options": ["3", "1"], "answer": "1"}])
    assert item.gold == 1
    with pytest.raises(InputError, match="'7' is not among the choices"):
        _custom(tmp_path, text, [{"q": "x", "options": ["3", "1"], "answer": "7"}])


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ q.__init__.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    ],
)
def test_templates_are_sandboxed(template: str, tmp_path: Path) -> None:
    with pytest.raises(LlmctlError):
        _custom(tmp_path, CHOICE_TASK.replace("Q: {{ q }}\\nA:", template), [{"q": "x", "options": ["a", "b"], "answer": 0}])


def test_a_template_that_does_not_parse_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"template context of .*task\.toml, line 2"):
        _custom(tmp_path, CHOICE_TASK.replace("{{ q }}", "{{ q"), [{"q": "x", "options": ["a", "b"], "answer": 0}])


def _load(folder: Path) -> None:
    (folder / "task.toml").write_text(CHOICE_TASK)
    load_rows(["animals.jsonl", "animals.jsonl.gz"], folder, task=parse_task(folder / "task.toml"), labels=None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no rows"),
        (b"\n \n", "no rows"),
        (b'{"a": 1}\n{oops}\n', "animals.jsonl:2: not valid JSON"),
        (b'{"a": 1}\n[1]\n', "animals.jsonl:2: a JSON object is wanted"),
        (b'{"a": NaN}\n', "animals.jsonl:1: NaN is not JSON"),
        (b'{"a": "\xff"}\n', "animals.jsonl:1: not UTF-8"),
        (b"[" * 100_000, "animals.jsonl:1"),
    ],
)
def test_bad_data_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "animals.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=message):
        _load(tmp_path)


def test_missing_data_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"animals\.jsonl or animals\.jsonl\.gz"):
        _load(tmp_path)


def test_a_cut_gzip_is_named(tmp_path: Path) -> None:
    whole = gzip.compress(json.dumps({"q": "x" * 1000}).encode() * 50)
    (tmp_path / "animals.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"animals\.jsonl\.gz: the gzip stream is cut"):
        _load(tmp_path)


def test_the_hash_is_of_the_content_not_of_the_compression(tmp_path: Path) -> None:
    path, _ = write_tasks(tmp_path)
    task = parse_task(path)
    content = (tmp_path / "animals.jsonl").read_bytes()
    plain = load_rows(["animals.jsonl"], tmp_path, task=task, labels=None)
    (tmp_path / "animals.jsonl.gz").write_bytes(gzip.compress(content))
    packed = load_rows(["animals.jsonl.gz"], tmp_path, task=task, labels=None)
    assert (plain.sha256, plain.rows) == (packed.sha256, packed.rows)
