"""`llmctl finetune` as a person or a script meets it: exit codes, streams, and the way from rows to an answer."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llmctl.core.files import sha256_file
from tests.cli.in_process import llmctl
from tests.core.data.test_chat import write_jsonl
from tests.core.train.test_finetune import ROWS, tiny_base


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model, good rows, and rows of which the second is bad."""
    folder = tmp_path_factory.mktemp("finetune")
    tiny_base(folder / "base")
    write_jsonl(folder / "rows.jsonl", ROWS)
    write_jsonl(folder / "bad.jsonl", [ROWS[0], {"messages": [{"role": "bot", "content": "x"}]}, *ROWS[1:]])
    return folder


def finetune(place: Path, *arguments: Any) -> "subprocess.CompletedProcess[str]":
    return llmctl("finetune", "-m", place / "base", "--dtype", "f32", "--seq-len", 64, "--max-steps", 2, *arguments)


def last_line(done: "subprocess.CompletedProcess[str]") -> str:
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


def test_a_run_ends_well_and_is_told_as_json(place: Path) -> None:
    done = finetune(place, "--data", place / "rows.jsonl", "-o", place / "run", "--json")
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["event"] for event in events if event["event"] == "StepDone"] == ["StepDone"] * 2
    assert events[-1]["event"] == "Finished"
    assert "train rows" in done.stderr
    again = llmctl("finetune", "-o", place / "run", "--resume", LLMCTL_MODEL="/another/model")
    assert again.returncode == 0, again.stderr


def test_a_run_with_adapters_goes_on_with_flags_of_adapters_and_no_method(place: Path, tmp_path: Path) -> None:
    run_dir, adapters = tmp_path / "run", ("--lora-rank", 4, "--lora-alpha", 8)
    assert finetune(place, "--data", place / "rows.jsonl", "-o", run_dir, "--method", "lora", *adapters).returncode == 0
    budget = ("--allow-change", "max-steps", "--max-steps", 3)
    again = llmctl("finetune", "-o", run_dir, "--resume", *adapters, *budget)
    assert again.returncode == 0, again.stderr
    assert json.loads((run_dir / "status.json").read_text())["step"] == 3
    other = llmctl("finetune", "-o", run_dir, "--resume", "--lora-rank", 8)
    assert other.returncode == 2
    assert "--allow-change lora_rank" in last_line(other)
    nothing = finetune(place, "--data", place / "rows.jsonl", "-o", tmp_path / "new", "--auto-resume", "--lora-rank", 4)
    assert nothing.returncode == 2
    assert "--lora-rank needs --method lora" in last_line(nothing)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--data", "{place}/bad.jsonl"], 4, "bad.jsonl: row 2: message 1 has the role 'bot'"),
        (["--data", "{place}/bad.jsonl", "--on-error", "skip", "-o", "{place}/skipping"], 3, "skipped_rows.jsonl"),
        (["--data", "{place}/rows.jsonl", "--seq-len", "8"], 4, "--drop-empty"),
        (["--data", "{place}/rows.jsonl", "--lora-r", "4"], 2, "--lora-rank needs --method lora"),
        (
            ["--data", "{place}/rows.jsonl", "--method", "lora", "--lora-targets", "wq"],
            4,
            "--lora-targets wq: this model has no such module",
        ),
        (["--data", "{place}/rows.jsonl", "--too-long", "fold"], 2, "--too-long"),
        (["--data", "{place}/none.jsonl"], 10, "none.jsonl: no such file"),
        (["--data", "{place}/rows.jsonl", "--resume"], 10, "--resume"),
        (["--data", "{place}/rows.jsonl", "-o", "{place}/rows.jsonl"], 2, "is a file"),
    ],
)
def test_every_failure_has_its_exit_code_and_one_line(place: Path, arguments: list[str], code: int, message: str) -> None:
    arguments = [argument.format(place=place) for argument in arguments]
    done = finetune(place, "-o", place / "never", *arguments)
    assert done.returncode == code, done.stderr
    assert last_line(done).startswith("llmctl: error: ")
    assert message in last_line(done)
    assert not (place / "never").exists()
    assert done.stdout == ""


@pytest.mark.parametrize("method", [[], ["--method", "lora", "--lora-dropout", 0.2]], ids=["full", "lora"])
def test_killed_in_the_middle_and_resumed_it_ends_as_an_unbroken_run(place: Path, tmp_path: Path, method: list[Any]) -> None:
    """kill -9, wherever it falls: weights and optimizer in the end are those of the run that nobody stopped."""
    common = ["--data", place / "rows.jsonl", "--max-steps", 8, "--save-every", 2, "--batch-size", 2, "--threads", 1, "-q", *method]
    assert finetune(place, *common, "-o", tmp_path / "whole").returncode == 0
    command = [sys.executable, "-m", "llmctl", "finetune", "-m", place / "base", "--dtype", "f32", "--seq-len", 64, *common]
    killed = subprocess.Popen([*map(str, command), "-o", str(tmp_path / "killed")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    while killed.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b'"step"') >= 3):
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    resumed = llmctl("finetune", "-o", tmp_path / "killed", "--auto-resume", *([] if metrics.exists() else common))
    assert resumed.returncode == 0, resumed.stderr
    for name in ("adapter_model.safetensors" if method else "model.safetensors", "trainer/optimizer.safetensors"):
        assert sha256_file(tmp_path / "killed" / "step-00000008" / name) == sha256_file(tmp_path / "whole" / "step-00000008" / name)
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines() if '"kind": "step"' in line]
    assert steps == list(range(1, 9))


def test_help_imports_no_torch(place: Path) -> None:
    code = "import sys; from llmctl.cli.main import run; run(['finetune', '--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=240).returncode == 0


def test_the_examples_of_the_docs_name_the_checkpoints_that_their_runs_make() -> None:
    """Those on the built-in model run as they are written, by their plans."""
    root = Path(__file__).parents[2]
    text = (root / "docs" / "finetune.md").read_text(encoding="utf-8")
    runs = re.findall(r"^llmctl (finetune --model storyteller .*--out-dir (\w+).*)$", text, re.MULTILINE)
    assert len(runs) == 2
    for line, folder in runs:
        words = line.replace("examples/", f"{root}/examples/").split()
        done = llmctl(*words, "--dry-run", "--json")
        assert done.returncode == 0, done.stderr
        plan = json.loads(done.stdout.splitlines()[-1])
        named = set(re.findall(rf"{folder}/step-(\d+)", text))
        assert named == {f"{plan['num_steps']:08d}"}
