"""A trainer's state to and from checkpoints. Knows the files of state.py through it; knows no step.

With a moving average of the weights, the checkpoint at the end of a run has it as a model directory of its own, `ema/`.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from llmctl.core.errors import LlmctlError, WriteError
from llmctl.core.train import outputs
from llmctl.core.train import state as checkpoints
from llmctl.core.train.events import CheckpointSaved, EvalDone, Event, Warned
from llmctl.core.train.job import Stop
from llmctl.core.train.sharded import ShardedOptimizer
from llmctl.core.train.spikes import Spikes
from llmctl.core.train.together import load_parts, load_whole, save_together

if TYPE_CHECKING:
    from llmctl.core.train.loop import Trainer

AVERAGE_NAME = "ema"
_FULL_DISK_POLLS = 25
_POLL_S = 0.2
_SMALL_FILES_BYTES = 64 << 10
"""Configs and manifest of a checkpoint; its tokenizer may take more, and a disk as full as that is met when writing."""


def checkpoint_bytes(trainer: "Trainer") -> int:
    """About what one checkpoint takes on disk."""
    optimizer = trainer.optimizer
    masters = optimizer.parameters if isinstance(optimizer, ShardedOptimizer) else optimizer.masters
    averages = [] if isinstance(optimizer, ShardedOptimizer) else optimizer.averages.values()
    tensors = [*masters.values(), *optimizer.state_tensors().values(), *averages]
    frozen = [p for n, p in trainer.job.model.named_parameters() if trainer.job.output.holds_frozen and n not in optimizer.masters]
    return sum(t.numel() * t.element_size() for t in tensors) + sum(4 * p.numel() for p in frozen) + _SMALL_FILES_BYTES


def finish_saving(trainer: "Trainer") -> Iterator[Event]:
    """Wait for the checkpoint that is being written behind the training, if there is one. Raises WriteError."""
    step, background = trainer.background.step, trainer.background
    if step is None:
        return
    background.step = None
    num_bytes = _result(trainer)
    path = checkpoints.step_folder(trainer.job.run.path, step)
    yield CheckpointSaved(step=step, path=str(path), num_bytes=num_bytes, elapsed_s=time.perf_counter() - background.started)


def _result(trainer: "Trainer") -> int:
    """Of what is being written: on all ranks where each writes its part, else on rank 0 for all."""
    ranks, background = trainer.job.ranks, trainer.background
    if isinstance(trainer.optimizer, ShardedOptimizer):
        return background.result(ranks.join)
    return int(ranks.on_main(background.result))


def save(trainer: "Trainer", stop: Stop, *, behind: bool = False) -> Iterator[Event]:
    """Write a checkpoint of the trainer's step; waits for room on a full disk if the run is told to. Raises WriteError.

    With `behind`, the state is copied and written while training goes on; `finish_saving` tells when it is there.
    """
    yield from finish_saving(trainer)
    job, started = trainer.job, time.perf_counter()
    job.run.metrics.sync()
    state = checkpoints.TrainerState(
        step=trainer.step,
        num_steps=job.schedule.num_steps,
        warmup_steps=job.schedule.warmup_steps,
        num_updates=trainer.optimizer.num_updates,
        tokens_seen=trainer.tokens_seen,
        skipped_steps=trainer.skipped_steps,
        skipped_samples=trainer.skipped_samples,
        recent_losses=tuple(trainer.spikes.recent),
        elapsed_s=trainer.elapsed_s,
        settings=job.settings,
        identity=job.identity,
        threads=job.threads,
        machine=checkpoints.machine(),
        ranks=job.ranks.size,
    )
    if behind:
        if isinstance(trainer.optimizer, ShardedOptimizer):
            trainer.background.begin(trainer.step, _parts_copied(trainer, trainer.optimizer, state))
        else:
            trainer.background.begin(trainer.step, _copied(trainer, state) if job.ranks.is_main else None)
        trainer.saved_step = trainer.step
        return
    while True:
        try:
            num_bytes = _write(trainer, state)
            break
        except WriteError as error:
            if job.loop.on_full != "wait" or stop() is not None:
                raise
            yield Warned(message=f"{error}; waiting for room")
            _wait(stop)
    trainer.saved_step = trainer.step
    trainer.status("running")
    path = checkpoints.step_folder(job.run.path, trainer.step)
    yield CheckpointSaved(step=trainer.step, path=str(path), num_bytes=num_bytes, elapsed_s=time.perf_counter() - started)


def _copied(trainer: "Trainer", state: checkpoints.TrainerState) -> Callable[[], int]:
    """Copy all that a checkpoint holds; gives the function that writes it."""
    job, optimizer, expected_bytes = trainer.job, trainer.optimizer, checkpoint_bytes(trainer)

    weights = _copies({**job.model.state_dict(), **optimizer.masters})
    moments, rng = _copies(optimizer.state_tensors()), _copies(checkpoints.rng_tensors())

    def write() -> int:
        _, num_bytes = checkpoints.save_checkpoint(
            job.run.path,
            state,
            write_model=lambda folder: job.output.write(folder, weights),
            optimizer=moments,
            expected_bytes=expected_bytes,
            rng=rng,
        )
        checkpoints.prune(job.run.path, keep_last=job.loop.keep_last)
        return num_bytes

    return write


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def _parts_copied(trainer: "Trainer", optimizer: ShardedOptimizer, state: checkpoints.TrainerState) -> Callable[[], int]:
    """Copy what this rank writes of a checkpoint that all write together; gives the function that writes it.

    The weights that go into its files are gathered here, by the groups of the steps. What a thread writes later asks nothing
    of those groups, and no rank that writes a large file keeps others waiting in the middle of a gathering.
    """
    job, expected_bytes, ranks = trainer.job, checkpoint_bytes(trainer), trainer.apart
    share = (job.ranks.rank, job.ranks.size)
    own = job.output.names_of(share)

    def gathered(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors on the CPU, of other ranks' files their shapes only."""
        whole = optimizer.whole(parts)
        return {name: tensor.detach().to("cpu" if name in own else "meta", copy=True) for name, tensor in whole.items()}

    weights = gathered(optimizer.masters)
    averages = gathered(optimizer.averages) if optimizer.averages and trainer.step == job.schedule.num_steps else None
    moments, rng = _copies(optimizer.state_tensors()), _copies(checkpoints.rng_tensors())

    def write_models(folder: Path) -> None:
        job.output.write(folder, weights, share)
        if averages is not None:
            (folder / AVERAGE_NAME).mkdir(exist_ok=True)
            job.output.write(folder / AVERAGE_NAME, averages, share)

    def write() -> int:
        num_bytes = save_together(
            job.run.path, state, write_model=write_models, optimizer=moments, rng=rng, expected_bytes=expected_bytes, ranks=ranks
        )
        ranks.on_main(lambda: checkpoints.prune(job.run.path, keep_last=job.loop.keep_last))
        return num_bytes

    return write


def _write(trainer: "Trainer", state: checkpoints.TrainerState) -> int:
    """Write a checkpoint and delete older ones; gives its size in bytes."""
    job, expected_bytes = trainer.job, checkpoint_bytes(trainer)
    if isinstance(trainer.optimizer, ShardedOptimizer):
        trainer.background.begin(trainer.step, _parts_copied(trainer, trainer.optimizer, state))
        trainer.background.step = None  # it is waited for at once; the thread is for hearing of a rank that is lost meanwhile
        return _result(trainer)
    optimizer = trainer.optimizer.state_tensors()
    num_bytes: int = job.ranks.on_main(
        lambda: checkpoints.save_checkpoint(
            job.run.path,
            state,
            write_model=lambda folder: _write_models(trainer, folder),
            optimizer=optimizer,
            expected_bytes=expected_bytes,
        )[1]
    )
    job.ranks.on_main(lambda: checkpoints.prune(job.run.path, keep_last=job.loop.keep_last))
    return num_bytes


def write_scores(trainer: "Trainer", evaluations: Sequence[EvalDone]) -> Iterator[Event]:
    """Tell the scores of the trainer's step in the cards of its checkpoint, if it has one."""
    yield from finish_saving(trainer)
    checkpoint = checkpoints.step_folder(trainer.job.run.path, trainer.step)
    if trainer.saved_step != trainer.step or not trainer.job.ranks.is_main:
        return
    try:
        for done in evaluations:
            folder = checkpoint / AVERAGE_NAME if done.averaged else checkpoint
            if folder.is_dir():
                outputs.write_scores(checkpoint, trainer.job.output, _scores(done), folder=folder)
    except LlmctlError as error:
        yield Warned(message=f"the model card has no scores: {error}")


def _scores(done: EvalDone) -> dict[str, float]:
    scores = {"held-out loss, nats a token": done.loss, "held-out tokens": float(done.num_tokens)}
    return scores if done.bits_per_byte is None else {"held-out bits per byte": done.bits_per_byte, **scores}


def _write_models(trainer: "Trainer", folder: Path) -> None:
    job, optimizer = trainer.job, trainer.optimizer
    weights = job.model.state_dict()
    job.output.write(folder, {**weights, **optimizer.masters})
    if optimizer.averages and trainer.step == job.schedule.num_steps:
        (folder / AVERAGE_NAME).mkdir()
        job.output.write(folder / AVERAGE_NAME, {**weights, **optimizer.averages})


def restore(trainer: "Trainer", checkpoint: checkpoints.Checkpoint) -> None:
    """Everything as it was when `checkpoint` was saved, the log included. Raises InputError for tensors that do not fit."""
    saved, optimizer = checkpoint.state, trainer.optimizer
    weights, where = trainer.job.output.read(checkpoint.path), str(checkpoint.path)
    if isinstance(optimizer, ShardedOptimizer):
        load_parts(checkpoint.path, optimizer.state_tensors(), trainer.job.ranks)
        optimizer.load_weights(weights, num_updates=saved.num_updates, where=where)
    else:
        optimizer.load(
            weights={n: weights[n] for n in optimizer.masters if n in weights},
            state=load_whole(checkpoint.path),
            num_updates=saved.num_updates,
            where=where,
        )
    checkpoints.restore_rng(checkpoint.path)
    trainer.step, trainer.tokens_seen, trainer.skipped_steps = saved.step, saved.tokens_seen, saved.skipped_steps
    trainer.skipped_samples, trainer.spikes = saved.skipped_samples, Spikes(saved.recent_losses)
    trainer.saved_step = saved.step
    trainer.job.run.metrics.truncate_after(saved.step)


def _wait(stop: Stop) -> None:
    """A pause that a signal ends; ranks agree on it as often as they ask, so they ask by count and not by clock."""
    for _ in range(_FULL_DISK_POLLS):
        if stop() is not None:
            return
        time.sleep(_POLL_S)
