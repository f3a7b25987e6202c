"""--async-save: the same checkpoints as without, written while the steps go on."""

import signal
from pathlib import Path
from typing import Any

import pytest

from llmctl.core.config.pretrain import PretrainConfig
from llmctl.core.errors import Interrupted, UsageError, WriteError
from llmctl.core.files import check_manifest, sha256_file
from llmctl.core.train import state as checkpoints
from llmctl.core.train.events import CheckpointSaved, StepDone
from tests.core.train.runs import run


@pytest.fixture
def settings(settings: dict[str, Any]) -> dict[str, Any]:
    return {**settings, "save_every": 3, "keep_last": 9, "async_save": True}


def fingerprints(run_dir: Path) -> dict[str, str]:
    files = [path for step in checkpoints.step_folders(run_dir) for path in step.rglob("*.safetensors")]
    return {str(path.relative_to(run_dir)): sha256_file(path) for path in files}


def test_checkpoints_written_behind_the_training_are_the_same(settings: dict[str, Any], tmp_path: Path) -> None:
    events = run(settings)
    run({**settings, "out_dir": tmp_path / "at once", "async_save": False})
    assert fingerprints(settings["out_dir"]) == fingerprints(tmp_path / "at once")
    assert [event.step for event in events if isinstance(event, CheckpointSaved)] == [3, 6, 9, 12]
    order = [(type(event), event.step) for event in events if isinstance(event, CheckpointSaved | StepDone)]
    assert order.index((StepDone, 4)) < order.index((CheckpointSaved, 3)), "the steps waited for the checkpoint"
    for folder in checkpoints.step_folders(settings["out_dir"]):
        check_manifest(folder, hashes=True)


def test_a_stopped_run_waits_for_its_checkpoint_and_goes_on_as_an_unbroken_one(settings: dict[str, Any], tmp_path: Path) -> None:
    run({**settings, "out_dir": tmp_path / "unbroken"})
    asked = iter(range(1000))
    with pytest.raises(Interrupted):
        run(settings, stop=lambda: signal.SIGTERM if next(asked) >= 3 * 3 + 1 else None)
    assert [folder.name for folder in checkpoints.step_folders(settings["out_dir"])] == ["step-00000003"]
    run({**settings, "resume": True})
    last = "step-00000012/"
    ours, theirs = fingerprints(settings["out_dir"]), fingerprints(tmp_path / "unbroken")
    assert {k: v for k, v in ours.items() if k.startswith(last)} == {k: v for k, v in theirs.items() if k.startswith(last)}


def test_a_checkpoint_that_cannot_be_written_ends_the_run(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: Any, **_named: Any) -> None:
        raise WriteError("no space left")

    monkeypatch.setattr(checkpoints, "save_checkpoint", full)
    with pytest.raises(WriteError, match="no space left"):
        run(settings)
    assert checkpoints.step_folders(settings["out_dir"]) == []


def test_what_does_not_go_with_it(settings: dict[str, Any]) -> None:
    for other in ({"on_full": "wait"}, {"nproc": 2, "mesh": "fsdp=2"}):
        with pytest.raises(UsageError, match="--async-save does not go with"):
            PretrainConfig(**{**settings, **other})
