"""What tests let several processes do together: `on_ranks` starts them as a batch system would, by their environment."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from llmctl.core.config.finetune import FinetuneConfig
from llmctl.core.config.pretrain import PretrainConfig
from llmctl.core.errors import WriteError
from llmctl.core.train import finetune as finetuning
from llmctl.core.train import loop, outputs, saving, together
from llmctl.core.train import plan as planning
from llmctl.core.train import pretrain as pretraining
from llmctl.core.train.loop import Trainer
from llmctl.core.train.sharded import ShardedOptimizer

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


def one_after_another(jobs: list[dict[str, Any]], ports: list[int]) -> None:
    """Several jobs of this file in the same processes, which saves starting them anew; each meets at a port of its own."""
    for arguments, port in zip(jobs, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        globals()[arguments.pop("job")](**arguments)


def pretrain_with_a_full_disk(settings: dict[str, Any], at_rank: int, told: str) -> None:
    """Pre-train, with no room for the weights that rank `at_rank` writes; each rank leaves what it raised in a file."""

    def full(*_args: Any, **_named: Any) -> None:
        raise WriteError("no space left for the weights")

    rank = int(os.environ["RANK"])
    if rank == at_rank:
        outputs.save_model = full  # type: ignore[attr-defined]
    try:
        pretrain(settings, "f32")
    except WriteError as error:
        Path(told.format(rank)).write_text(str(error))


def pretrain_and_die(settings: dict[str, Any], at_rank: int, function: str, call: int) -> None:
    """Pre-train until rank `at_rank` calls `function` of train/together.py for the `call`-th time, where it is killed."""
    original, calls = getattr(together, function), iter(range(1, 100))

    def deadly(*args: Any, **named: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **named)

    if int(os.environ["RANK"]) == at_rank:
        setattr(together, function, deadly)
    pretrain(settings, "f32")


def finetune(settings: dict[str, Any], dtype: str) -> list[float]:
    """Fine-tune with arithmetic in `dtype`. Gives the losses."""
    lists = {k: tuple(map(Path, settings[k])) for k in ("data", "val_data") if k in settings}
    paths = {k: Path(settings[k]) for k in ("out_dir", "resume_from") if k in settings}
    config = FinetuneConfig(**{**settings, **lists, **paths})
    return _trained(finetuning.train(config), dtype, None)


def pretrain(settings: dict[str, Any], dtype: str, masters: str | None = None, restored: str | None = None) -> list[float]:
    """Pre-train with arithmetic in `dtype`; rank 0 leaves the masters, if it has them whole, in a file. Gives the losses.

    In the file `restored` it leaves all that was read from a checkpoint to go on from.
    """
    config = PretrainConfig(**{k: Path(v) if k in ("data", "out_dir", "resume_from") else v for k, v in settings.items()})
    if restored is not None:
        loop.restore = telling_what_it_read(restored)  # type: ignore[attr-defined]
    try:
        return _trained(pretraining.train(config), dtype, masters)
    finally:
        loop.restore = saving.restore  # type: ignore[attr-defined]


def telling_what_it_read(file: str) -> Callable[[Trainer, Any], None]:
    """saving.restore, after which rank 0 writes the whole tensors of masters and optimizer."""

    def restore(trainer: Trainer, checkpoint: Any) -> None:
        saving.restore(trainer, checkpoint)
        optimizer = trainer.optimizer
        masters = optimizer.whole(optimizer.masters) if isinstance(optimizer, ShardedOptimizer) else optimizer.masters
        state = {k: t.full_tensor() if isinstance(t, DTensor) else t for k, t in optimizer.state_tensors().items()}
        tensors = {name: tensor.detach().float().clone() for name, tensor in {**masters, **state}.items()}
        if trainer.job.ranks.is_main:
            save_file(tensors, file)

    return restore


def _trained(running: Iterator[Any], dtype: str, masters: str | None) -> list[float]:
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
        events = list(running)
    finally:
        planning.Trainer = original  # type: ignore[misc, attr-defined]
    if os.environ.get("RANK", "0") == "0" and masters is not None:
        save_file({name: tensor.contiguous() for name, tensor in kept[0].optimizer.masters.items()}, masters)
    return [event.loss for event in events if type(event).__name__ == "StepDone"]
