"""Fine-tuning in two processes, every weight or adapters, on any mesh: what one process makes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmctl.core.config.finetune import FinetuneConfig
from llmctl.core.errors import UsageError
from tests.core.data.test_chat import write_jsonl
from tests.core.train.test_finetune import ROWS, tiny_base
from tests.core.train.test_ranks import assert_equal_checkpoints, lines_of
from tests.rank_jobs import finetune, free_port, on_ranks

KINDS: dict[str, dict[str, Any]] = {"full": {}, "lora": {"method": "lora", "lora_rank": 4}}
MESHES = ["dp=2", "fsdp=2", "tp=2"]


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    tiny_base(tmp_path / "base")
    write_jsonl(tmp_path / "rows.jsonl", ROWS * 2)
    rows = [str(tmp_path / "rows.jsonl")]
    return {
        "model": str(tmp_path / "base"), "data": rows, "val_data": rows, "seq_len": 64, "batch_size": 4, "micro_batch_size": 1,
        "learning_rate": 1e-2, "max_steps": 4, "eval_every": 2, "save_every": 2, "dtype": "f32", "device": "cpu", "threads": 1,
        "rank_timeout": 120.0,
    }  # fmt: skip


def in_two(runs: list[dict[str, Any]], dtype: str = "f64") -> None:
    jobs = [{"job": "finetune", "settings": run, "dtype": dtype} for run in runs]
    on_ranks(2, "one_after_another", jobs=jobs, ports=[free_port() for _ in jobs])


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for kind in ("step", "eval") for line in lines_of(run_dir, kind)]


def assert_equal_adapters(one: Path, other: Path, tolerance: float) -> None:
    assert json.loads((other / "adapter_config.json").read_text()) == json.loads((one / "adapter_config.json").read_text())
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (other, one))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=tolerance, atol=tolerance * tensor.abs().max().item(), msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_any_mesh_makes_what_one_process_makes(settings: dict[str, Any], tmp_path: Path, kind: str) -> None:
    settings = {**settings, **KINDS[kind]}
    one = tmp_path / "one"
    finetune({**settings, "out_dir": str(one)}, "f64")
    shutil.copytree(one, tmp_path / "resumed")
    half = {"out_dir": str(tmp_path / "resumed"), "mesh": "fsdp=2", "resume_from": str(tmp_path / "resumed" / "step-00000002")}
    in_two([*({**settings, "out_dir": str(tmp_path / mesh), "mesh": mesh} for mesh in MESHES), {**settings, **half}])
    assert len(losses(one)) == 4 + 2
    for name in (*MESHES, "resumed"):
        assert losses(tmp_path / name) == pytest.approx(losses(one), rel=1e-6 if name == "resumed" else 1e-10), name
        last, theirs = tmp_path / name / "step-00000004", one / "step-00000004"
        if kind == "lora":
            assert_equal_adapters(theirs, last, 1e-5)  # checkpoints are float32, so what was resumed has been rounded once
        else:
            assert_equal_checkpoints(theirs, last, 1e-5)


@pytest.mark.slow
def test_adapters_with_dropout_over_a_spread_base_in_float32(settings: dict[str, Any], tmp_path: Path) -> None:
    settings = {**settings, **KINDS["lora"], "lora_dropout": 0.3}
    finetune({**settings, "out_dir": str(tmp_path / "one")}, "f32")
    in_two([{**settings, "out_dir": str(tmp_path / "two"), "mesh": "fsdp=2"}], "f32")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert_equal_adapters(tmp_path / "one" / "step-00000004", tmp_path / "two" / "step-00000004", 1e-4)


def test_dropout_of_adapters_is_refused_where_inputs_are_split() -> None:
    with pytest.raises(UsageError, match="--lora-dropout"):
        FinetuneConfig(method="lora", lora_dropout=0.1, mesh="tp=2")
    FinetuneConfig(method="lora", lora_dropout=0.1, mesh="fsdp=2")
