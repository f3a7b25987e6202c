"""`--nproc` and torchrun as people and batch systems meet them: exit codes, signals, a rank that is lost."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llmctl.core.files import check_manifest
from llmctl.core.train.state import step_folders
from tests.cli.waiting import LIMIT_S, wait_for
from tests.rank_jobs import free_port

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="the ranks are found through Linux's /proc")

TASK = """
name = "kings"
kind = "multiple_choice"
dataset = ["rows.jsonl"]
context = "{{ q }}"
choices = ["{{ a[0] }}", "{{ a[1] }}", "{{ a[2] }}"]
gold = "{{ gold }}"
metrics = ["acc", "acc_norm"]
"""

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def arguments(packed: Path, run_dir: Path, *more: str, steps: int = 100_000) -> list[str]:
    return [
        "pretrain", "--data", str(packed), "--out-dir", str(run_dir), "--depth", "1", "--seq-len", "32", "--batch-size", "4", "--max-steps",
        str(steps), "--eval-every", "0", "--sample-every", "0", "--save-every", "5", "--device", "cpu", *more,
    ]  # fmt: skip


def start(*command: str) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-m", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)


def ranks_of(launcher: "subprocess.Popen[str]") -> dict[int, int]:
    """Rank -> pid of the processes that a launcher started."""
    found = {}
    for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        environment = dict(line.partition("=")[::2] for line in Path(f"/proc/{pid}/environ").read_text().split("\0"))
        if "RANK" in environment:
            found[int(environment["RANK"])] = int(pid)
    return found


def status(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / "status.json").read_text())
    return found


def training(packed: Path, run_dir: Path, *more: str) -> "subprocess.Popen[str]":
    """Two ranks that have saved at least once."""
    process = start("llmctl", *arguments(packed, run_dir, "--nproc", "2", *more))
    wait_for(lambda: step_folders(run_dir), process)
    return process


def ended(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    """Exit code, last line on stderr, all of stderr."""
    _, errors = process.communicate(timeout=240)
    assert "Traceback" not in errors
    return process.returncode, errors.splitlines()[-1], errors


def logged_steps(run_dir: Path) -> list[int]:
    lines = (json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if line["kind"] == "step"]


def test_a_signal_to_the_launcher_saves_once_and_one_process_goes_on(packed: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = training(packed, run_dir)
    process.send_signal(signal.SIGTERM)
    code, last, errors = ended(process)
    assert code == -signal.SIGTERM
    assert last.startswith("llmctl: stopped at step")
    assert errors.count("stopped at step") == 1
    assert len([line for line in errors.splitlines() if line.startswith("model ")]) == 1, "both ranks drew"
    stopped = status(run_dir)
    assert stopped["state"] == "interrupted"
    assert last.endswith(f"go on with: {stopped['resume']}")
    assert stopped["resume"] == f"llmctl pretrain --out-dir {run_dir} --resume --device cpu --nproc 2"
    newest = step_folders(run_dir)[-1]
    assert newest.name == f"step-{stopped['step']:08}"
    check_manifest(newest, hashes=True)
    assert not list(run_dir.glob(".tmp-*"))
    steps = stopped["step"] + 3
    more = start("llmctl", *arguments(packed, run_dir, "--resume", "--allow-change", "max-steps", steps=steps))
    code, _, errors = ended(more)
    assert code == 0
    assert "ranks 2 then, 1 now" in errors
    assert logged_steps(run_dir) == list(range(1, steps + 1))


def test_a_lost_rank_ends_all_and_the_same_command_goes_on(packed: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = training(packed, run_dir, "--auto-resume")
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    code, last, _ = ended(process)
    assert code == 1
    assert last.startswith("llmctl: error: rank 1 was ended by signal 9 (SIGKILL)")
    again = start("llmctl", *arguments(packed, run_dir, "--auto-resume", "--nproc", "2"))
    wait_for(lambda: status(run_dir)["state"] == "running", again)
    wait_for(lambda: "going on from step" in (again.stderr.readline() if again.stderr else ""), again)
    again.send_signal(signal.SIGINT)
    assert ended(again)[0] == -signal.SIGINT


@pytest.mark.slow
def test_a_signal_to_one_rank_is_one_to_all(packed: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = training(packed, run_dir)
    os.kill(ranks_of(process)[1], signal.SIGTERM)
    code, last, _ = ended(process)
    assert code == -signal.SIGTERM
    assert last.startswith("llmctl: stopped at step")
    assert status(run_dir)["state"] == "interrupted"


@pytest.mark.slow
def test_a_rank_that_is_silent_ends_all_after_the_timeout(packed: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = training(packed, run_dir, "--rank-timeout", "20")
    silent = ranks_of(process)[1]
    os.kill(silent, signal.SIGSTOP)
    try:
        wait_for(lambda: status(run_dir)["state"] == "failed", process)
    finally:
        os.kill(silent, signal.SIGCONT)
    code, last, _ = ended(process)
    assert code == 1
    assert "lost contact with another rank" in last


@pytest.mark.slow
def test_torchrun_runs_the_same_and_the_status_speaks(packed: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "llmctl")
    process = start(*torchrun, *arguments(packed, run_dir))
    wait_for(lambda: step_folders(run_dir), process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=240)
    assert status(run_dir)["state"] == "interrupted"
    steps = status(run_dir)["step"] + 3
    more = start("llmctl", *arguments(packed, run_dir, "--resume", "--nproc", "2", "--allow-change", "max-steps", steps=steps))
    assert ended(more)[0] == 0
    assert logged_steps(run_dir) == list(range(1, steps + 1))


@pytest.mark.slow
def test_a_killed_launcher_leaves_no_orphans(packed: Path, tmp_path: Path) -> None:
    process = training(packed, tmp_path / "run")
    pids = ranks_of(process).values()
    process.kill()
    process.communicate()
    deadline = time.monotonic() + LIMIT_S
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_an_error_of_all_ranks_is_told_once_and_keeps_its_exit_code(packed: Path, tmp_path: Path) -> None:
    wrong = start("llmctl", *arguments(tmp_path / "nothing", tmp_path / "run", "--nproc", "2"))
    code, _, errors = ended(wrong)
    assert code == 10
    assert errors.count("no such folder") == 1
    assert errors.startswith("llmctl: error: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_master_that_is_not_there_is_one_line_in_time(packed: Path, tmp_path: Path) -> None:
    environment = {**ENVIRONMENT, "RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "llmctl", *arguments(packed, tmp_path / "run", "--rank-timeout", "1")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    environment["RANK"] = "0"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("llmctl: error: rank 0 of 2 cannot meet the others at 127.0.0.1:")
    assert not (tmp_path / "run").exists()


def test_a_port_that_is_taken_is_one_line_in_time(packed: Path, tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        environment = {**ENVIRONMENT, "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, "-m", "llmctl", *arguments(packed, tmp_path / "run", "--rank-timeout", "600")]
        # no rank 1 comes: what ends the process is that the port is taken, long before its patience does
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("llmctl: "))
    assert line.startswith(f"llmctl: error: rank 0 of 2 cannot listen at 127.0.0.1:{port} (MASTER_ADDR, MASTER_PORT)")
    assert not (tmp_path / "run").exists()


def run_twice(tmp_path: Path, *command: str) -> None:
    """The same command in one process and in two, with {} for the name of its output."""
    for name, more in (("one", ()), ("two", ("--nproc", "2"))):
        done = start("llmctl", *(part.format(tmp_path / name) for part in command), "--threads", "1", "--device", "cpu", *more)
        code, _, errors = ended(done)
        assert code == 0, errors


@pytest.mark.slow
def test_eval_gives_the_same_numbers_for_any_number_of_processes(tmp_path: Path) -> None:
    texts = [tmp_path / f"{name}.txt" for name in ("first", "second")]
    for number, text in enumerate(texts):
        text.write_text("Once upon a time there was a king who had a daughter. " * (40 + 30 * number), encoding="utf-8")
    task = tmp_path / "task.toml"
    rows = [{"q": f"The king number {i} had", "a": ["a crown", "the an of", f"gold {i}"], "gold": i % 3} for i in range(9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task.write_text(TASK, encoding="utf-8")
    run_twice(
        tmp_path,
        "eval",
        *map(str, texts),
        "--tasks",
        str(task),
        "--no-cache",
        "--batch-size",
        "4",
        "--seq-len",
        "64",
        "--output",
        "{}.json",
    )
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert two["results"] == one["results"]
    assert len(one["results"]) == 4  # both texts, all texts, the task


@pytest.mark.slow
def test_a_batch_in_two_processes_is_that_of_one(tmp_path: Path) -> None:
    rows = [{"id": f"row {i}", "prompt": f"Once upon a time {i} kings"} for i in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    batch = ("generate", "--input", str(tmp_path / "rows.jsonl"), "--output", "{}.jsonl", "--seed", "3", "-n", "8", "--ordered")
    run_twice(tmp_path, *batch)
    one, two = ([json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()] for name in ("one", "two"))
    assert [(row["id"], row["text"]) for row in two] == [(row["id"], row["text"]) for row in one]
