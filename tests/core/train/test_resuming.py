"""The command that a stopped run names: it starts as many processes in the same way, and the program takes it."""

import shlex
from pathlib import Path

import pytest

from llmctl.core.config.finetune import FinetuneConfig
from llmctl.core.config.pretrain import PretrainConfig
from llmctl.core.train.resuming import resume_command

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "x", "TORCHELASTIC_RUN_ID": "none"}
PLAIN = "llmctl pretrain --out-dir run --resume"


@pytest.mark.parametrize(
    ("environ", "command"),
    [
        ({}, PLAIN),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "4", "LLMCTL_LAUNCHED": "7"}, f"{PLAIN} --nproc 4"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "4"}, f"torchrun --standalone --nproc-per-node 4 -m {PLAIN}"),
        (
            {**TORCHRUN, "LOCAL_WORLD_SIZE": "2"},
            f"torchrun --nnodes 2 --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint HOST:PORT -m {PLAIN}  # on each machine",
        ),
        ({"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "x"}, f"{PLAIN}  # in 4 processes, started as before"),
    ],
    ids=["alone", "--nproc", "torchrun", "two machines", "batch system"],
)
def test_it_starts_the_processes_that_there_were(environ: dict[str, str], command: str) -> None:
    assert resume_command("pretrain", PretrainConfig(out_dir=Path("run")), environ) == command


def test_it_says_what_the_run_folder_does_not_keep() -> None:
    config = FinetuneConfig(out_dir=Path("a run"), threads=1, mesh="fsdp=2", rank_timeout=5.0, seed=3)
    words = shlex.split(resume_command("finetune", config, {}))
    assert words == [
        "llmctl", "finetune", "--out-dir", "a run", "--resume", "--threads", "1", "--mesh", "fsdp=2", "--rank-timeout", "5",
    ]  # fmt: skip
    words = shlex.split(resume_command("pretrain", PretrainConfig(out_dir=Path("run"), device="cpu", async_save=True), {}))
    assert words[5:] == ["--async-save", "--device", "cpu"]
