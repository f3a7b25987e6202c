"""Checkpoints on disk: killed at any moment, interrupted, pruned, linked, replaced."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmctl.core.errors import InputError, NotFoundError, UsageError
from llmctl.core.files import sha256_file
from llmctl.core.runlog import Metrics, RunFolder
from llmctl.core.train import state as checkpoints
from llmctl.core.train.state import TrainerState

CALLS = ("open", "mkdir", "fsync", "rename", "replace", "unlink", "rmdir")


def make_state(step: int) -> TrainerState:
    return TrainerState(
        step=step, num_steps=9, warmup_steps=0, num_updates=step, tokens_seen=0, skipped_steps=0, elapsed_s=0.0, settings={}, identity={}
    )  # fmt: skip


def save(run_dir: Path, step: int, *, fill: float = 0.0) -> Path:
    def write_model(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(bytes([step]) * 1000)

    tensors = {"w.exp_avg": torch.full((50, 3), fill)}
    path, _ = checkpoints.save_checkpoint(run_dir, make_state(step), write_model=write_model, optimizer=tensors, expected_bytes=1000)
    checkpoints.prune(run_dir, keep_last=2)
    return path


def die_at(number: int, action: Callable[[], Any]) -> bool:
    """Run `action` in a child that is killed before its `number`-th file operation; True when it came to its end."""
    child = os.fork()
    if child == 0:
        count = 0
        for name in CALLS:
            original = getattr(os, name)

            def counted(*args: Any, original: Any = original, **more: Any) -> Any:
                nonlocal count
                count += 1
                if count == number:
                    os.kill(os.getpid(), 9)
                return original(*args, **more)

            setattr(os, name, counted)
        try:
            action()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFEXITED(status)


def test_killed_at_every_file_operation_of_a_save_the_newest_complete_checkpoint_loads(tmp_path: Path) -> None:
    """P02: kill -9 before each open, mkdir, fsync, rename and unlink of a save and of the pruning after it."""
    number, outcomes = 0, set()
    while True:
        number += 1
        run_dir = tmp_path / str(number)
        run_dir.mkdir()
        for step in (1, 2):
            save(run_dir, step)
        ended = die_at(number, lambda run_dir=run_dir: save(run_dir, 3))
        found, warnings = checkpoints.newest_good(run_dir)
        assert found is not None
        assert warnings == []
        assert found.state.step in (2, 3)
        outcomes.add(found.state.step)
        assert len(checkpoints.step_folders(run_dir)) >= 2
        run = RunFolder(run_dir, fresh=False)  # what the next start does
        assert not list(run_dir.glob(".tmp-*"))
        run.close()
        save(run_dir, 3)
        assert checkpoints.open_checkpoint(run_dir / "step-00000003").state.step == 3
        if ended:
            break
    assert outcomes == {2, 3}
    assert number > 15


def test_a_second_interrupt_aborts_a_save_and_the_old_checkpoint_stays(tmp_path: Path) -> None:
    before = sha256_file(save(tmp_path, 1) / "manifest.json")

    def interrupted(_folder: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoints.save_checkpoint(tmp_path, make_state(2), write_model=interrupted, optimizer={}, expected_bytes=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert sha256_file(tmp_path / "step-00000001" / "manifest.json") == before


def test_saving_again_replaces_a_folder_of_that_name_whole(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 1, fill=3.0)
    tensors = checkpoints.load_tensors(path / "trainer" / "optimizer.safetensors")
    assert torch.equal(tensors["w.exp_avg"], torch.full((50, 3), 3.0))


def test_links_and_foreign_names_are_neither_read_nor_removed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    precious = save(outside, 9)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "step-00000001").symlink_to(precious)
    (run_dir / "step-12").mkdir()
    (run_dir / "step-00000007-old").mkdir()
    for step in (2, 3, 4, 5):
        save(run_dir, step)
    assert sorted(p.name for p in run_dir.iterdir()) == ["step-00000001", "step-00000004", "step-00000005", "step-00000007-old", "step-12"]
    assert checkpoints.open_checkpoint(precious).state.step == 9
    with pytest.raises(UsageError, match="symbolic link"):
        save(run_dir, 1)
    assert checkpoints.open_checkpoint(precious).state.step == 9


def test_checkpoints_beyond_a_step_are_set_aside_and_never_lost(tmp_path: Path) -> None:
    for _ in range(2):
        for step in (1, 2, 3):
            save(tmp_path, step)
        checkpoints.set_aside_after(tmp_path, 2)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["step-00000002", "unused-step-00000003", "unused-step-00000003-2"] or "step-00000002" in names
    assert checkpoints.open_checkpoint(tmp_path / "unused-step-00000003").state.step == 3
    assert checkpoints.open_checkpoint(tmp_path / "unused-step-00000003-2").state.step == 3


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    assert checkpoints.newest_good(tmp_path) == (None, [])
    with pytest.raises(NotFoundError):
        checkpoints.open_checkpoint(tmp_path / "step-00000001")
    (tmp_path / "step-00000001").mkdir()
    with pytest.raises(InputError, match="incomplete"):
        checkpoints.open_checkpoint(tmp_path / "step-00000001")
    with pytest.raises(UsageError, match="step-00000500"):
        checkpoints.step_of(tmp_path)


def test_a_pickle_in_a_checkpoint_is_never_opened(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (path / "trainer" / "rng.safetensors").write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    with pytest.raises(InputError):
        checkpoints.open_checkpoint(path)
    with pytest.raises(InputError, match="safetensors"):
        checkpoints.load_tensors(path / "trainer" / "rng.safetensors")


def test_the_log_is_cut_back_to_a_step_and_torn_lines_go(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        metrics.append({"kind": "step", "step": step, "loss": float("nan")})
    with open(metrics.path, "ab") as file:
        file.write(b'{"kind": "step", "step": 2, "lo')
    metrics.truncate_after(2)
    assert [line["step"] for line in metrics.lines()] == [1, 2]
    assert next(metrics.lines())["loss"] is None
    metrics.append({"kind": "step", "step": 3})
    assert [line["step"] for line in metrics.lines()] == [1, 2, 3]


def test_a_log_that_cannot_be_written_complains_once(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    metrics = Metrics(tmp_path / "metrics.jsonl")
    for step in (1, 2):
        metrics.append({"kind": "step", "step": step})
    assert "training goes on" in (metrics.take_trouble() or "")
    metrics.append({"kind": "step", "step": 3})
    assert metrics.take_trouble() is None


def test_a_folder_that_others_may_change_is_not_trusted_silently(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run", fresh=True)
    run.path.chmod(0o755)
    assert run.distrust is None
    run.path.chmod(0o777)
    assert "everybody" in (run.distrust or "")
    run.path.chmod(0o1777)
    assert run.distrust is None
    run.close()
