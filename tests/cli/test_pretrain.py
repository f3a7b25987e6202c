"""`llmctl pretrain` as people and batch systems meet it: exit codes, signals, kills, streams."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmctl.cli.main import run
from llmctl.core.files import sha256_file
from llmctl.core.train.state import step_folders
from tests.cli.waiting import wait_for

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def arguments(packed: Path, run_dir: Path, *more: str, steps: int = 10) -> list[str]:
    return [
        "pretrain", "--data", str(packed), "--out-dir", str(run_dir), "--depth", "1", "--seq-len", "32", "--batch-size", "8",
        "--max-steps", str(steps), "--eval-every", "0", "--sample-every", "0", "--save-every", "5", "--threads", "1", "--device", "cpu",
        *more,
    ]  # fmt: skip


def start(args: list[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "llmctl", *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )


def logged_steps(run_dir: Path) -> list[int]:
    lines = (json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if line["kind"] == "step"]


def test_plain_lines_go_to_stderr_and_nothing_to_stdout(packed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(arguments(packed, tmp_path / "run")) == 0
    out, err = capfd.readouterr()
    assert out == ""
    assert "\x1b" not in err
    for word in (
        "parameters",
        "FLOP",
        "memory",
        "matmul peak",
        "step 10/10",
        "tok/s",
        "of peak",
        "held-out loss",
        "bits/byte",
        "done: 10 steps",
    ):
        assert word in err


def test_one_thing_is_told_in_the_singular(packed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run([*arguments(packed, tmp_path / "run"), "--dry-run", "--eval-every", "1"]) == 0
    err = capfd.readouterr().err
    assert " 1 layer x " in err
    assert " 1 thread, " in err
    assert "evaluation 1 step, " in err


def test_json_events_go_to_stdout_a_line_each(packed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run([*arguments(packed, tmp_path / "run"), "--json", "--quiet"]) == 0
    out, err = capfd.readouterr()
    events = [json.loads(line) for line in out.splitlines()]
    assert err == ""
    assert events[0]["event"] == "Planned"
    assert [e["step"] for e in events if e["event"] == "StepDone"] == list(range(1, 11))
    assert events[-1]["event"] == "Finished"


def test_a_dry_run_shows_the_plan_and_creates_nothing(packed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run([*arguments(packed, tmp_path / "run"), "--dry-run"]) == 0
    assert "parameters" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_exit_codes_without_a_run(packed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    here = tmp_path / "run"
    file = tmp_path / "file"
    file.write_text("x")
    cases: list[tuple[int, str, list[str]]] = [
        (2, "--data is missing", ["pretrain", "--out-dir", str(here)]),
        (2, "--out-dir is missing", ["pretrain", "--data", str(packed)]),
        (2, "is a file", arguments(packed, file)),
        (2, "does not exist", arguments(packed, tmp_path / "no" / "run")),
        (2, "give one budget", arguments(packed, here, "--max-time", "3s")),
        (2, "--depth", arguments(packed, here, "--depth", "0")),
        (2, "--nonfinite", arguments(packed, here, "--nonfinite", "shrug")),
        (2, "give one of them", arguments(packed, here, "--resume", "--auto-resume")),
        (2, "b'run\\xff': the name is not UTF-8", arguments(packed, Path("run\udcff"))),
        (2, "File name too long", arguments(packed, tmp_path / ("x" * 300))),
        (10, "no such folder", arguments(tmp_path / "nothing", here)),
        (10, "--auto-resume", arguments(packed, here, "--resume")),
        (10, "no run folder", ["pretrain", "--out-dir", str(here), "--resume"]),
        (10, "no run folder", ["finetune", "--out-dir", str(here), "--resume"]),
        (10, "step-00000003", arguments(packed, here, "--resume-from", str(here / "step-00000003"))),
        (4, "one sequence needs", arguments(packed, here, "--seq-len", "99999")),
    ]
    for code, word, args in cases:
        assert run(args) == code, args
        last = capfd.readouterr().err.splitlines()[-1]
        assert last.startswith("llmctl: error: "), last
        assert word in last
        assert not here.exists()


def test_a_finished_run_that_is_resumed_evaluates_and_samples_no_second_time(packed: Path, tmp_path: Path) -> None:
    here = tmp_path / "run"
    assert run(arguments(packed, here, "--sample-every", "5")) == 0
    before = (here / "metrics.jsonl").read_text()
    kinds = [json.loads(line)["kind"] for line in before.splitlines()]
    assert (kinds.count("eval"), kinds.count("sample")) == (1, 2)
    assert run(["pretrain", "--out-dir", str(here), "--resume"]) == 0
    assert [json.loads(line)["kind"] for line in (here / "metrics.jsonl").read_text().splitlines()] == kinds


def test_a_dry_run_without_a_folder_and_settings_of_a_run_that_cannot_be_read(
    packed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    here = tmp_path / "run"
    without = [word for word in arguments(packed, here, "--dry-run") if word not in ("--out-dir", str(here))]
    assert run(without) == 0
    captured = capfd.readouterr()
    assert "None" not in captured.out + captured.err
    here.mkdir()
    (here / "config.toml").write_bytes(b"depth = \xff")
    assert run(["pretrain", "--out-dir", str(here), "--resume"]) == 4
    last = capfd.readouterr().err.splitlines()[-1]
    assert str(here / "config.toml") in last
    assert "--config" not in last


def test_a_run_that_is_there_already(packed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    here = tmp_path / "run"
    assert run(arguments(packed, here)) == 0
    capfd.readouterr()
    assert run(arguments(packed, here)) == 2
    assert "--resume" in capfd.readouterr().err
    assert run(["pretrain", "--out-dir", str(here), "--resume", "--learning-rate", "0.5"]) == 2
    assert "learning_rate" in capfd.readouterr().err
    assert run(["pretrain", "--out-dir", str(here), "--resume", "--depth", "2"]) == 4
    assert "model" in capfd.readouterr().err
    assert run(["pretrain", "--out-dir", str(here), "--resume", "--max-steps", "12", "--allow-change", "max-steps"]) == 0
    assert logged_steps(here) == list(range(1, 13))
    assert run(["pretrain", "--resume-from", str(here / "step-00000010"), "--max-steps", "11", "--allow-change", "max_steps"]) == 0
    assert logged_steps(here) == list(range(1, 12))


def test_killed_at_random_times_and_resumed_it_equals_an_unbroken_run(packed: Path, tmp_path: Path) -> None:
    _kill_and_compare(packed, tmp_path, kills=2, steps=80)


@pytest.mark.slow
def test_killed_thirty_times(packed: Path, tmp_path: Path) -> None:
    _kill_and_compare(packed, tmp_path, kills=30, steps=200)


def _kill_and_compare(packed: Path, tmp_path: Path, *, kills: int, steps: int) -> None:
    """kill -9 at seeded random moments after a step is logged, saves included; the same command each time."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(arguments(packed, whole, "--auto-resume", steps=steps)) == 0
    chance = random.Random(0)
    for _ in range(kills):
        before = max(logged_steps(broken), default=0) if (broken / "metrics.jsonl").exists() else 0
        process = start(arguments(packed, broken, "--auto-resume", steps=steps))
        goal = min(before + chance.randint(1, 2 * steps // kills), steps)  # on average the last kill is at the end
        while process.poll() is None and not ((broken / "metrics.jsonl").exists() and max(logged_steps_safe(broken), default=0) >= goal):
            time.sleep(0.002)
        process.kill()
        process.communicate()
    assert run(arguments(packed, broken, "--auto-resume", steps=steps)) == 0
    last = f"step-{steps:08d}"
    for name in ("model.safetensors", "trainer/optimizer.safetensors", "trainer/rng.safetensors"):
        assert sha256_file(whole / last / name) == sha256_file(broken / last / name), name
    assert logged_steps(broken) == list(range(1, steps + 1))
    assert not list(broken.glob(".tmp-*"))


def logged_steps_safe(run_dir: Path) -> list[int]:
    """As logged_steps, of a file that is being written."""
    steps = []
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        try:
            steps.append(json.loads(line)["step"])
        except ValueError:
            break
    return steps


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda n: n.name)
def test_a_signal_saves_says_how_to_go_on_and_ends_by_that_signal(packed: Path, tmp_path: Path, number: signal.Signals) -> None:
    here = tmp_path / "run"
    process = start(arguments(packed, here, "--save-every", "0", steps=100_000))
    wait_for(lambda: (here / "metrics.jsonl").exists() and logged_steps_safe(here), process)
    process.send_signal(number)
    _, err = process.communicate(timeout=240)
    assert process.returncode == -number
    assert "Traceback" not in err
    (saved,) = step_folders(here)
    assert f"step {int(saved.name[5:])}, which is saved" in err.splitlines()[-1]
    assert f"llmctl pretrain --out-dir {here} --resume" in err.splitlines()[-1]
    assert json.loads((here / "status.json").read_text())["state"] == "interrupted"


def test_usr1_saves_and_the_run_goes_on_and_its_folder_is_locked_until_it_dies(
    packed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    here = tmp_path / "run"
    process = start(arguments(packed, here, "--save-every", "0", "--quiet", steps=100_000))  # quiet: nobody empties its stderr
    wait_for(lambda: (here / "metrics.jsonl").exists() and logged_steps_safe(here), process)
    process.send_signal(signal.SIGUSR1)
    wait_for(lambda: step_folders(here), process)
    step = max(logged_steps_safe(here))
    wait_for(lambda: max(logged_steps_safe(here)) > step, process)
    assert run(arguments(packed, here, steps=100_000)) == 11
    assert f"pid {process.pid}" in capfd.readouterr().err
    process.kill()
    process.communicate()
    assert run(["pretrain", "--out-dir", str(here), "--resume", "--max-steps", "100001"]) == 2  # the lock is free; the budget differs
    assert "max_steps" in capfd.readouterr().err


def test_a_full_disk_is_exit_5_and_the_old_checkpoints_stay(packed: Path, tmp_path: Path) -> None:
    here = tmp_path / "run"
    assert run(arguments(packed, here, steps=5)) == 0
    command = ["prlimit", "--fsize=200000", sys.executable, "-m", "llmctl", "pretrain", "--out-dir", str(here), "--resume"]
    if not any((Path(p) / "prlimit").exists() for p in os.environ["PATH"].split(":")):
        pytest.skip("no prlimit")
    done = subprocess.run(
        [*command, "--max-steps", "10", "--allow-change", "max_steps"], capture_output=True, text=True, env=ENVIRONMENT, check=False
    )
    assert done.returncode == 5
    assert "bytes needed" in done.stderr.splitlines()[-1]
    assert [p.name for p in step_folders(here)] == ["step-00000005"]
    assert not list(here.glob(".tmp-*"))
