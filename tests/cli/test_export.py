"""`llmctl export` as a user meets it: output, files, exit codes."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmctl.cli.main import run
from tests.cli.test_boundary import environment
from tests.core.export.tiny import make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_model(tmp_path_factory.mktemp("model")))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_it_says_what_it_wrote_and_how_well(model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["export", model, "-o", str(tmp_path / "out"), "--dtype", "bf16"]) == 0
    out, err = capfd.readouterr()
    verified, written = out.splitlines()
    assert verified.startswith("verified  read back by transformers, 64 tokens; largest difference of a logit ")
    assert "rounding changed a logit by up to" in verified
    assert written.startswith(f"wrote     {tmp_path / 'out'} (hf, bfloat16; ")
    assert err.count("\n") == 1, "transformers' bars and notes stay away"


def test_json_gives_events_and_no_verify_none(model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf")
    assert run(["export", model, "-o", str(tmp_path / "m.gguf"), "--format", "gguf", "--dtype", "q8_0", "--json"]) == 0
    events = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [event["event"] for event in events] == ["Opened", "Verified", "Written"]
    assert events[-1]["num_bytes"] == (tmp_path / "m.gguf").stat().st_size
    assert run(["export", model, "-o", str(tmp_path / "v"), "--format", "word2vec", "--json", "--no-verify"]) == 0
    assert [json.loads(line)["event"] for line in capfd.readouterr().out.splitlines()] == ["Opened", "Written"]
    assert names(tmp_path) == ["m.gguf", "v"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["-o", "out", "--dtype", "q8_0"], 2, "--format gguf"),
        (["-o", "out.gguf"], 2, "--format gguf"),
        (["-o", "out", "--format", "gguf"], 2, "ends with .gguf"),
        (["-o", "out", "--quant", "int8"], 2, "--format quant"),
        (["-o", "out", "--binary"], 2, "--format word2vec"),
        (["-o", "out", "--format", "quant", "--dtype", "bf16"], 2, "does not go with"),
        (["-o", "out", "--max-shard-size", "5 parsecs"], 2, "500MB"),
        (["-o", "out", "--format", "tflite"], 2, "hf, gguf, quant, word2vec, onnx"),
        ([], 2, "--output is missing"),
        (["-o", "/"], 2, "root folder"),
        (["-o", "no/such/out"], 2, "does not exist"),
        (["-o", "no/such/out.gguf", "--format", "gguf"], 2, "does not exist"),
        (["-o", "file"], 2, "is a file"),
        (["-o", "full", "--format", "word2vec"], 2, "is a folder"),
        (["-o", "full"], 2, "holds something"),
        (["-o", "link"], 2, "holds something"),
    ],
)
def test_mistakes_are_told_before_the_model_is_loaded(
    arguments: list[str], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "full")
    assert run(["export", "no-such-model", *arguments]) == code
    out, err = capfd.readouterr()
    assert out == ""
    assert message in err
    assert err.startswith("llmctl: error: ")
    assert err.count("\n") == 1
    assert names(tmp_path) == ["file", "full", "link"]


def test_a_missing_model_is_10_and_a_bad_one_4(model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["export", str(tmp_path / "no-such-model"), "-o", str(tmp_path / "out")]) == 10
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text("{")
    assert run(["export", str(tmp_path / "bad"), "-o", str(tmp_path / "out")]) == 4
    assert run(["export", "-o", str(tmp_path / "out")]) == 2
    assert "MODEL is missing" in capfd.readouterr().err
    assert names(tmp_path) == ["bad"]


@pytest.mark.parametrize("settings", [["-o", "out"], ["-o", "m.gguf", "--format", "gguf"], ["-o", "v", "--format", "word2vec"]])
def test_a_full_disk_is_5_and_leaves_nothing(settings: list[str], model: str, tmp_path: Path) -> None:
    program = [sys.executable, "-m", "llmctl", "export", model, *settings, "--no-verify"]
    done = subprocess.run(
        ["prlimit", "--fsize=20000", *program], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 5, done.stderr
    assert done.stderr.splitlines()[-1].startswith("llmctl: error: cannot write")
    assert names(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing(number: signal.Signals, model: str, tmp_path: Path) -> None:
    program = [sys.executable, "-m", "llmctl", "export", model, "-o", "out"]
    process = subprocess.Popen(program, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stderr.readline().startswith("model ")
    while process.poll() is None and not names(tmp_path):
        time.sleep(0.001)  # until it writes
    process.send_signal(number)
    _, err = process.communicate(timeout=240)
    if names(tmp_path) == ["out"]:
        pytest.skip("it was quicker than the signal")
    assert process.returncode in (-number, 128 + number)
    assert "Traceback" not in err
    assert names(tmp_path) == []
