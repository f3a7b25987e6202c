"""Pre-training: from PretrainConfig to a plan and a job for the loop. Knows packed data and models; knows no command line."""

import dataclasses
import json
import math
import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from llmctl.core.checkpoint import check_tokenizer, load_config, load_model, resolve_model, save_model
from llmctl.core.config.model import ModelConfig
from llmctl.core.config.pretrain import RESUME_ONLY, PretrainConfig, seconds, skips_allowed
from llmctl.core.config.stored import to_toml
from llmctl.core.data.loader import EvalSource, PretrainSource
from llmctl.core.data.shards import TokenDataset
from llmctl.core.errors import InputError, NotFoundError, UsageError
from llmctl.core.files import check_manifest, check_out_dir
from llmctl.core.model import Decoder
from llmctl.core.model.facts import flops_per_token, num_parameters, tensor_shapes, training_memory
from llmctl.core.model.shapes import shape_for_depth
from llmctl.core.runlog import RunFolder
from llmctl.core.tokenizer import Tokenizer
from llmctl.core.train import machine
from llmctl.core.train import state as checkpoints
from llmctl.core.train.evaluation import HeldOut
from llmctl.core.train.events import Event, Planned, Warned
from llmctl.core.train.loop import LoopConfig, Stop, Trainer, TrainJob
from llmctl.core.train.objectives import NextToken
from llmctl.core.train.optim import OptimConfig
from llmctl.core.train.sampling import sampler
from llmctl.core.train.schedule import Schedule

SHAPING = (
    "seq_len",
    "seed",
    "max_steps",
    "max_tokens",
    "epochs",
    "max_time",
    "batch_size",
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
"""Settings that shape the course of a run, beside the resolved dtype and micro-batch: a resume compares them."""
_SPLITS: tuple[Literal["val"], Literal["train"]] = ("val", "train")
_BUDGET = ("max_steps", "max_tokens", "epochs", "max_time")

_MICRO_BATCH_TOKENS = 8192
_MANY_DOCUMENTS = 100
_HASHED_BYTES = 4 << 30
"""Data up to this size is checked against its hashes at each start; beyond, `llmctl tokenize verify` does it."""
_EXPECTED_PEAK_SHARE = 0.5
"""Of the measured matmul peak, for the estimate of time."""


def train(config: PretrainConfig, *, stop: Stop = lambda: None, save_requested: Callable[[], bool] = lambda: False) -> Iterator[Event]:
    """Pre-train as `config` says, or go on with a run; yields events and ends with Finished (or Planned, for a dry run).

    Raises LlmctlError of many kinds, each before anything is lost; see the loop's Trainer.events.
    """
    if config.data is None:
        raise UsageError("--data is missing: the folder of token shards made by `llmctl tokenize pack`")
    if config.out_dir is None and not config.dry_run:
        raise UsageError("--out-dir is missing: the run folder for checkpoints and metrics")
    resuming = _wants_resume(config)
    if config.out_dir is not None and not resuming:
        check_out_dir(config.out_dir)
    early = RunFolder(config.out_dir, fresh=False) if resuming and config.out_dir is not None and not config.dry_run else None
    run = early
    try:
        subject = _open_subject(config)
        checkpoint, warnings = _find_checkpoint(config) if resuming else (None, [])
        choice = _choose_machine(config, checkpoint)
        for text in warnings:
            yield Warned(message=text)
        if config.auto_resume and checkpoint is None:
            yield Warned(message=f"{config.out_dir}: no checkpoint to go on from, so the run starts afresh")
        if config.dry_run:
            yield _plan(config, subject, choice, _num_steps(config, subject, choice, checkpoint, None))
            return
        assert config.out_dir is not None
        if run is None:
            run = RunFolder(config.out_dir, fresh=not config.auto_resume)
        yield from _run(config, subject, choice, run, checkpoint, stop, save_requested)
    finally:
        if run is not None:
            run.close()


@dataclass(frozen=True)
class _Subject:
    """What is trained on what, opened and checked, without weights."""

    dataset: TokenDataset
    source: PretrainSource
    tokenizer: Tokenizer
    architecture: ModelConfig
    family: str
    base: Path | None
    generation: dict[str, Any]
    held_out: TokenDataset | None


@dataclass(frozen=True)
class _Machine:
    """Where and how it is computed."""

    device: torch.device
    dtype: torch.dtype
    micro_batch_size: int
    matmul_peak: float
    threads: int


def _wants_resume(config: PretrainConfig) -> bool:
    if config.resume_from is not None:
        if config.out_dir is not None and config.resume_from.resolve().parent != config.out_dir.resolve():
            raise UsageError(f"--resume-from {config.resume_from}: is not a checkpoint of --out-dir {config.out_dir}")
        if not config.resume_from.is_dir():
            raise NotFoundError(f"--resume-from {config.resume_from}: no such checkpoint")
        return True
    if config.resume:
        if config.out_dir is None or not config.out_dir.is_dir():
            raise NotFoundError(f"--resume: no run folder {config.out_dir}; --auto-resume starts one")
        return True
    return config.auto_resume and config.out_dir is not None and bool(checkpoints.step_folders(config.out_dir))


def _find_checkpoint(config: PretrainConfig) -> tuple[checkpoints.Checkpoint, list[str]]:
    if config.resume_from is not None:
        checkpoints.step_of(config.resume_from)
        return checkpoints.open_checkpoint(config.resume_from), []
    assert config.out_dir is not None
    found, warnings = checkpoints.newest_good(config.out_dir)
    if found is None:
        raise NotFoundError(f"--resume: {config.out_dir} holds no checkpoint; --auto-resume starts afresh in such a case")
    return found, warnings


def _open_subject(config: PretrainConfig) -> _Subject:
    assert config.data is not None
    dataset = TokenDataset.open(config.data, split="train")
    _check_hashes(dataset)
    tokenizer = dataset.tokenizer()
    source = PretrainSource(dataset, config.seq_len, config.seed)
    if source.samples_per_epoch < config.batch_size:
        raise InputError(
            f"{config.data}: {dataset.num_tokens:,} tokens make {source.samples_per_epoch} sequences of {config.seq_len},"
            f" fewer than --batch-size {config.batch_size}; give more data, or a smaller --seq-len or --batch-size"
        )
    base: Path | None = None
    generation: dict[str, Any] = {}
    if config.model is not None:
        base = resolve_model(config.model)
        if base.suffix == ".gguf":
            raise UsageError(f"--model {config.model}: go on from a model directory; a GGUF file has lost precision")
        architecture, record, _ = load_config(base)
        family = record.name
    elif config.model_config is not None:
        architecture, record, _ = load_config(config.model_config)
        family = record.name
    else:
        family = config.family
        architecture = shape_for_depth(config.depth or 4, tokenizer.vocab_size, config.seq_len, family)
    check_tokenizer(tokenizer, architecture, where=config.data)
    if config.seq_len > architecture.max_positions and architecture.positions == "learned":
        raise UsageError(f"--seq-len {config.seq_len}: the model has {architecture.max_positions} positions")
    held_out = _open_held_out(config, dataset)
    return _Subject(dataset, source, tokenizer, architecture, family, base, generation, held_out)


def _check_hashes(dataset: TokenDataset) -> None:
    """Compare the folder's files with its manifest, where that takes seconds; sizes are checked in any case."""
    if sum(path.stat().st_size for path in dataset.directory.iterdir()) <= _HASHED_BYTES:
        check_manifest(dataset.directory, hashes=True)


def _open_held_out(config: PretrainConfig, dataset: TokenDataset) -> TokenDataset | None:
    if config.val_data is not None:
        for split in _SPLITS:
            try:
                held_out = TokenDataset.open(config.val_data, split=split)
                break
            except NotFoundError:
                if split == "train":
                    raise
        if held_out.tokenizer_fingerprint != dataset.tokenizer_fingerprint:
            raise InputError(f"--val-data {config.val_data}: was made with another tokenizer than --data")
        return held_out
    assert config.data is not None
    try:
        return TokenDataset.open(config.data, split="val")
    except NotFoundError:
        return None


def _choose_machine(config: PretrainConfig, checkpoint: checkpoints.Checkpoint | None) -> _Machine:
    machine.prepare(threads=config.threads)
    device = machine.choose_device(config.device)
    wanted = config.dtype
    if wanted == "auto" and checkpoint is not None:
        wanted = checkpoint.state.settings.get("dtype", "auto")
    dtype = machine.choose_dtype(wanted, device)
    return _Machine(device, dtype, _micro_batch_size(config), machine.matmul_peak(dtype, device), torch.get_num_threads())


def _micro_batch_size(config: PretrainConfig) -> int:
    if config.micro_batch_size is not None:
        return config.micro_batch_size
    most = max(1, _MICRO_BATCH_TOKENS // config.seq_len)
    return max(size for size in range(1, config.batch_size + 1) if config.batch_size % size == 0 and size <= most)


def _num_steps(
    config: PretrainConfig, subject: _Subject, choice: _Machine, checkpoint: checkpoints.Checkpoint | None, trainer: Trainer | None
) -> int:
    """The budget in steps; a resumed run keeps its own, unless the budget itself was changed."""
    if checkpoint is not None and all(checkpoint.state.settings.get(k) == getattr(config, k) for k in _BUDGET):
        return checkpoint.state.num_steps
    batch_tokens = config.batch_size * config.seq_len
    if config.max_steps is not None:
        return config.max_steps
    if config.max_tokens is not None:
        return math.ceil(config.max_tokens / batch_tokens)
    if config.max_time is not None:
        if trainer is not None:
            step_s = trainer.time_steps()
        else:
            step_s = batch_tokens * flops_per_token(subject.architecture, config.seq_len) / (choice.matmul_peak * _EXPECTED_PEAK_SHARE)
        return max(1, int(seconds(config.max_time, flag="--max-time") / step_s))
    return max(1, math.ceil((config.epochs or 1.0) * subject.source.samples_per_epoch / config.batch_size))


def _warmup_steps(config: PretrainConfig, num_steps: int) -> int:
    return config.warmup_steps if config.warmup_steps is not None else min(200, num_steps // 50)


def _intervals(config: PretrainConfig, num_steps: int) -> tuple[int, int, int]:
    """Steps between evaluations, checkpoints and samples."""
    tenth = max(1, num_steps // 10)
    eval_every = config.eval_every if config.eval_every is not None else tenth
    save_every = config.save_every if config.save_every is not None else min(1000, tenth)
    return eval_every, save_every, config.sample_every if config.sample_every is not None else eval_every


def _plan(config: PretrainConfig, subject: _Subject, choice: _Machine, num_steps: int, *, step_s: float | None = None) -> Planned:
    architecture = subject.architecture
    count = num_parameters(architecture).total
    batch_tokens = config.batch_size * config.seq_len
    flops = flops_per_token(architecture, config.seq_len)
    muon_share = _hidden_numbers(architecture) / count if config.optimizer == "muon" else 0.0
    memory = training_memory(
        architecture,
        tokens_per_micro_batch=choice.micro_batch_size * config.seq_len,
        compute_bytes=choice.dtype.itemsize,
        moments=2.0 - muon_share,
    )
    total_flops = flops * batch_tokens * num_steps
    eval_every, save_every, sample_every = _intervals(config, num_steps)
    return Planned(
        num_parameters=count,
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        vocab_size=architecture.vocab_size,
        family=subject.family,
        data_tokens=subject.dataset.num_tokens,
        num_steps=num_steps,
        batch_tokens=batch_tokens,
        num_tokens=batch_tokens * num_steps,
        epochs=config.batch_size * num_steps / subject.source.samples_per_epoch,
        flops_per_token=flops,
        total_flops=total_flops,
        memory_bytes=memory.total_bytes,
        checkpoint_bytes=int(count * 4 * (3.0 - muon_share)),
        matmul_peak_flops=choice.matmul_peak,
        estimated_s=step_s * num_steps if step_s is not None else total_flops / (choice.matmul_peak * _EXPECTED_PEAK_SHARE),
        seq_len=config.seq_len,
        batch_size=config.batch_size,
        micro_batch_size=choice.micro_batch_size,
        warmup_steps=_warmup_steps(config, num_steps),
        eval_every=eval_every,
        save_every=save_every,
        sample_every=sample_every,
        dtype=machine.dtype_name(choice.dtype),
        device=str(choice.device),
        threads=choice.threads,
        seed=config.seed,
        run_dir=str(config.out_dir),
    )


def _hidden_numbers(architecture: ModelConfig) -> int:
    return sum(math.prod(shape) for name, shape in tensor_shapes(architecture).items() if _is_hidden_matrix(name, len(shape)))


def _is_hidden_matrix(name: str, num_dimensions: int) -> bool:
    return name.startswith("layers.") and num_dimensions == 2


def _run(
    config: PretrainConfig,
    subject: _Subject,
    choice: _Machine,
    run: RunFolder,
    checkpoint: checkpoints.Checkpoint | None,
    stop: Stop,
    save_requested: Callable[[], bool],
) -> Iterator[Event]:
    job = _make_job(config, subject, choice, run, checkpoint)
    if checkpoint is not None:
        for text in checkpoints.compare(
            checkpoint.state, settings=job.settings, identity=job.identity, allowed=config.allow_change, threads=choice.threads
        ):
            yield Warned(message=text)
    run.store_config(to_toml(config, leave_out=RESUME_ONLY))
    trainer = Trainer(job)
    num_steps = _num_steps(config, subject, choice, checkpoint, trainer)
    if checkpoint is not None and num_steps < checkpoint.state.step:
        raise UsageError(f"the budget is {num_steps} steps, but the run has already done {checkpoint.state.step}; raise it")
    plan = _plan(config, subject, choice, num_steps)
    warmup_steps = plan.warmup_steps
    if checkpoint is not None and config.warmup_steps == checkpoint.state.settings.get("warmup_steps"):
        warmup_steps = checkpoint.state.warmup_steps
    job.schedule = dataclasses.replace(job.schedule, num_steps=num_steps, warmup_steps=warmup_steps)
    job.loop = dataclasses.replace(job.loop, eval_every=plan.eval_every, save_every=plan.save_every, sample_every=plan.sample_every)
    yield plan
    free = shutil.disk_usage(run.path).free
    if free < 2 * trainer.checkpoint_bytes:
        yield Warned(
            message=f"{run.path}: {free:,} bytes are free, two checkpoints need {2 * trainer.checkpoint_bytes:,};"
            " a save may fail for lack of room"
        )
    yield from trainer.events(stop, save_requested)


def _make_job(
    config: PretrainConfig, subject: _Subject, choice: _Machine, run: RunFolder, checkpoint: checkpoints.Checkpoint | None
) -> TrainJob:
    architecture = subject.architecture
    settings = {name: getattr(config, name) for name in SHAPING}
    settings |= {"dtype": machine.dtype_name(choice.dtype), "micro_batch_size": choice.micro_batch_size}
    base = os.path.abspath(subject.base) if subject.base is not None else None
    identity = {
        "data": subject.source.data_hash,
        "tokenizer": subject.tokenizer.fingerprint,
        "model": json.loads(json.dumps(dataclasses.asdict(architecture))),
        "base_model": base,
    }
    generation = dict(subject.generation)
    torch.manual_seed(config.seed)

    def write_model(folder: Path, tensors: Mapping[str, Tensor]) -> None:
        save_model(
            folder,
            config=architecture,
            family=subject.family,
            tensors=tensors,
            dtype=torch.float32,
            tokenizer=subject.tokenizer,
            generation=generation,
        )

    def read_model(folder: Path) -> Mapping[str, Tensor]:
        return load_model(folder, dtype=torch.float32).model.state_dict()

    model = _weights(config, subject, checkpoint).to(choice.device)
    model.train()
    return TrainJob(
        run=run,
        model=model,
        source=subject.source,
        objective=NextToken(),
        optim=OptimConfig(
            kind=cast(Literal["muon", "adamw"], config.optimizer),
            learning_rate=config.learning_rate,
            muon_learning_rate=config.muon_learning_rate,
            weight_decay=config.weight_decay,
            beta1=config.beta1,
            beta2=config.beta2,
            muon_momentum=config.muon_momentum,
            clip=config.clip or None,
        ),
        schedule=Schedule(
            num_steps=1,
            kind=cast(Literal["cosine", "linear", "wsd"], config.schedule),
            decay_fraction=config.decay_fraction,
            final_fraction=config.final_lr_fraction,
        ),
        loop=LoopConfig(
            batch_size=config.batch_size,
            micro_batch_size=choice.micro_batch_size,
            log_every=config.log_every,
            eval_tokens=config.eval_tokens or LoopConfig.eval_tokens,
            final_eval_tokens=config.eval_tokens or LoopConfig.final_eval_tokens,
            keep_last=config.keep_last,
            nonfinite_skips=skips_allowed(config.nonfinite),
            on_full=cast(Literal["fail", "wait"], config.on_full),
        ),
        compute_dtype=choice.dtype,
        device=choice.device,
        write_model=write_model,
        read_model=read_model,
        settings=settings,
        identity=identity,
        resume_command=f"llmctl pretrain --out-dir {shlex.quote(str(config.out_dir))} --resume",
        hidden_matrices=tuple(n for n, p in model.named_parameters() if _is_hidden_matrix(n, p.ndim)),
        held_out=_held_out(config, subject, choice),
        sample=sampler(
            subject.tokenizer,
            prompt=config.sample_prompt,
            max_new_tokens=config.sample_tokens,
            seed=config.seed,
            documents=subject.dataset.num_documents >= _MANY_DOCUMENTS,
        ),
        resume=checkpoint,
        allow_change=config.allow_change,
        flops_per_token=flops_per_token(architecture, config.seq_len),
        matmul_peak=choice.matmul_peak,
        threads=choice.threads,
    )


def _weights(config: PretrainConfig, subject: _Subject, checkpoint: checkpoints.Checkpoint | None) -> Decoder:
    """The decoder in float32: at random from the seed, or from --model. A resumed run's weights come later, from its masters."""
    if subject.base is not None and checkpoint is None:
        return load_model(subject.base, dtype=torch.float32).model
    model = Decoder(subject.architecture)
    # Drawn on the CPU whatever the device, so that a seed means the same weights everywhere.
    model.init_weights(torch.Generator().manual_seed(config.seed))
    return model


def _held_out(config: PretrainConfig, subject: _Subject, choice: _Machine) -> HeldOut | None:
    if subject.held_out is None:
        return None
    token_bytes = torch.from_numpy(subject.tokenizer.token_bytes()).long()
    return HeldOut(EvalSource(subject.held_out, config.seq_len), choice.micro_batch_size, token_bytes)
