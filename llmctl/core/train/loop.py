"""The one training loop: steps, evaluations, samples and checkpoints, as a stream of events. Knows no command.

Pre-training and fine-tuning hand it a TrainJob; what differs between them is the source of samples, the objective and
how a model directory is written and read.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor

from llmctl.core.data.loader import Batch, prefetch
from llmctl.core.errors import Interrupted, LlmctlError, NonFiniteError, WriteError
from llmctl.core.train import state as checkpoints
from llmctl.core.train.evaluation import Stopped, evaluate
from llmctl.core.train.events import CheckpointSaved, EvalDone, Event, Finished, Resumed, SampleDrawn, StepDone, Warned
from llmctl.core.train.job import Stop, TrainJob
from llmctl.core.train.machine import synchronize
from llmctl.core.train.optim import MasterOptimizer
from llmctl.core.train.schedule import lr_scale

_FULL_DISK_PAUSE_S = 5.0
_POLL_S = 0.2
_SMALL_FILES_BYTES = 64 << 10
"""Configs and manifest of a checkpoint; its tokenizer may take more, and a disk as full as that is met when writing."""


@dataclass(frozen=True)
class _Taken:
    """A step whose loss and gradient norm may still be on their way from the device."""

    step: int
    loss: Tensor
    norm: Tensor
    scale: float
    num_tokens: int
    num_positions: int
    tokens_seen: int
    skipped: bool


class Trainer:
    """The state of a run between events. `events` is the loop.

    On a CPU each step's loss and gradient norm are looked at before its update. On an accelerator looking means waiting
    for it, so that is done once a log interval and before anything is saved or evaluated: a run that went wrong in
    between ends all the same without a trace in any file. Skipping steps (`nonfinite_skips`) needs a look at each.
    """

    def __init__(self, job: TrainJob) -> None:
        self.job = job
        self.optimizer = MasterOptimizer(
            job.model,
            job.optim,
            hidden_matrices=job.hidden_matrices,
            compute_dtype=job.compute_dtype,
            master_dtype=job.master_dtype,
        )
        self.step = 0
        self.tokens_seen = 0
        self.skipped_steps = 0
        self._elapsed_before_s = 0.0
        self._started = time.perf_counter()
        self._saved_step: int | None = None
        self._last_loss: float | None = None
        self._last_eval: EvalDone | None = None
        self._look_every = 1 if job.device.type == "cpu" or job.loop.nonfinite_skips else job.loop.log_every
        self._taken: list[_Taken] = []
        self._looked_at = self._started

    @property
    def checkpoint_bytes(self) -> int:
        """About what one checkpoint takes on disk."""
        tensors = [*self.optimizer.masters.values(), *self.optimizer.state_tensors().values()]
        trained = set(self.optimizer.masters)
        frozen = [p for n, p in self.job.model.named_parameters() if n not in trained]
        return sum(t.numel() * t.element_size() for t in tensors) + sum(4 * p.numel() for p in frozen) + _SMALL_FILES_BYTES

    @property
    def elapsed_s(self) -> float:
        """Seconds of training, those before a resume included."""
        return self._elapsed_before_s + time.perf_counter() - self._started

    def time_steps(self, count: int = 3) -> float:
        """Seconds a step takes, the least of `count` after one to warm up, with the state left as it was before.

        The steps are taken at a learning rate of 0 and the optimizer's state is cleared after them.
        """
        job = self.job
        best = math.inf
        for number in range(count + 1):
            with prefetch(job.source, first_index=0, num_rows=job.loop.batch_size, count=1) as batches:
                batch = next(batches)
            started = time.perf_counter()
            self._accumulate(batch, lambda: None)
            self.optimizer.clip()
            self.optimizer.step(lr_scale=0.0)
            synchronize(job.device)
            if number:
                best = min(best, time.perf_counter() - started)
        self.optimizer.forget()
        return best

    def events(self, stop: Stop, save_requested: Callable[[], bool]) -> Iterator[Event]:
        """Train to the end of the budget. Raises Interrupted, NonFiniteError, WriteError, InputError; state is kept in the folder."""
        job = self.job
        try:
            yield from self._resume()
            self._status("running")
            yield from self._train(stop, save_requested)
        except Interrupted as error:
            self._status("interrupted", str(error))
            raise
        except GeneratorExit:
            self._status("interrupted", "the program that reads the events went away")
            raise
        except KeyboardInterrupt:
            self._status("interrupted", "interrupted a second time, before its state was saved")
            raise
        except BaseException as error:
            self._status("failed", f"{type(error).__name__}: {error}")
            raise
        finally:
            job.run.metrics.close()

    def _status(self, name: Literal["running", "interrupted", "failed", "done"], message: str | None = None) -> None:
        try:
            self.job.run.set_status(name, step=self.step, num_steps=self.job.schedule.num_steps, message=message)
        except LlmctlError:
            if name == "running":
                raise  # a folder that cannot hold a status cannot hold a checkpoint either

    def _resume(self) -> Iterator[Event]:
        job = self.job
        if job.resume is None:
            job.run.metrics.truncate_after(-1)
            return
        saved = job.resume.state
        if distrust := job.run.distrust:
            yield Warned(message=distrust)
        optimizer = checkpoints.load_tensors(job.resume.path / "trainer" / "optimizer.safetensors")
        weights = job.read_model(job.resume.path)
        self.optimizer.load(
            weights={n: weights[n] for n in self.optimizer.masters if n in weights},
            state=optimizer,
            num_updates=saved.num_updates,
            where=str(job.resume.path),
        )
        checkpoints.restore_rng(job.resume.path)
        self.step, self.tokens_seen, self.skipped_steps = saved.step, saved.tokens_seen, saved.skipped_steps
        self._elapsed_before_s = saved.elapsed_s
        self._saved_step = saved.step
        job.run.metrics.truncate_after(saved.step)
        for place in checkpoints.set_aside_after(job.run.path, saved.step):
            yield Warned(message=f"a checkpoint beyond step {saved.step} is set aside as {place}; delete it when you do not need it")
        yield Resumed(step=saved.step, num_steps=job.schedule.num_steps, tokens_seen=saved.tokens_seen, path=str(job.resume.path))

    def _train(self, stop: Stop, save_requested: Callable[[], bool]) -> Iterator[Event]:
        job, loop, num_steps = self.job, self.job.loop, self.job.schedule.num_steps
        if job.resume is not None and _due(self.step, loop.eval_every) and self.step < num_steps and not self._logged("eval"):
            yield from self._evaluate(stop)  # the run was killed between saving and evaluating
        first = self.step * loop.batch_size
        with prefetch(job.source, first_index=first, num_rows=loop.batch_size, count=max(0, num_steps - self.step)) as batches:
            while self.step < num_steps:
                yield from self._stop_if_asked(stop)
                if not self._one_step(batches, stop):
                    continue  # a signal came in the middle of the step, which is as if it had not begun
                last = self.step == num_steps
                save = save_requested() or (_due(self.step, loop.save_every) and not last)
                judge = _due(self.step, loop.eval_every) and not last
                sample = _due(self.step, loop.sample_every) and not last
                if save or judge or sample or last or self.step % self._look_every == 0:
                    yield from self._look()
                if save:
                    yield from self._save(stop)
                if judge:
                    yield from self._evaluate(stop)
                if sample:
                    yield from self._sample()
        if self._saved_step != self.step:
            yield from self._save(stop)
        yield from self._evaluate(stop, final=True)
        if loop.sample_every:
            yield from self._sample()
        self._status("done")
        yield Finished(
            step=self.step,
            tokens_seen=self.tokens_seen,
            loss=self._last_loss,
            val_loss=self._last_eval.loss if self._last_eval else None,
            val_bits_per_byte=self._last_eval.bits_per_byte if self._last_eval else None,
            skipped_steps=self.skipped_steps,
            elapsed_s=self.elapsed_s,
            path=str(checkpoints.step_folder(job.run.path, self.step)),
        )

    def _stop_if_asked(self, stop: Stop) -> Iterator[Event]:
        number = stop()
        if number is None:
            return
        yield from self._look()
        if self._saved_step != self.step:
            yield from self._save(stop)
        raise Interrupted(f"stopped at step {self.step}, which is saved; go on with: {self.job.resume_command}", signal_number=number)

    def _one_step(self, batches: Iterator[Batch], stop: Stop) -> bool:
        """Take a step; False when a signal came before its update."""
        job = self.job
        if not self._taken:
            self._looked_at = time.perf_counter()
        batch = next(batches)
        accumulated = self._accumulate(batch, stop)
        if accumulated is None:
            return False
        loss, num_tokens = accumulated
        norm = self.optimizer.clip()
        scale = lr_scale(self.step, job.schedule)
        skipped = self._look_every == 1 and not (math.isfinite(float(loss)) and math.isfinite(float(norm)))
        if skipped:
            self._allow_skip(float(loss), float(norm))
        else:
            self.optimizer.step(lr_scale=scale)
        self.step += 1
        self.tokens_seen += batch.tokens.numel()
        self._taken.append(_Taken(self.step, loss, norm, scale, num_tokens, batch.tokens.numel(), self.tokens_seen, skipped))
        return True

    def _look(self) -> Iterator[Event]:
        """Wait for the steps taken since the last look; log and yield them. Raises NonFiniteError at the first bad one."""
        if not self._taken:
            return
        taken, self._taken = self._taken, []
        losses = torch.stack([t.loss for t in taken]).tolist()
        norms = torch.stack([t.norm for t in taken]).tolist()
        step_s = (time.perf_counter() - self._looked_at) / len(taken)
        for one, loss, norm in zip(taken, losses, norms, strict=True):
            if not one.skipped and not (math.isfinite(loss) and math.isfinite(norm)):
                self.step = one.step - 1
                raise self._not_finite(loss, norm)
            self._last_loss = loss
            yield self._step_done(one, loss, norm, step_s)
        if trouble := self.job.run.metrics.take_trouble():
            yield Warned(message=trouble)

    def _step_done(self, one: _Taken, loss: float, norm: float, step_s: float) -> StepDone:
        """The event of a step, which is logged too."""
        job = self.job
        speed = one.num_positions / step_s
        done = StepDone(
            step=one.step,
            loss=loss,
            learning_rate=job.optim.learning_rate * one.scale,
            grad_norm=norm,
            num_tokens=one.num_tokens,
            tokens_seen=one.tokens_seen,
            first_sample=(one.step - 1) * job.loop.batch_size,
            num_samples=job.loop.batch_size,
            skipped=one.skipped,
            step_s=step_s,
            tokens_per_second=speed,
            peak_share=speed * job.flops_per_token / job.matmul_peak,
            elapsed_s=self.elapsed_s,
            eta_s=(job.schedule.num_steps - one.step) * self.elapsed_s / one.step,
        )
        job.run.metrics.append({"kind": "step", **{k: v for k, v in asdict(done).items() if k != "eta_s"}})
        return done

    def _accumulate(self, batch: Batch, stop: Stop) -> tuple[Tensor, int] | None:
        """Gradients of the mean loss over the batch, micro-batch after micro-batch; None when a signal came in between.

        Each token's loss is divided by the count of the whole batch, so the split changes the result by rounding only.
        """
        job, size = self.job, self.job.loop.micro_batch_size
        rows = batch.tokens.size(0)
        parts = [_rows_of(batch, start, min(rows, start + size), job.device) for start in range(0, rows, size)]
        total_weight = sum(job.objective.weight_of(part) for part in parts)
        self.optimizer.zero_gradients()
        loss: Tensor | None = None
        for part in parts:
            if stop() is not None:
                return None
            part_loss = job.objective.loss(job.model, part, total_weight=max(1.0, total_weight))
            part_loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.collect()
            loss = part_loss.detach() if loss is None else loss + part_loss.detach()
        assert loss is not None
        return loss, int(total_weight)

    def _allow_skip(self, loss: float, norm: float) -> None:
        if self.skipped_steps >= self.job.loop.nonfinite_skips:
            raise self._not_finite(loss, norm)
        self.skipped_steps += 1

    def _not_finite(self, loss: float, norm: float) -> NonFiniteError:
        """The error of step `self.step + 1`."""
        what = f"loss {loss}" if not math.isfinite(loss) else f"gradient norm {norm}"
        kept = f"the last checkpoint is step {self._saved_step}" if self._saved_step is not None else "no checkpoint was saved yet"
        spent = f" after {self.skipped_steps} skipped steps" if self.skipped_steps else ""
        return NonFiniteError(
            f"step {self.step + 1}: {what} is not finite{spent}; the last good step is {self.step}, {kept};"
            " lower --learning-rate, look at the data, or allow some by --nonfinite skip:K"
        )

    def _save(self, stop: Stop) -> Iterator[Event]:
        job, started = self.job, time.perf_counter()
        job.run.metrics.sync()
        state = checkpoints.TrainerState(
            step=self.step,
            num_steps=job.schedule.num_steps,
            warmup_steps=job.schedule.warmup_steps,
            num_updates=self.optimizer.num_updates,
            tokens_seen=self.tokens_seen,
            skipped_steps=self.skipped_steps,
            elapsed_s=self.elapsed_s,
            settings=job.settings,
            identity=job.identity,
            threads=job.threads,
            machine=checkpoints.machine(),
        )
        tensors = {**job.model.state_dict(), **self.optimizer.masters}
        while True:
            try:
                path, num_bytes = checkpoints.save_checkpoint(
                    job.run.path,
                    state,
                    write_model=lambda folder: job.write_model(folder, tensors),
                    optimizer=self.optimizer.state_tensors(),
                    expected_bytes=self.checkpoint_bytes,
                )
                break
            except WriteError as error:
                if job.loop.on_full != "wait" or stop() is not None:
                    raise
                yield Warned(message=f"{error}; waiting for room")
                _wait(_FULL_DISK_PAUSE_S, stop)
        self._saved_step = self.step
        checkpoints.prune(job.run.path, keep_last=job.loop.keep_last)
        self._status("running")
        yield CheckpointSaved(step=self.step, path=str(path), num_bytes=num_bytes, elapsed_s=time.perf_counter() - started)

    def _evaluate(self, stop: Stop, *, final: bool = False) -> Iterator[Event]:
        job = self.job
        if job.held_out is None:
            return
        max_tokens = job.loop.final_eval_tokens if final else job.loop.eval_tokens
        try:
            result = evaluate(job.model, job.held_out, max_tokens=max_tokens, stop=stop)
        except Stopped:
            yield from self._stop_if_asked(stop)
            return
        done = EvalDone(
            step=self.step,
            loss=result.loss,
            bits_per_byte=result.bits_per_byte,
            num_tokens=result.num_tokens,
            num_bytes=result.num_bytes,
            elapsed_s=result.elapsed_s,
        )
        self._last_eval = done
        job.run.metrics.append({"kind": "eval", **asdict(done)})
        yield done

    def _sample(self) -> Iterator[Event]:
        job = self.job
        if job.sample is None:
            return
        try:
            prompt, text = job.sample(job.model, self.step)
        except LlmctlError as error:
            yield Warned(message=f"no sample text: {error}")
            return
        done = SampleDrawn(step=self.step, prompt=prompt, text=text)
        job.run.metrics.append({"kind": "sample", **asdict(done)})
        yield done

    def _logged(self, kind: str) -> bool:
        return any(line.get("kind") == kind and line["step"] == self.step for line in self.job.run.metrics.lines())


def _due(step: int, every: int) -> bool:
    return every > 0 and step > 0 and step % every == 0


def _rows_of(batch: Batch, start: int, end: int, device: torch.device) -> Batch:
    lengths = batch.document_lengths[start:end] if batch.document_lengths is not None else None
    return Batch(batch.tokens[start:end].to(device), batch.targets[start:end].to(device), lengths)


def _wait(seconds: float, stop: Stop) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and stop() is None:
        time.sleep(_POLL_S)
