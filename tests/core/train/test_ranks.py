"""Training in several processes: the same losses and weights as in one, whatever their number."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmctl.core.checkpoint import load_model
from llmctl.core.config.mesh import Mesh, parse_mesh
from llmctl.core.errors import UsageError
from llmctl.core.files import sha256_file
from llmctl.core.model.shapes import shape_for_depth
from llmctl.core.train.shard import check_splits
from llmctl.core.train.together import load_whole
from tests.rank_jobs import free_port, on_ranks, pretrain


@pytest.fixture
def settings(packed: Path) -> dict[str, Any]:
    return {
        "data": str(packed), "depth": 1, "seq_len": 32, "batch_size": 8, "micro_batch_size": 4, "max_steps": 20, "save_every": 0,
        "eval_every": 7, "sample_every": 0, "threads": 1, "dtype": "f32", "device": "cpu", "optimizer": "adamw",
        "rank_timeout": 120.0,
    }  # fmt: skip


def lines_of(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def losses_and_weights(run_dir: Path, masters: Path) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return torch.tensor([line["loss"] for line in lines_of(run_dir, "step")], dtype=torch.float64), load_file(masters)


@pytest.mark.parametrize(("dtype", "tolerance"), [("f64", 1e-10), pytest.param("f32", 1e-4, marks=pytest.mark.slow)])
def test_losses_and_weights_do_not_depend_on_the_number_of_ranks(
    settings: dict[str, Any], tmp_path: Path, dtype: str, tolerance: float
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    pretrain({**settings, "out_dir": str(one)}, dtype, str(tmp_path / "one.safetensors"))
    # micro-batches of 2: each rank adds up two of them, of which only the second meets the other rank
    again = {**settings, "out_dir": str(two), "micro_batch_size": 2}
    on_ranks(2, "pretrain", settings=again, dtype=dtype, masters=str(tmp_path / "two.safetensors"))
    losses, weights = losses_and_weights(one, tmp_path / "one.safetensors")
    other_losses, other_weights = losses_and_weights(two, tmp_path / "two.safetensors")
    assert len(losses) == 20
    assert losses[-1] < 0.75 * losses[0]
    torch.testing.assert_close(other_losses, losses, rtol=tolerance, atol=0)
    for name, weight in weights.items():
        torch.testing.assert_close(other_weights[name], weight, rtol=tolerance, atol=tolerance * weight.abs().max().item(), msg=name)
    samples = ("step", "first_sample", "num_samples", "num_tokens", "tokens_seen")
    for ours, theirs in zip(lines_of(two, "step"), lines_of(one, "step"), strict=True):
        assert [ours[key] for key in samples] == [theirs[key] for key in samples]
    counted = [[line[key] for key in ("step", "num_tokens", "num_bytes")] for line in lines_of(two, "eval")]
    assert counted == [[line[key] for key in ("step", "num_tokens", "num_bytes")] for line in lines_of(one, "eval")]


@pytest.mark.slow
def test_bf16_gradients_are_added_up_over_ranks_as_over_micro_batches(settings: dict[str, Any], tmp_path: Path) -> None:
    settings = {**settings, "optimizer": "muon", "max_steps": 3, "eval_every": 0}
    pretrain({**settings, "out_dir": str(tmp_path / "one")}, "bf16", str(tmp_path / "one.safetensors"))
    on_ranks(
        2, "pretrain", settings={**settings, "out_dir": str(tmp_path / "two")}, dtype="bf16", masters=str(tmp_path / "two.safetensors")
    )
    # the same two micro-batches of four rows, added in float32: not one bit differs
    assert sha256_file(tmp_path / "two.safetensors") == sha256_file(tmp_path / "one.safetensors")


def last_step(run_dir: Path) -> Path:
    return sorted(run_dir.glob("step-*"))[-1]


def assert_equal_checkpoints(one: Path, other: Path, tolerance: float) -> None:
    pairs = (load_model(one).model.state_dict(), load_model(other).model.state_dict()), (load_whole(one), load_whole(other))
    for ours, theirs in pairs:
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            torch.testing.assert_close(theirs[name], tensor, rtol=tolerance, atol=tolerance * tensor.abs().max().item(), msg=name)


MESHES = ["fsdp=2", pytest.param("tp=2", marks=pytest.mark.slow), pytest.param("dp=2,fsdp=2", marks=pytest.mark.slow)]


@pytest.mark.parametrize("mesh", [*MESHES, pytest.param("fsdp=2,tp=2", marks=pytest.mark.slow)])
def test_a_model_spread_over_ranks_trains_as_a_whole_one(settings: dict[str, Any], tmp_path: Path, mesh: str) -> None:
    settings = {**settings, "depth": 2, "optimizer": "muon", "clip": 0.5, "ema": 0.9, "max_steps": 8, "micro_batch_size": 2}
    pretrain({**settings, "out_dir": str(tmp_path / "one")}, "f64")
    size = math.prod(int(part.partition("=")[2]) for part in mesh.split(","))
    on_ranks(size, "pretrain", settings={**settings, "out_dir": str(tmp_path / "many"), "mesh": mesh}, dtype="f64")
    for kind in ("step", "eval"):
        ours, theirs = ([line["loss"] for line in lines_of(tmp_path / name, kind)] for name in ("many", "one"))
        assert ours == pytest.approx(theirs, rel=1e-10)
    norms, their_norms = ([line["grad_norm"] for line in lines_of(tmp_path / name, "step")] for name in ("many", "one"))
    assert norms == pytest.approx(their_norms, rel=1e-9)
    assert max(norms) > 0.5, "nothing was clipped"
    assert_equal_checkpoints(last_step(tmp_path / "one"), last_step(tmp_path / "many"), 1e-6)


@pytest.mark.slow
def test_spread_checkpoints_are_read_by_any_number_of_ranks_and_by_transformers(settings: dict[str, Any], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    settings = {**settings, "depth": 2, "optimizer": "muon", "save_every": 4, "eval_every": 0, "max_steps": 8}
    runs = {name: {**settings, "out_dir": str(tmp_path / name)} for name in ("whole", "spread", "from whole", "from spread", "again")}
    spread = {"mesh": "fsdp=2"}
    on_ranks(2, "pretrain", settings={**runs["spread"], **spread}, dtype="f32")
    folder = tmp_path / "spread" / "step-00000008"
    assert [path.name for path in folder.rglob("*") if path.suffix in (".pt", ".bin", ".metadata", ".distcp")] == []
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.randint(0, 512, (2, 16))
    torch.testing.assert_close(load_model(folder).model(tokens), theirs(tokens).logits, rtol=0, atol=1e-5)

    pretrain(runs["whole"], "f32")
    for origin, copy in (("whole", "from whole"), ("spread", "from spread"), ("spread", "again")):
        shutil.copytree(tmp_path / origin, tmp_path / copy)
        runs[copy]["resume_from"] = str(tmp_path / copy / "step-00000004")
    pretrain(runs["from spread"], "f32")
    on_ranks(2, "pretrain", settings={**runs["from whole"], **spread}, dtype="f32")
    on_ranks(2, "pretrain", settings={**runs["again"], **spread}, dtype="f32")
    for name in ("spread", "from spread", "from whole", "again"):
        assert_equal_checkpoints(tmp_path / "whole" / "step-00000008", tmp_path / name / "step-00000008", 1e-4)
        assert [line["step"] for line in lines_of(tmp_path / name, "step")] == list(range(1, 9))
    assert_equal_checkpoints(folder, tmp_path / "again" / "step-00000008", 0)  # on as many ranks as before: not one bit differs


@pytest.mark.slow
def test_checkpoints_go_between_one_two_and_four_ranks(settings: dict[str, Any], tmp_path: Path) -> None:
    """Each reads what each has written, all of it to the bit, and the next step's loss is the same."""
    meshes: dict[int, str | None] = {1: None, 2: "fsdp=2", 4: "fsdp=2,tp=2"}
    settings = {**settings, "depth": 2, "optimizer": "muon", "save_every": 2, "eval_every": 0, "max_steps": 3}

    def run(number: int, jobs: list[dict[str, Any]]) -> None:
        jobs = [{"job": "pretrain", "dtype": "f64", **job, "settings": {**job["settings"], "mesh": meshes[number]}} for job in jobs]
        if number == 1:
            for job in jobs:
                pretrain(job["settings"], job["dtype"], restored=job.get("restored"))
        else:
            on_ranks(number, "one_after_another", jobs=jobs, ports=[free_port() for _ in jobs])

    for writer in meshes:
        run(writer, [{"settings": {**settings, "out_dir": str(tmp_path / f"by {writer}")}}])
    next_losses = {}
    for reader in meshes:
        reading = []
        for writer in meshes:
            copy = tmp_path / f"{reader} from {writer}"
            shutil.copytree(tmp_path / f"by {writer}", copy)
            again = {**settings, "out_dir": str(copy), "resume_from": str(copy / "step-00000002")}
            reading.append({"settings": again, "restored": str(tmp_path / f"{reader} from {writer}.safetensors")})
        run(reader, reading)
        for writer in meshes:
            found = load_file(tmp_path / f"{reader} from {writer}.safetensors")
            checkpoint = tmp_path / f"by {writer}" / "step-00000002"
            written = {**load_model(checkpoint).model.state_dict(), **load_whole(checkpoint)}
            assert found.keys() == written.keys()
            assert all(torch.equal(tensor, written[name].float()) for name, tensor in found.items()), (reader, writer)
            next_losses[reader, writer] = lines_of(tmp_path / f"{reader} from {writer}", "step")[-1]["loss"]
    assert len(next_losses) == 9
    assert list(next_losses.values()) == pytest.approx([next_losses[1, 1]] * 9, rel=1e-6)  # what was written was float32
    for writer in meshes:
        assert [next_losses[reader, writer] for reader in meshes] == pytest.approx([next_losses[1, writer]] * 3, rel=1e-12)


def test_a_mesh_that_cannot_be_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    for mesh, complaint in {
        "fsdp=0": "write it like",
        "pp=2": "write it like",
        "fsdp=2,fsdp=2": "write it like",
        "fsdp=2": "does not divide the 1 processes",
        "dp=2": "makes 2 processes, there are 1",
    }.items():
        with pytest.raises(UsageError, match=complaint):
            pretrain({**settings, "out_dir": str(tmp_path / "run"), "mesh": mesh}, "f32")
    assert parse_mesh("fsdp=4,tp=2", num_processes=16) == Mesh(dp=2, fsdp=4, tp=2)
    assert parse_mesh(None, num_processes=3) == Mesh(dp=3)
    with pytest.raises(UsageError, match="attention heads, 2"):
        check_splits(shape_for_depth(2, 512, 32, "qwen3"), Mesh(tp=4))
