"""`--adapter` on the command line: what generate, eval and export make of one."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.cli.in_process import llmctl
from tests.core.data.test_chat import write_jsonl
from tests.core.train.test_finetune import ROWS, tiny_base


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, an adapter that was trained on it, and the two merged by export."""
    folder = tmp_path_factory.mktemp("adapter")
    tiny_base(folder / "base")
    write_jsonl(folder / "rows.jsonl", ROWS)
    done = ok(
        *("finetune", "-m", folder / "base", "--data", folder / "rows.jsonl", "-o", folder / "run", "--method", "lora"),
        *("--lora-r", 8, "--lr", 0.02, "--max-steps", 30, "--seq-len", 64, "--dtype", "f32", "--threads", 1),
    )
    assert "adapters of" in done.stderr
    (folder / "run" / "step-00000030").rename(folder / "adapter")
    done = ok("export", "--adapter", folder / "adapter", "-o", folder / "merged")
    assert "verified" in done.stdout
    return folder


def ok(*arguments: Any, **environ: str) -> "subprocess.CompletedProcess[str]":
    done = llmctl(*arguments, **environ)
    assert done.returncode == 0, done.stderr
    return done


def test_every_way_to_name_an_adapter_gives_the_merged_models_text(place: Path) -> None:
    greedy = ["-t", 0, "-n", 12, "Who are you?"]
    merged = ok("generate", "-m", place / "merged", *greedy).stdout
    assert merged != ok("generate", "-m", place / "base", *greedy).stdout
    for named in (["--adapter", place / "adapter"], ["-m", place / "adapter"], ["-m", place / "base", "--adapter-path", place / "adapter"]):
        assert ok("generate", *named, *greedy).stdout == merged
    assert ok("generate", "--adapter", place / "adapter", "--executor", "torch", *greedy).stdout == merged


def test_an_evaluation_and_a_prompt_know_the_adapter(place: Path) -> None:
    (place / "text.txt").write_text("Who are you? A small model.\n" * 4)
    adapted, merged, base = (
        float(ok("eval", *named, place / "text.txt", XDG_CACHE_HOME=str(place)).stdout.split("\tperplexity\t")[1].split("\t")[0])
        for named in (["--adapter", place / "adapter"], ["-m", place / "merged"], ["-m", place / "base"])
    )
    assert adapted == pytest.approx(merged, rel=1e-4)
    assert adapted != pytest.approx(base, rel=1e-2)
    shown = [ok("generate", *named, "--show-prompt", "Hi").stdout for named in (["-m", place / "adapter"], ["-m", place / "merged"])]
    assert shown[0] == shown[1]
    assert "<|im_start|>" in shown[0]


def test_another_base_is_exit_4_in_one_line(place: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(place / "base", tmp_path / "other")
    weights = load_file(place / "base" / "model.safetensors")
    save_file(
        {name: tensor + 0.01 for name, tensor in weights.items()}, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"}
    )
    (tmp_path / "text.txt").write_text("Hi\n")
    other = tmp_path / "other"
    for command in (
        ["generate", "-m", other, "Hi"],
        ["eval", "-m", other, tmp_path / "text.txt"],
        ["export", other, "-o", tmp_path / "never"],
    ):
        done = llmctl(*command, "--adapter", place / "adapter")
        assert done.returncode == 4, done.stderr
        assert "trained on another model" in done.stderr.strip().splitlines()[-1]
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "never").exists()


def test_gguf_and_quantised_exports_take_an_adapter(place: Path, tmp_path: Path) -> None:
    ok("export", "--adapter", place / "adapter", "-o", tmp_path / "small", "--format", "quant")
    greedy = ["-t", 0, "-n", 8, "Sky?"]
    assert (
        ok("generate", "-m", tmp_path / "small", *greedy).stdout
        == ok("generate", "-m", place / "adapter", "--quant", "int8", *greedy).stdout
    )
