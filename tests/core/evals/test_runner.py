"""Whole evaluations on a tiny model: resumed, disturbed and repeated, against unbroken runs and brute force."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmctl.core.config.evaluate import EvaluateConfig
from llmctl.core.errors import InputError, Interrupted, NotFoundError, UsageError
from llmctl.core.evals import runner
from llmctl.core.evals.events import Event, ItemScored, ModelReady, Progressed, TaskScored, TextScored, Warned
from llmctl.core.evals.gates import check_gates
from llmctl.core.evals.runner import evaluate, plan_batches
from tests.core.evals.tiny import SENTENCES, load, oracle, write_rows, write_tasks


def _config(model_dir: Path, tmp_path: Path, **settings: Any) -> EvaluateConfig:
    settings.setdefault("cache_dir", tmp_path / "cache")
    settings.setdefault("batch_size", 4)
    return EvaluateConfig(model=str(model_dir), device="cpu", **settings)


def _run(config: EvaluateConfig, stop: Callable[[], int | None] = lambda: None) -> list[Event]:
    return list(evaluate(config, stop=stop))


def _items(events: list[Event]) -> list[ItemScored]:
    return [event for event in events if isinstance(event, ItemScored)]


def _result(events: list[Event]) -> TaskScored:
    (result,) = [event for event in events if isinstance(event, TaskScored)]
    return result


@pytest.fixture
def tasks(tmp_path: Path) -> tuple[str, ...]:
    """Paths of the two invented tasks."""
    return tuple(str(path) for path in write_tasks(tmp_path))


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one entry, the number of groups, with every batch that is computed."""
    counted: list[int] = []
    real = runner.score_groups

    def counting(model: Any, groups: Any) -> Any:
        counted.append(len(groups))
        return real(model, groups)

    monkeypatch.setattr(runner, "score_groups", counting)
    return counted


def test_scores_equal_a_brute_force_written_from_the_formulas(model_dir: Path, tmp_path: Path, tasks: tuple[str, ...]) -> None:
    events = _run(_config(model_dir, tmp_path, tasks=tasks))
    _, tokenizer = load(model_dir)
    log_probabilities = oracle(model_dir)

    def log_likelihood(prompt: str, continuation: str) -> float:
        context, whole = tokenizer.encode(prompt), tokenizer.encode(prompt + continuation)
        rows = log_probabilities(whole)
        return sum(float(rows[i - 1, whole[i]]) for i in range(len(context), len(whole)))

    for item in _items(events):
        expected = [log_likelihood(item.prompt, choice) for choice in item.choices]
        assert list(item.log_likelihoods) == pytest.approx(expected, abs=1e-3)
    results = {event.name: {m.name: m.value for m in event.metrics} for event in events if isinstance(event, TaskScored)}
    animals = [item for item in _items(events) if item.task == "animals"]
    best = [max(range(len(item.choices)), key=lambda k, item=item: item.log_likelihoods[k]) for item in animals]
    assert results["animals"]["acc"] == sum(b == item.gold for b, item in zip(best, animals, strict=True)) / len(animals)
    words = [item.log_likelihoods[0] for item in _items(events) if item.task == "words"]
    assert results["words"]["perplexity"] == pytest.approx(math.exp(-sum(words) / len(words)))


def test_items_come_in_the_order_of_the_data(model_dir: Path, tmp_path: Path, tasks: tuple[str, ...]) -> None:
    items = _items(_run(_config(model_dir, tmp_path, tasks=tasks[:1])))
    assert [item.index for item in items] == list(range(12))
    assert [item.line for item in items] == list(range(1, 13))


@pytest.mark.parametrize("num_fewshot", [0, 2])
def test_batches_of_1_and_8_agree_within_rounding(model_dir: Path, tmp_path: Path, tasks: tuple[str, ...], num_fewshot: int) -> None:
    one, eight = (
        _items(_run(_config(model_dir, tmp_path, tasks=tasks, batch_size=size, num_fewshot=num_fewshot, cache=False))) for size in (1, 8)
    )
    for a, b in zip(one, eight, strict=True):
        assert (a.task, a.index, a.greedy, a.values.keys()) == (b.task, b.index, b.greedy, b.values.keys())
        assert a.log_likelihoods == pytest.approx(b.log_likelihoods, abs=1e-4)


def test_rows_in_another_order_get_the_same_scores(model_dir: Path, tmp_path: Path) -> None:
    path, _ = write_tasks(tmp_path)
    straight = _items(_run(_config(model_dir, tmp_path, tasks=(str(path),), cache=False)))
    lines = (tmp_path / "animals.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "animals.jsonl").write_text("".join(reversed(lines)))
    turned = _items(_run(_config(model_dir, tmp_path, tasks=(str(path),), cache=False)))[::-1]
    for a, b in zip(straight, turned, strict=True):
        assert a.prompt == b.prompt
        assert a.log_likelihoods == pytest.approx(b.log_likelihoods, abs=1e-4)


@pytest.mark.parametrize("num_batches", [0, 1, 3, 5])
def test_an_interrupted_run_goes_on_and_ends_with_the_same_bits(
    model_dir: Path, tmp_path: Path, tasks: tuple[str, ...], forwards: list[int], num_batches: int
) -> None:
    unbroken = _run(_config(model_dir, tmp_path, tasks=tasks, cache=False))
    total = len(forwards)
    forwards.clear()
    config = _config(model_dir, tmp_path, tasks=tasks)
    with pytest.raises(Interrupted, match="same command goes on") as caught:
        _run(config, stop=lambda: 15 if len(forwards) >= num_batches else None)
    assert caught.value.exit_code == 143
    resumed = _run(config)
    assert len(forwards) == total
    assert [(i.task, i.index, i.log_likelihoods, i.values) for i in _items(resumed)] == [
        (i.task, i.index, i.log_likelihoods, i.values) for i in _items(unbroken)
    ]
    assert [e.metrics for e in resumed if isinstance(e, TaskScored)] == [e.metrics for e in unbroken if isinstance(e, TaskScored)]


def test_a_signal_during_the_last_batch_is_not_lost(model_dir: Path, tmp_path: Path, tasks: tuple[str, ...], forwards: list[int]) -> None:
    _run(_config(model_dir, tmp_path, tasks=tasks, cache=False))
    total = len(forwards)
    forwards.clear()
    config = _config(model_dir, tmp_path, tasks=tasks)
    with pytest.raises(Interrupted):
        _run(config, stop=lambda: 2 if len(forwards) == total else None)
    assert [event.num_computed for event in _run(config) if isinstance(event, TaskScored)] == [0, 0]


def test_a_failure_after_all_inference_costs_no_second_inference(
    model_dir: Path, tmp_path: Path, tasks: tuple[str, ...], forwards: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(model_dir, tmp_path, tasks=tasks[:1])
    with monkeypatch.context() as patch:
        patch.setattr(runner, "aggregate", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            _run(config)
    assert forwards
    forwards.clear()
    result = _result(_run(config))
    assert forwards == []
    assert (result.num_reused, result.num_computed) == (12, 0)


def test_a_damaged_row_is_computed_again_to_the_same_bits(model_dir: Path, tmp_path: Path, tasks: tuple[str, ...]) -> None:
    config = _config(model_dir, tmp_path, tasks=tasks[:1])
    first = _items(_run(config))
    (file,) = (tmp_path / "cache").glob("*.jsonl")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    events = _run(config)
    assert any(isinstance(event, Warned) and "damaged" in event.text for event in events)
    assert 0 < _result(events).num_computed < 12
    assert [i.log_likelihoods for i in _items(events)] == [i.log_likelihoods for i in first]


@pytest.mark.parametrize("change", [{"limit": 5}, {"num_fewshot": 1}, {"batch_size": 3}, {"seq_len": 40}, {"bos": "yes"}])
def test_scores_of_other_settings_are_not_reused(model_dir: Path, tmp_path: Path, tasks: tuple[str, ...], change: dict[str, Any]) -> None:
    _run(_config(model_dir, tmp_path, tasks=tasks[:1]))
    assert _result(_run(_config(model_dir, tmp_path, tasks=tasks[:1], **change))).num_reused == 0


def test_another_models_scores_are_not_reused(model_dir: Path, tmp_path: Path, tasks: tuple[str, ...]) -> None:
    from tests.core.evals.tiny import write_model

    _run(_config(model_dir, tmp_path, tasks=tasks[:1]))
    other = write_model(tmp_path / "other", seed=1)
    assert _result(_run(_config(other, tmp_path, tasks=tasks[:1]))).num_reused == 0


def test_data_changed_since_an_interrupted_run_is_refused(
    model_dir: Path, tmp_path: Path, tasks: tuple[str, ...], forwards: list[int]
) -> None:
    config = _config(model_dir, tmp_path, tasks=tasks[:1])
    with pytest.raises(Interrupted):
        _run(config, stop=lambda: 2 if forwards else None)
    with open(tmp_path / "animals.jsonl", "a") as file:
        file.write('{"q": "new", "options": ["a", "b"], "answer": 0}\n')
    with pytest.raises(InputError, match=r"animals\.jsonl has changed since"):
        _run(config)
    assert _result(_run(_config(model_dir, tmp_path, tasks=tasks[:1], restart=True))).num_items == 13


def test_prompts_that_do_not_fit_are_cut_counted_and_told(model_dir: Path, tmp_path: Path, tasks: tuple[str, ...]) -> None:
    events = _run(_config(model_dir, tmp_path, tasks=tasks[:1], num_fewshot=3))
    result = _result(events)
    assert 0 < result.num_cut_items <= 12
    assert result.num_cut_tokens >= result.num_cut_items
    assert any(
        isinstance(event, Warned) and f"{result.num_cut_items} of 12 prompts did not fit 64 tokens" in event.text for event in events
    )
    log_probabilities = oracle(model_dir)
    _, tokenizer = load(model_dir)
    for item in _items(events):
        context = tokenizer.encode(item.prompt)
        for choice, value in zip(item.choices, item.log_likelihoods, strict=True):
            whole = tokenizer.encode(item.prompt + choice)
            num_scored = len(whole) - len(context)
            kept = whole[-65:]
            rows = log_probabilities(kept[:-1])[-num_scored:]
            expected = float(rows.gather(1, torch.tensor(kept[-num_scored:])[:, None]).sum())
            assert value == pytest.approx(expected, abs=1e-3)


def test_limit_takes_the_first_items_and_progress_counts_to_the_end(model_dir: Path, tmp_path: Path, tasks: tuple[str, ...]) -> None:
    events = _run(_config(model_dir, tmp_path, tasks=tasks[:1], limit=7))
    assert _result(events).num_items == 7
    steps = [event.num_done for event in events if isinstance(event, Progressed)]
    assert steps == sorted(steps)
    assert steps[-1] == 7


def test_batches_hold_whole_items_and_are_sorted_by_length(model_dir: Path, tmp_path: Path, tasks: tuple[str, ...]) -> None:
    from llmctl.core.evals.tokens import BatchLimit, Prefix, encode_items

    config = _config(model_dir, tmp_path, tasks=tasks[:1])
    _, tokenizer = load(model_dir)
    prepared = runner.prepare_task(tasks[0], config)
    questions = list(encode_items(tokenizer, prepared.items, prefix=Prefix(tokenizer, "no"), context_size=64))
    batches = plan_batches(questions, BatchLimit(7))
    assert sorted(q.item.index for batch in batches for q in batch) == list(range(12))
    assert all(sum(q.num_sequences for q in batch) <= 7 for batch in batches)
    lengths = [q.longest for batch in batches for q in batch]
    assert lengths == sorted(lengths, reverse=True)
    assert all(len(batch) == 1 for batch in plan_batches(questions, BatchLimit(1)))
    for batch in plan_batches(questions, BatchLimit(100, 400)):
        assert len(batch) == 1 or batch[0].longest * sum(q.num_sequences for q in batch) <= 400


def _text_results(events: list[Event]) -> list[TextScored]:
    return [event for event in events if isinstance(event, TextScored)]


def test_text_files_and_json_lines_and_their_total(model_dir: Path, tmp_path: Path) -> None:
    text, rows = tmp_path / "a.txt", tmp_path / "b.jsonl"
    text.write_text(" ".join(SENTENCES), encoding="utf-8")
    write_rows(rows, [{"body": sentence} for sentence in SENTENCES])
    first, second, total = _text_results(_run(_config(model_dir, tmp_path, texts=(text, rows), field="body")))
    _, tokenizer = load(model_dir)
    lengths = tokenizer.token_bytes()
    ids = [tokenizer.encode(sentence) for sentence in SENTENCES]
    assert second.num_documents == len(SENTENCES)
    assert second.num_scored_tokens == sum(len(document) - 1 for document in ids)
    assert second.num_scored_bytes == sum(len(s.encode()) for s in SENTENCES) - sum(int(lengths[document[0]]) for document in ids)
    log_probabilities = oracle(model_dir)
    nats = -sum(float(log_probabilities(document[:i])[-1, document[i]]) for document in ids for i in range(1, len(document)))
    assert second.nll_nats == pytest.approx(nats, abs=2e-3)
    assert total.name == "all texts"
    assert total.nll_nats == pytest.approx(first.nll_nats + second.nll_nats)
    assert total.num_scored_bytes == first.num_scored_bytes + second.num_scored_bytes


def test_bos_makes_the_first_token_count(model_dir: Path, tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("a dog")
    (result,) = _text_results(_run(_config(model_dir, tmp_path, texts=(text,), bos="yes")))
    assert result.bos == "<|endoftext|>"  # this tokenizer has no BOS: the end-of-text token stands in
    assert (result.num_scored_tokens, result.num_scored_bytes) == (5, 5)


def test_an_interrupted_text_goes_on_with_the_same_bits(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmctl.core.evals import perplexity

    counted: list[int] = []
    real = perplexity.score_sequences
    monkeypatch.setattr(perplexity, "score_sequences", lambda *a: counted.append(1) or real(*a))
    text = tmp_path / "a.txt"
    text.write_text(" ".join(SENTENCES) * 9, encoding="utf-8")
    settings: dict[str, Any] = {"texts": (text,), "seq_len": 16, "stride": 4}
    (unbroken,) = _text_results(_run(_config(model_dir, tmp_path, cache=False, **settings)))
    total = len(counted)
    counted.clear()
    config = _config(model_dir, tmp_path, **settings)
    with pytest.raises(Interrupted):
        _run(config, stop=lambda: 1 if len(counted) >= 5 else None)
    (resumed,) = _text_results(_run(config))
    assert len(counted) == total
    assert resumed.metrics == unbroken.metrics
    assert resumed.num_reused == 5 * 4
    text.write_text(" ".join(SENTENCES) * 9 + "!", encoding="utf-8")
    (longer,) = _text_results(_run(config))
    assert longer.num_scored_tokens == unbroken.num_scored_tokens + 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a b"}\n{"body": "c"}\n', r"b\.jsonl:2: no text in the field 'text'.*its fields are body"),
        (b'{"text": null}\n', r"b\.jsonl:1: no text in the field"),
        (b"[1]\n", r"b\.jsonl:1: no JSON object"),
        (b'{"text": "\\ud800"}\n', r"b\.jsonl:1: half a surrogate"),
        (b"", "nothing to score"),
    ],
)
def test_bad_json_lines_are_named(model_dir: Path, tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "b.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=message):
        _run(_config(model_dir, tmp_path, texts=(tmp_path / "b.jsonl",)))


def test_bad_utf8_and_missing_files_are_named(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\ntwo \xff\n")
    with pytest.raises(InputError, match=r"a\.txt:2: not valid UTF-8 at byte 8"):
        _run(_config(model_dir, tmp_path, texts=(tmp_path / "a.txt",)))
    with pytest.raises(NotFoundError, match=r"zzz\.txt"):
        _run(_config(model_dir, tmp_path, texts=(tmp_path / "zzz.txt",)))


def test_a_context_beyond_the_model_is_a_usage_error(model_dir: Path, tmp_path: Path, tasks: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="--seq-len 65: the model reads at most 64"):
        _run(_config(model_dir, tmp_path, tasks=tasks, seq_len=65))


def test_data_is_looked_for_before_the_model(tmp_path: Path) -> None:
    nowhere = tmp_path / "no-model"
    with pytest.raises(UsageError, match="--data DIR"):
        _run(_config(nowhere, tmp_path, tasks=("piqa",)))
    with pytest.raises(NotFoundError, match="piqa_valid"):
        _run(_config(nowhere, tmp_path, tasks=("piqa",), data=tmp_path))
    write_tasks(tmp_path)
    with pytest.raises(UsageError, match=r"--fail-under f1: no such metric"):
        _run(_config(nowhere, tmp_path, tasks=(str(tmp_path / "animals.toml"),), fail_under=("f1=0.5",)))


def test_gates_know_which_direction_is_better(model_dir: Path, tmp_path: Path, tasks: tuple[str, ...]) -> None:
    config = _config(model_dir, tmp_path, tasks=tasks)
    results = [event for event in _run(config) if isinstance(event, TaskScored)]

    def failures(*gates: str) -> list[str]:
        return check_gates(_config(model_dir, tmp_path, tasks=tasks, fail_under=gates), results)

    assert failures("animals.acc=0", "words.perplexity=1e300") == []
    assert failures("animals.acc=1.1")[0].startswith("animals.acc is ")
    assert "at most 1" in failures("perplexity=1")[0]
    assert len(failures("acc=1.1")) == 2  # both tasks have one
    with pytest.raises(UsageError, match="no such metric"):
        failures("animals.perplexity=1")


def test_the_model_is_told_by_its_content(model_dir: Path, tmp_path: Path, tasks: tuple[str, ...]) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(model_dir, copy)
    os.utime(copy / "model.safetensors", (0, 0))

    def told(folder: Path) -> str:
        ready = next(iter(evaluate(_config(folder, tmp_path, tasks=tasks[:1], limit=1))))
        assert isinstance(ready, ModelReady)
        return ready.sha256

    assert told(copy) == told(model_dir)
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    assert told(copy) != told(model_dir)
