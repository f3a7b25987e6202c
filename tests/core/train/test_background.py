"""--async-save: the same checkpoints as without, written while the steps go on."""

import json
import shutil
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
from tests.rank_jobs import free_port, on_ranks, start_ranks


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
    with pytest.raises(UsageError, match="--async-save does not go with"):
        PretrainConfig(**{**settings, "on_full": "wait"})


@pytest.fixture
def spread(packed: Path, tmp_path: Path) -> dict[str, Any]:
    """Settings of a run whose model is spread over two ranks, as JSON; `out_dir` is to be given."""
    return {
        "data": str(packed), "depth": 1, "seq_len": 32, "batch_size": 4, "max_steps": 6, "save_every": 2, "eval_every": 3,
        "sample_every": 0, "threads": 1, "dtype": "f32", "device": "cpu", "mesh": "fsdp=2", "keep_last": 9, "ema": 0.9,
        "rank_timeout": 120.0,
    }  # fmt: skip


def contents(folder: Path) -> dict[str, object]:
    """Of all weight files: what their headers say, and their bytes. (The header's metadata come in any order.)"""
    found: dict[str, object] = {}
    for path in folder.rglob("*.safetensors"):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        found[str(path.relative_to(folder))] = json.loads(data[8 : 8 + length]), data[8 + length :]
    return found


@pytest.mark.slow
def test_ranks_write_the_same_spread_checkpoints_behind_the_training_and_go_on_from_them(spread: dict[str, Any], tmp_path: Path) -> None:
    at_once, behind, again = (tmp_path / name for name in ("at once", "behind", "again"))
    jobs: list[dict[str, Any]] = [
        {"job": "pretrain", "dtype": "f32", "settings": {**spread, "out_dir": str(at_once)}},
        {"job": "pretrain", "dtype": "f32", "settings": {**spread, "out_dir": str(behind), "async_save": True}},
    ]
    on_ranks(2, "one_after_another", jobs=jobs, ports=[free_port(), free_port()])
    assert [folder.name for folder in checkpoints.step_folders(behind)] == [f"step-{step:08}" for step in (2, 4, 6)]
    for folder in checkpoints.step_folders(behind):
        check_manifest(folder, hashes=True)
        assert contents(folder) == contents(at_once / folder.name)
    shutil.copytree(behind, again)
    resumed = {**spread, "out_dir": str(again), "async_save": True, "resume_from": str(again / "step-00000002")}
    on_ranks(2, "pretrain", dtype="f32", settings=resumed)
    assert contents(again / "step-00000006") == contents(at_once / "step-00000006")


@pytest.mark.slow
def test_a_rank_that_cannot_write_behind_the_training_ends_all(spread: dict[str, Any], tmp_path: Path) -> None:
    settings = {**spread, "out_dir": str(tmp_path / "run"), "async_save": True}
    on_ranks(2, "pretrain_with_a_full_disk", settings=settings, at_rank=1, told=str(tmp_path / "told {}"))
    assert "another rank failed at saving" in (tmp_path / "told 0").read_text()
    assert "no space left" in (tmp_path / "told 1").read_text()
    assert checkpoints.step_folders(tmp_path / "run") == []


@pytest.mark.slow
@pytest.mark.parametrize(("at_rank", "function"), [(1, "save"), (0, "_finish")], ids=["between its files", "before the name"])
def test_ranks_killed_while_they_write_go_on_from_the_last_whole_checkpoint(
    spread: dict[str, Any], tmp_path: Path, at_rank: int, function: str
) -> None:
    unbroken, run_dir = tmp_path / "unbroken", tmp_path / "run"
    settings = {**spread, "out_dir": str(run_dir), "async_save": True}
    dying = start_ranks(2, "pretrain_and_die", settings=settings, at_rank=at_rank, function=function, call=2)
    ended = [process.communicate(timeout=600) for process in dying]
    assert dying[at_rank].returncode == -signal.SIGKILL, ended
    assert dying[1 - at_rank].returncode == 1, ended
    assert "LostRankError" in ended[1 - at_rank][1]
    assert [folder.name for folder in checkpoints.step_folders(run_dir)] == ["step-00000002"]
    jobs: list[dict[str, Any]] = [
        {"job": "pretrain", "dtype": "f32", "settings": {**settings, "resume": True}},
        {"job": "pretrain", "dtype": "f32", "settings": {**spread, "out_dir": str(unbroken)}},
    ]
    on_ranks(2, "one_after_another", jobs=jobs, ports=[free_port(), free_port()])
    assert contents(run_dir / "step-00000006") == contents(unbroken / "step-00000006")
    assert not list(run_dir.glob(".tmp-*"))
