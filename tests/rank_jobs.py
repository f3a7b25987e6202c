"""What tests let several processes do together: `on_ranks` starts them as a batch system would, by their environment."""

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from llmctl.core.config.pretrain import PretrainConfig
from llmctl.core.train import plan as planning
from llmctl.core.train import pretrain as pretraining
from llmctl.core.train.loop import Trainer

DTYPES = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16}


def on_ranks(number: int, job: str, *, timeout_s: float = 900, **arguments: Any) -> None:
    """Run the function `job` of this file in `number` processes and wait for them."""
    processes = start_ranks(number, job, **arguments)
    ended = [process.communicate(timeout=timeout_s) for process in processes]
    for process, (_, errors) in zip(processes, ended, strict=True):
        assert process.returncode == 0, errors


def start_ranks(number: int, job: str, *, port: int | None = None, **arguments: Any) -> "list[subprocess.Popen[str]]":
    """The processes, started."""
    port = free_port() if port is None else port
    command = [sys.executable, "-c", "import sys; from tests import rank_jobs; rank_jobs.main(*sys.argv[1:])", job, json.dumps(arguments)]
    common = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(number)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(command, env={**common, "RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(number)
    ]


def free_port() -> int:
    """A port that nobody listens on, a moment ago.

    Below the range from which systems take ports for those that ask for any, so that no such process gets it in between.
    """
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


def main(job: str, arguments: str) -> None:
    """In a process of `on_ranks`."""
    globals()[job](**json.loads(arguments))


def pretrain(settings: dict[str, Any], dtype: str, masters: str | None = None) -> list[float]:
    """Pre-train with arithmetic in `dtype`; rank 0 leaves the masters, if it has them whole, in a file. Gives the losses."""
    kept: list[Trainer] = []

    class Wide(Trainer):
        def __init__(self, job: Any) -> None:
            job.compute_dtype = DTYPES[dtype]
            job.master_dtype = torch.float64 if dtype == "f64" else torch.float32
            job.model.to(job.master_dtype)
            super().__init__(job)
            kept.append(self)

    original, planning.Trainer = planning.Trainer, Wide  # type: ignore[misc, attr-defined]
    try:
        events = list(
            pretraining.train(PretrainConfig(**{k: Path(v) if k in ("data", "out_dir", "resume_from") else v for k, v in settings.items()}))
        )
    finally:
        planning.Trainer = original  # type: ignore[misc, attr-defined]
    if os.environ.get("RANK", "0") == "0" and masters is not None:
        save_file({name: tensor.contiguous() for name, tensor in kept[0].optimizer.masters.items()}, masters)
    return [event.loss for event in events if type(event).__name__ == "StepDone"]
