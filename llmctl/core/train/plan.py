"""What every kind of training plans alike: resume, budget, machine, plan and the order of doing. Knows no data and no command.

A Subject is what is trained on what. It opens and checks everything before anything is written; then the run folder is
entered, the job made, the plan told, and the loop started.
"""

import dataclasses
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol, cast

import torch

from llmctl.core.config.finetune import FinetuneConfig
from llmctl.core.config.mesh import Mesh, parse_mesh
from llmctl.core.config.model import ModelConfig
from llmctl.core.config.pretrain import RESUME_ONLY, PretrainConfig, seconds, skips_allowed
from llmctl.core.config.stored import to_toml
from llmctl.core.data.mixture import SourceUse
from llmctl.core.distributed.ranks import Ranks, joined
from llmctl.core.errors import UsageError
from llmctl.core.model.device import choose_device
from llmctl.core.model.facts import flops_per_token, muon_scratch_bytes, num_parameters, tensor_shapes, training_memory
from llmctl.core.runlog import RunFolder
from llmctl.core.train import machine
from llmctl.core.train import state as checkpoints
from llmctl.core.train.cluster import Work, parse_cluster, planned_elsewhere
from llmctl.core.train.entering import RunConfig, begins, check_share, enter, found_together, opened_together
from llmctl.core.train.events import Event, Planned, PlannedElsewhere, Warned
from llmctl.core.train.job import LoopConfig, Stop, TrainJob, largest_part
from llmctl.core.train.loop import Trainer
from llmctl.core.train.optim import OptimConfig
from llmctl.core.train.saving import checkpoint_bytes
from llmctl.core.train.schedule import Schedule
from llmctl.core.train.shard import check_splits

SHAPING = (
    "seed",
    "max_steps",
    "max_tokens",
    "epochs",
    "max_time",
    "optimizer",
    "learning_rate",
    "muon_learning_rate",
    "weight_decay",
    "beta1",
    "beta2",
    "muon_momentum",
    "clip",
    "schedule",
    "warmup_steps",
    "decay_fraction",
    "final_lr_fraction",
)
"""Settings that shape the course of any run, beside its sizes and the dtype: a resume compares them."""
_BUDGET = ("max_steps", "max_tokens", "epochs", "max_time")

_FEW_STEPS = 100
_LONG_ENOUGH_TO_COMPILE_S = 600.0
_EXPECTED_PEAK_SHARE = 0.5
"""Of the measured matmul peak, for the estimate of time."""


@dataclass(frozen=True)
class Machine:
    """Where and how it is computed."""

    device: torch.device
    dtype: torch.dtype
    matmul_peak: float
    threads: int
    mesh: Mesh = field(default_factory=Mesh)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """A step: `batch_size` sequences of `seq_len` tokens, `micro_batch_size` of them at a time."""

    seq_len: int
    batch_size: int
    micro_batch_size: int

    @property
    def batch_tokens(self) -> int:
        """Tokens in a step."""
        return self.batch_size * self.seq_len


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a Subject found when it opened everything."""

    sizes: Sizes
    samples_per_epoch: int
    data_tokens: int
    architecture: ModelConfig
    family: str
    learning_rate: float
    default_epochs: float
    default_warmup: Callable[[int], int]
    """Steps of warm-up for so many steps in all, where --warmup-steps is not given."""
    num_adapted: int | None = None
    """Numbers of the adapters, where they are all that is trained."""
    uses: Callable[[int], tuple[SourceUse, ...]] = lambda num_samples: ()
    """What so many samples take of each source, where there are several."""

    @property
    def flops_per_token(self) -> float:
        """Operations to train on a token."""
        return flops_per_token(self.architecture, self.sizes.seq_len, num_adapted=self.num_adapted)


class Subject(Protocol):
    """What is trained on what."""

    def open(self, stop: Stop) -> Iterator[Event]:
        """Open and check everything, without writing anything."""
        ...

    @property
    def prepared(self) -> Prepared:
        """After `open`."""
        ...

    def make_job(self, run: RunFolder, where: Machine, checkpoint: checkpoints.Checkpoint | None) -> TrainJob:
        """The job, with weights; its schedule's steps and its loop's intervals are filled in afterwards."""
        ...


def train_subject(config: RunConfig, subject: Subject, *, stop: Stop, save_requested: Callable[[], bool]) -> Iterator[Event]:
    """Train `subject` as `config` says, or go on with its run; ends with Finished (or Planned, for a dry run).

    Raises LlmctlError of many kinds, each before anything is lost; see the loop's Trainer.events.
    """
    device = choose_device(config.device)
    with joined(cuda=device.type == "cuda", timeout_s=config.rank_timeout) as ranks:
        if ranks.size > 1 and device.type == "mps":
            raise UsageError("several processes train on CPUs or CUDA GPUs, not on mps; leave --nproc out")
        mesh = parse_mesh(config.mesh, num_processes=config.nproc if config.dry_run else ranks.size)
        yield from _train_together(config, subject, ranks.with_peers(mesh.tp), mesh, stop, save_requested)


def _train_together(
    config: RunConfig, subject: Subject, ranks: Ranks, mesh: Mesh, stop: Stop, save_requested: Callable[[], bool]
) -> Iterator[Event]:
    resuming = bool(ranks.on_main(lambda: begins(config)))
    run: RunFolder | None = None
    if resuming and config.out_dir is not None and not config.dry_run:
        run = enter(config.out_dir, ranks, fresh=False)  # held before the checkpoints are looked at
    try:
        checkpoint, warnings = found_together(config, ranks) if resuming else (None, [])
        yield from (Warned(message=text) for text in warnings)
        yield from opened_together(subject.open(stop), ranks)
        check_share(subject.prepared.sizes.batch_size, ranks.data_size)
        check_splits(subject.prepared.architecture, mesh)
        where = _choose_machine(config, checkpoint, mesh)
        if config.auto_resume and checkpoint is None:
            yield Warned(message=f"{config.out_dir}: no checkpoint to go on from, so the run starts afresh")
        if config.dry_run and config.plan_for is not None:
            yield _plan_elsewhere(config, subject.prepared, checkpoint, where)
            return
        if config.dry_run:
            yield _plan(config, subject.prepared, where, _num_steps(config, subject.prepared, where, checkpoint, None))
            return
        assert config.out_dir is not None
        if run is None:
            run = enter(config.out_dir, ranks, fresh=not config.auto_resume)
        yield from _run(config, subject, where, run, checkpoint, ranks, stop, save_requested)
    finally:
        if run is not None:
            run.close()


def _choose_machine(config: RunConfig, checkpoint: checkpoints.Checkpoint | None, mesh: Mesh) -> Machine:
    machine.prepare(threads=config.threads)
    device = choose_device(config.device)
    wanted = config.dtype
    if wanted == "auto" and checkpoint is not None:
        wanted = checkpoint.state.settings.get("dtype", "auto")
    dtype = machine.choose_dtype(wanted, device)
    return Machine(device, dtype, machine.matmul_peak(dtype, device), torch.get_num_threads(), mesh)


def micro_batch_size(wanted: int | None, *, batch_size: int, seq_len: int, most_tokens: int) -> int:
    """`wanted`, or the largest part of a batch that divides it and holds at most `most_tokens` tokens (one sequence at least)."""
    return largest_part(batch_size, max(1, most_tokens // seq_len) if wanted is None else wanted)


def _num_steps(
    config: RunConfig, prepared: Prepared, where: Machine, checkpoint: checkpoints.Checkpoint | None, trainer: Trainer | None
) -> int:
    """The budget in steps; a resumed run keeps its own, unless the budget itself was changed."""
    if checkpoint is not None and all(checkpoint.state.settings.get(k) == getattr(config, k) for k in _BUDGET):
        return checkpoint.state.num_steps
    sizes = prepared.sizes
    if config.max_steps is not None:
        return config.max_steps
    if config.max_tokens is not None:
        return math.ceil(config.max_tokens / sizes.batch_tokens)
    if config.max_time is not None:
        if trainer is not None:
            step_s = trainer.time_steps()
        else:
            flops = sizes.batch_tokens * prepared.flops_per_token
            step_s = flops / (where.matmul_peak * _EXPECTED_PEAK_SHARE)
        return max(1, int(seconds(config.max_time, flag="--max-time") / step_s))
    epochs = config.epochs if config.epochs is not None else prepared.default_epochs
    return max(1, math.ceil(epochs * prepared.samples_per_epoch / sizes.batch_size))


def _intervals(config: RunConfig, prepared: Prepared, num_steps: int) -> tuple[int, int, int]:
    """Steps between evaluations, checkpoints and samples."""
    tenth = max(1, num_steps // 10)
    if isinstance(config, FinetuneConfig):  # few steps, large checkpoints: an epoch, or less where epochs are long
        an_epoch = math.ceil(prepared.samples_per_epoch / prepared.sizes.batch_size)
        tenth = min(an_epoch, max(_FEW_STEPS, tenth))
    eval_every = config.eval_every if config.eval_every is not None else tenth
    save_every = config.save_every if config.save_every is not None else min(1000, tenth)
    if isinstance(config, FinetuneConfig):
        return eval_every, save_every, 0
    return eval_every, save_every, config.sample_every if config.sample_every is not None else eval_every


def _plan(config: RunConfig, prepared: Prepared, where: Machine, num_steps: int) -> Planned:
    architecture, sizes = prepared.architecture, prepared.sizes
    count = num_parameters(architecture).total
    trained = count if prepared.num_adapted is None else prepared.num_adapted
    flops = prepared.flops_per_token
    muon_share = 0.0
    if config.optimizer == "muon":
        muon_share = _hidden_numbers(architecture) / count if prepared.num_adapted is None else 1.0
    memory = training_memory(
        architecture,
        tokens_per_micro_batch=sizes.micro_batch_size * sizes.seq_len,
        compute_bytes=where.dtype.itemsize,
        moments=2.0 - muon_share,
        num_adapted=prepared.num_adapted,
        update_bytes=muon_scratch_bytes(architecture, compute_bytes=where.dtype.itemsize) if _muon_on_all(config, prepared) else 0,
    )
    total_flops = flops * sizes.batch_tokens * num_steps
    eval_every, save_every, sample_every = _intervals(config, prepared, num_steps)
    return Planned(
        num_parameters=count,
        num_trained=trained,
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        vocab_size=architecture.vocab_size,
        family=prepared.family,
        data_tokens=prepared.data_tokens,
        num_steps=num_steps,
        batch_tokens=sizes.batch_tokens,
        num_tokens=sizes.batch_tokens * num_steps,
        epochs=sizes.batch_size * num_steps / prepared.samples_per_epoch,
        flops_per_token=flops,
        total_flops=total_flops,
        memory_bytes=memory.total_bytes,
        checkpoint_bytes=int(trained * 4 * (3.0 - muon_share)),
        matmul_peak_flops=where.matmul_peak,
        estimated_s=total_flops / (where.matmul_peak * _EXPECTED_PEAK_SHARE),
        seq_len=sizes.seq_len,
        batch_size=sizes.batch_size,
        micro_batch_size=sizes.micro_batch_size,
        warmup_steps=config.warmup_steps if config.warmup_steps is not None else prepared.default_warmup(num_steps),
        learning_rate=prepared.learning_rate,
        muon_learning_rate=config.muon_learning_rate,
        eval_every=eval_every,
        save_every=save_every,
        sample_every=sample_every,
        dtype=machine.dtype_name(where.dtype),
        device=str(where.device),
        threads=where.threads,
        seed=config.seed,
        run_dir=None if config.out_dir is None else str(config.out_dir),
        sources=prepared.uses(sizes.batch_size * num_steps),
    )


def _muon_on_all(config: RunConfig, prepared: Prepared) -> bool:
    """Whether Muon treats the hidden matrices themselves; those of adapters are small."""
    return config.optimizer == "muon" and prepared.num_adapted is None


def _plan_elsewhere(config: RunConfig, prepared: Prepared, checkpoint: checkpoints.Checkpoint | None, where: Machine) -> PlannedElsewhere:
    assert config.plan_for is not None
    cluster = parse_cluster(config.plan_for)
    mesh = parse_mesh(config.mesh, num_processes=cluster.num_gpus)
    architecture, sizes = prepared.architecture, prepared.sizes
    check_splits(architecture, mesh)
    check_share(sizes.batch_size, mesh.data_size)
    if config.dtype == "f32":
        raise UsageError("--plan-for: its table holds peaks of products in bf16; leave --dtype f32 out")
    work = Work(
        seq_len=sizes.seq_len,
        batch_size=sizes.batch_size,
        micro_batch_size=sizes.micro_batch_size,
        muon_share=_hidden_numbers(architecture) / num_parameters(architecture).total if config.optimizer == "muon" else 0.0,
        recomputes=isinstance(config, PretrainConfig) and config.gradient_checkpointing,
    )

    def num_steps(step_s: float) -> int:
        if config.max_time is not None:
            return max(1, int(seconds(config.max_time, flag="--max-time") / step_s))
        return _num_steps(config, prepared, where, checkpoint, None)

    return planned_elsewhere(architecture, mesh, cluster, work, num_steps)


def _hidden_numbers(architecture: ModelConfig) -> int:
    return sum(math.prod(shape) for name, shape in tensor_shapes(architecture).items() if is_hidden_matrix(name, len(shape)))


def is_hidden_matrix(name: str, num_dimensions: int) -> bool:
    """Whether Muon treats the parameter: a matrix between hidden states, not an embedding or the head."""
    return name.startswith("layers.") and num_dimensions == 2


def _run(
    config: RunConfig,
    subject: Subject,
    where: Machine,
    run: RunFolder,
    checkpoint: checkpoints.Checkpoint | None,
    ranks: Ranks,
    stop: Stop,
    save_requested: Callable[[], bool],
) -> Iterator[Event]:
    prepared = subject.prepared
    job = subject.make_job(run, where, checkpoint)
    job.ranks, job.mesh, job.offload = ranks, where.mesh, config.offload
    if where.mesh.shards and job.weights is None:
        _lay_out(job)
    compiles = _compiles(config, job, prepared, where, checkpoint)
    job.settings["compile"] = ranks.on_main(lambda: compiles)
    if checkpoint is not None:
        for text in checkpoints.compare(
            checkpoint.state,
            settings=job.settings,
            identity=job.identity,
            allowed=config.allow_change,
            threads=where.threads,
            ranks=ranks.size,
        ):
            yield Warned(message=text)
    if job.settings["compile"]:
        for layer in job.model.layers:
            layer.compile()
    ranks.wait()
    trainer = Trainer(job)
    own_num_steps = _num_steps(config, prepared, where, checkpoint, trainer)
    num_steps: int = ranks.on_main(lambda: own_num_steps)  # a budget of time is measured, and each rank measures another
    if checkpoint is not None and num_steps < checkpoint.state.step:
        raise UsageError(f"the budget is {num_steps} steps, but the run has already done {checkpoint.state.step}; raise it")
    run.store_config(to_toml(config, leave_out=RESUME_ONLY))
    plan = _plan(config, prepared, where, num_steps)
    run.store_plan(dataclasses.asdict(plan), machine=machine.facts(where.device))
    warmup_steps = plan.warmup_steps
    if checkpoint is not None and config.warmup_steps == checkpoint.state.settings.get("warmup_steps"):
        warmup_steps = checkpoint.state.warmup_steps
    job.schedule = dataclasses.replace(job.schedule, num_steps=num_steps, warmup_steps=warmup_steps)
    job.loop = dataclasses.replace(job.loop, eval_every=plan.eval_every, save_every=plan.save_every, sample_every=plan.sample_every)
    yield plan
    free = shutil.disk_usage(run.path).free
    needed = 2 * checkpoint_bytes(trainer)
    if free < needed:
        yield Warned(message=f"{run.path}: {free:,} bytes are free, two checkpoints need {needed:,}; a save may fail for lack of room")
    yield from trainer.events(stop, save_requested)


def _lay_out(job: TrainJob) -> None:
    """Put the model's shape where it can be spread, and its weights aside; those that are mapped from a file take no memory."""
    whole = job.model.state_dict()
    names = [name for name, _ in job.model.named_parameters()]
    job.model, job.weights = job.model.to("meta"), lambda: ((name, whole.pop(name)) for name in names)


def _compiles(config: RunConfig, job: TrainJob, prepared: Prepared, where: Machine, checkpoint: checkpoints.Checkpoint | None) -> bool:
    """Whether the layers go through torch.compile, which changes bits: a resumed run does as it did before."""
    if job.compile != "auto":
        return job.compile == "on"
    if checkpoint is not None:
        return bool(checkpoint.state.settings.get("compile", False))
    num_steps = _num_steps(config, prepared, where, None, None)
    flops = num_steps * prepared.sizes.batch_tokens * flops_per_token(prepared.architecture, prepared.sizes.seq_len)
    return compile_pays(where.device, expected_s=flops / (where.matmul_peak * _EXPECTED_PEAK_SHARE))


def compile_pays(device: torch.device, *, expected_s: float) -> bool:
    """Whether compiling is worth its time: half a minute or more.

    On a CPU it brought nothing (0.97 times the tokens a second of the own kernels, on two cores).
    """
    return device.type != "cpu" and expected_s >= _LONG_ENOUGH_TO_COMPILE_S


def settings_of(config: RunConfig, sizes: Sizes, where: Machine) -> dict[str, object]:
    """What shapes the course of a run, as a checkpoint stores it."""
    return {name: getattr(config, name) for name in SHAPING} | dataclasses.asdict(sizes) | {"dtype": machine.dtype_name(where.dtype)}


def optim_of(config: RunConfig) -> OptimConfig:
    """The optimizer's part of the settings."""
    assert config.learning_rate is not None  # a Subject fills it in
    return OptimConfig(
        kind=cast(Literal["muon", "adamw"], config.optimizer),
        learning_rate=config.learning_rate,
        muon_learning_rate=config.muon_learning_rate,
        weight_decay=config.weight_decay,
        beta1=config.beta1,
        beta2=config.beta2,
        muon_momentum=config.muon_momentum,
        clip=config.clip or None,
    )


def schedule_of(config: RunConfig) -> Schedule:
    """The schedule's part of the settings; the number of steps comes later."""
    return Schedule(
        num_steps=1,
        kind=cast(Literal["cosine", "linear", "wsd"], config.schedule),
        decay_fraction=config.decay_fraction,
        final_fraction=config.final_lr_fraction,
    )


def loop_of(config: RunConfig, sizes: Sizes) -> LoopConfig:
    """The loop's part of the settings; the intervals come later."""
    return LoopConfig(
        batch_size=sizes.batch_size,
        micro_batch_size=sizes.micro_batch_size,
        log_every=config.log_every,
        eval_tokens=config.eval_tokens or LoopConfig.eval_tokens,
        final_eval_tokens=config.eval_tokens or LoopConfig.final_eval_tokens,
        keep_last=config.keep_last,
        nonfinite_skips=skips_allowed(config.nonfinite),
        on_full=cast(Literal["fail", "wait"], config.on_full),
    )
