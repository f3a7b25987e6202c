"""Trackers: each library reads back, with its own reader, the numbers that the events held; and none can end a run."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmctl.core.errors import UsageError
from llmctl.core.train import trackers
from llmctl.core.train.events import EvalDone, Event, Planned, SampleDrawn, StepDone, Warned
from llmctl.core.train.trackers import TRACKERS, check_installed, tracked


def planned(run_dir: Path) -> Planned:
    hints = Planned.__annotations__
    zero = {int: 1, float: 1.0, str: "x", "int": 1, "float": 1.0, "str": "x"}
    return Planned(**{**{name: zero.get(kind) for name, kind in hints.items()}, "run_dir": str(run_dir), "device": "cpu", "sources": ()})


def step(number: int) -> StepDone:
    return StepDone(
        **dict.fromkeys(("step", "num_tokens", "tokens_seen", "first_sample", "num_samples"), number),
        skipped=False,
        **dict.fromkeys(("learning_rate", "grad_norm", "step_s", "tokens_per_second", "peak_share", "elapsed_s", "eta_s"), number / 4),
        loss=10.0 - number,
    )  # fmt: skip


def events(run_dir: Path, *, first: int = 1, last: int = 6) -> Iterator[Event]:
    yield planned(run_dir)
    for number in range(first, last + 1):
        yield step(number)
    yield EvalDone(step=last, loss=2.5, bits_per_byte=1.25, num_tokens=10, num_bytes=20, elapsed_s=1.0)
    yield SampleDrawn(step=last, prompt="", text="Es war <einmal>")


def drain(run_dir: Path, name: str, **kwargs: Any) -> list[Event]:
    return list(tracked(events(run_dir, **kwargs), (name,), settings={"seed": 3}, every=2, prints=sys.stderr))


def test_without_trackers_events_pass_unchanged(tmp_path: Path) -> None:
    assert list(tracked(events(tmp_path), (), settings={}, every=2, prints=sys.stderr)) == list(events(tmp_path))


def test_a_library_that_is_not_there_is_named_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TRACKERS, "wandb", "no_such_module_anywhere")
    with pytest.raises(UsageError, match=r"pip install 'llmctl\[wandb\]'"):
        check_installed(["wandb"])


def test_a_tracker_that_fails_is_warned_of_once_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Failing:
        def __init__(self, *_: object) -> None: ...

        def scalars(self, values: object, *, step: int) -> None:
            print("chatter")
            if step >= 4:
                raise ConnectionError("the server\nwent away")

        def text(self, name: str, text: str, *, step: int) -> None: ...

        def close(self) -> None:
            raise AssertionError("a tracker that failed is not touched again")

    monkeypatch.setitem(TRACKERS, "wandb", "json")
    monkeypatch.setitem(trackers._OPENERS, "wandb", Failing)
    found = drain(tmp_path, "wandb")
    warnings = [event.message for event in found if isinstance(event, Warned)]
    assert warnings == ["--log wandb: ConnectionError: the server went away; training goes on without it"]
    assert [event for event in found if not isinstance(event, Warned)] == list(events(tmp_path))
    assert capsys.readouterr().out == ""  # stdout is for results


def test_tensorboard_reads_the_numbers_back_and_a_resumed_run_replaces_what_it_repeats(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    accumulator: Any = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    drain(tmp_path, "tensorboard")
    drain(tmp_path, "tensorboard", first=5, last=8)
    found = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [(e.step, e.value) for e in found.Scalars("train/loss")] == [(1, 9.0), (2, 8.0), (4, 6.0), (6, 4.0), (8, 2.0)]
    assert [(e.step, e.value) for e in found.Scalars("val/bits_per_byte")] == [(8, 1.25)]
    assert "Es war <einmal>" in str(found.Tensors("sample/text_summary")[-1].tensor_proto)


def test_mlflow_reads_the_numbers_back_and_a_resumed_run_is_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow: Any = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    (tmp_path / "run").mkdir()
    drain(tmp_path / "run", "mlflow")
    drain(tmp_path / "run", "mlflow", first=7, last=8)
    run_id = json.loads((tmp_path / "run" / "trackers.json").read_text())["mlflow"]
    history = mlflow.MlflowClient().get_metric_history(run_id, "train/loss")
    assert sorted((e.step, e.value) for e in history) == [(1, 9.0), (2, 8.0), (4, 6.0), (6, 4.0), (8, 2.0)]
    assert mlflow.get_run(run_id).data.params == {"seed": "3"}


def test_codecarbon_adds_an_entry_for_each_start(tmp_path: Path) -> None:
    pytest.importorskip("codecarbon")
    for first, last in ((1, 4), (5, 6)):
        drain(tmp_path, "codecarbon", first=first, last=last)
    starts = json.loads((tmp_path / "energy.json").read_text())["starts"]
    assert [(s["first_step"], s["last_step"]) for s in starts] == [(1, 4), (5, 6)]
    assert all(s["energy_kwh"] >= 0 for s in starts)
    assert all(s["emissions_kg"] is None for s in starts)  # no country was named
