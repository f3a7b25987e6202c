"""What the loop is given: a job, live, and how often to do what. Knows the parts of a run; runs nothing."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from llmctl.core.config.mesh import Mesh
from llmctl.core.data.loader import SampleSource
from llmctl.core.distributed.ranks import Ranks
from llmctl.core.model import Decoder
from llmctl.core.runlog import RunFolder
from llmctl.core.train.evaluation import HeldOut
from llmctl.core.train.objectives import Objective
from llmctl.core.train.optim import OptimConfig
from llmctl.core.train.outputs import Output
from llmctl.core.train.schedule import Schedule
from llmctl.core.train.state import Checkpoint

Stop = Callable[[], int | None]


def largest_part(rows: int, most: int) -> int:
    """The largest number of rows, up to `most`, that divides `rows`."""
    return max(size for size in range(1, min(rows, most) + 1) if rows % size == 0)


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How often the loop does what. 0 for an interval means "at the end only" (samples: never)."""

    batch_size: int
    """Samples in an optimizer step, over all micro-batches and ranks."""
    micro_batch_size: int
    log_every: int = 10
    eval_every: int = 0
    eval_tokens: int = 65_536
    final_eval_tokens: int = 4_194_304
    save_every: int = 0
    sample_every: int = 0
    keep_last: int = 2
    nonfinite_skips: int = 0
    on_spike: Literal["ignore", "rewind"] = "ignore"
    profile: bool = False
    async_save: bool = False
    on_full: Literal["fail", "wait"] = "fail"


@dataclass(kw_only=True)
class TrainJob:
    """Everything a run of the loop needs, live. The run folder is entered and locked by the caller, who also closes it."""

    run: RunFolder
    model: Decoder
    source: SampleSource
    objective: Objective
    optim: OptimConfig
    schedule: Schedule
    loop: LoopConfig
    compute_dtype: torch.dtype
    device: torch.device
    output: Output
    """Writes the model's part of a checkpoint, masters of what is trained and the rest as it is, and reads it back."""
    settings: dict[str, Any]
    """What shapes the course of the run; a resume with other values is refused unless allowed."""
    identity: dict[str, Any]
    """What the run is about (data, tokenizer, architecture); a resume with others is refused."""
    resume_command: str
    hidden_matrices: tuple[str, ...] = ()
    """Names of the parameters for Muon."""
    held_out: HeldOut | None = None
    sample: Callable[[Decoder, int], tuple[str, str]] | None = None
    """Gives (prompt, text) from the model as it is at a step."""
    resume: Checkpoint | None = None
    allow_change: tuple[str, ...] = ()
    compile: Literal["auto", "on", "off"] = "off"
    flops_per_token: float = 0.0
    matmul_peak: float = math.inf
    threads: int = field(default_factory=torch.get_num_threads)
    master_dtype: torch.dtype = torch.float32
    weights: Callable[[], Iterator[tuple[str, Tensor]]] | None = None
    """Of a model on the meta device, which is to be spread over processes: its weights, whole tensors one after the other."""
    mesh: Mesh = field(default_factory=Mesh)
    offload: bool = False
    ranks: Ranks = field(default_factory=Ranks)
    """The processes that train together; filled in by the caller of `Subject.make_job`."""
