"""The one training loop: steps, evaluations, samples and checkpoints, as a stream of events. Knows no command.

Pre-training and fine-tuning hand it a TrainJob; what differs between them is the source of samples, the objective and
how a model directory is written and read.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from llmctl.core.data.loader import Batch, Prefetcher, prefetch
from llmctl.core.errors import Interrupted, LlmctlError, LostRankError, NonFiniteError
from llmctl.core.train import state as checkpoints
from llmctl.core.train.background import Background
from llmctl.core.train.evaluation import HeldOutLoss, Stopped, evaluate
from llmctl.core.train.events import EvalDone, Event, Finished, Profiled, Resumed, SampleDrawn, StepDone, Warned
from llmctl.core.train.gradients import Gradients
from llmctl.core.train.job import Stop, TrainJob
from llmctl.core.train.machine import synchronize
from llmctl.core.train.parallel import set_up
from llmctl.core.train.profile import Profile
from llmctl.core.train.saving import finish_saving, restore, save, write_scores
from llmctl.core.train.schedule import lr_scale
from llmctl.core.train.spikes import Spikes

_MOST_REWINDS = 3
"""So often a run goes back to one checkpoint; data is not at fault after that."""


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
        self.optimizer, parallel = set_up(job)
        self._ranks = job.ranks
        self._own_rows = job.loop.batch_size // job.ranks.data_size
        self.profile = Profile(job.device, on=job.loop.profile and job.ranks.is_main)
        self.gradients = Gradients(
            parallel,
            job.objective,
            self.optimizer,
            ranks=job.ranks,
            device=job.device,
            micro_batch_size=job.loop.micro_batch_size,
            profile=self.profile,
        )
        self.step = 0
        self.tokens_seen = 0
        self.skipped_steps = 0
        self.skipped_samples = 0
        self.spikes = Spikes()
        self._spike: str | None = None
        self._rewinds = 0
        self._rewound_to: int | None = None
        self._elapsed_before_s = 0.0
        self._started = time.perf_counter()
        self.saved_step: int | None = None
        self.background = Background()
        self.apart = job.ranks.apart() if job.mesh.shards else job.ranks
        """The ranks as the thread knows them that writes checkpoints."""
        self._last_loss: float | None = None
        self.last_eval: EvalDone | None = None
        self._look_every = 1 if job.device.type == "cpu" or job.loop.nonfinite_skips else job.loop.log_every
        self._taken: list[_Taken] = []
        self._looked_at = self._started

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
            with self._batches(0, count=1) as batches:
                batch = next(batches)
            started = time.perf_counter()
            self.gradients.of(batch, lambda: None)
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
        stop = self._ranks.agreed(stop)
        try:
            yield from self._resume()
            self.status("running")
            yield from self._train(stop, save_requested)
        except Interrupted as error:
            self.status("interrupted", str(error))
            raise
        except GeneratorExit:
            self.status("interrupted", "the program that reads the events went away")
            raise
        except KeyboardInterrupt:
            self.status("interrupted", "interrupted a second time, before its state was saved")
            raise
        except BaseException as error:
            self.status("failed", f"{type(error).__name__}: {error}")
            raise
        finally:
            with contextlib.suppress(LostRankError):  # of a job that has ended for that reason already
                self.background.wait(self._ranks.join)
            self._write_profile()
            job.run.metrics.close()

    def status(self, name: Literal["running", "interrupted", "failed", "done"], message: str | None = None) -> None:
        try:
            self.job.run.set_status(
                name,
                step=self.step,
                num_steps=self.job.schedule.num_steps,
                message=message,
                resume=None if name == "done" else self.job.resume_command,
            )
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
        restore(self, job.resume)
        self._elapsed_before_s = saved.elapsed_s
        for place in self._ranks.on_main(lambda: [str(p) for p in checkpoints.set_aside_after(job.run.path, saved.step)]):
            yield Warned(message=f"a checkpoint beyond step {saved.step} is set aside as {place}; delete it when you do not need it")
        yield Resumed(step=saved.step, num_steps=job.schedule.num_steps, tokens_seen=saved.tokens_seen, path=str(job.resume.path))

    def _train(self, stop: Stop, save_requested: Callable[[], bool]) -> Iterator[Event]:
        job, loop, num_steps = self.job, self.job.loop, self.job.schedule.num_steps
        if job.resume is not None and _due(self.step, loop.eval_every) and self.step < num_steps and not self._logged("eval"):
            yield from self._evaluate(stop)  # the run was killed between saving and evaluating
        was_done = job.resume is not None and self.step >= num_steps  # what comes after the last step may be there already
        while self.step < num_steps:
            first = self.step * loop.batch_size + self.skipped_samples
            with self._batches(first, count=num_steps - self.step) as batches:
                yield from self._steps(batches, stop, save_requested)
            if self._spike is not None:
                yield from self._rewind(self._spike)
        yield from finish_saving(self)
        if self.saved_step != self.step:
            yield from self._save(stop)
        if was_done and (evaluated := self._evaluated()) is not None:
            self.last_eval = evaluated
        else:
            yield from self._evaluate(stop, final=True)
        if loop.sample_every and not (was_done and self._logged("sample")):
            yield from self._sample()
        self.status("done")
        if profiled := self._write_profile():
            yield profiled
        yield Finished(
            step=self.step,
            tokens_seen=self.tokens_seen,
            loss=self._last_loss,
            val_loss=self.last_eval.loss if self.last_eval else None,
            val_bits_per_byte=self.last_eval.bits_per_byte if self.last_eval else None,
            skipped_steps=self.skipped_steps,
            elapsed_s=self.elapsed_s,
            path=str(checkpoints.step_folder(job.run.path, self.step)),
        )

    def _batches(self, first_sample: int, *, count: int) -> Prefetcher:
        """This rank's rows of `count` batches, the first of which begins with `first_sample`."""
        size = self.job.loop.batch_size
        first = first_sample + self._ranks.data_rank * self._own_rows
        return prefetch(self.job.source, first_index=first, num_rows=self._own_rows, stride=size, count=count)

    def _steps(self, batches: Iterator[Batch], stop: Stop, save_requested: Callable[[], bool]) -> Iterator[Event]:
        """Steps to the end of the budget, or to a spike to go back from."""
        loop, num_steps = self.job.loop, self.job.schedule.num_steps
        while self.step < num_steps and self._spike is None:
            yield from self._stop_if_asked(stop)
            with self.profile.step(loop.batch_size * self.job.source.seq_len):
                if not self._one_step(batches, stop):
                    continue  # a signal came in the middle of the step, which is as if it had not begun
                last = self.step == num_steps
                save = self._ranks.greatest(save_requested()) > 0 or (_due(self.step, loop.save_every) and not last)
                judge = _due(self.step, loop.eval_every) and not last
                sample = _due(self.step, loop.sample_every) and not last
                if save or judge or sample or last or self.step % self._look_every == 0:
                    with self.profile.phase("logging"):
                        yield from self._look()
            if self._spike is not None:
                return
            if save:
                yield from self._save(stop, behind=loop.async_save)
            if judge:
                yield from self._evaluate(stop)
            if sample:
                yield from self._sample()

    def _rewind(self, spike: str) -> Iterator[Event]:
        """Back to the last checkpoint, past the data that led to the spike. Raises NonFiniteError when that keeps happening."""
        job, num_taken = self.job, self.step
        yield from finish_saving(self)
        found = self._newest_good()
        self._rewinds = 1 if found is not None and self._rewound_to != found.state.step else self._rewinds + 1
        if found is None or self._rewinds > _MOST_REWINDS:
            why = "there is no checkpoint to go back to" if found is None else f"the run has gone back {_MOST_REWINDS} times from there"
            raise NonFiniteError(f"{spike}, and {why}; lower --learning-rate, or let it pass with --on-spike ignore")
        skipped = self.skipped_samples + (num_taken - found.state.step) * job.loop.batch_size
        restore(self, found)
        self.skipped_samples, self._spike, self._rewound_to = skipped, None, found.state.step
        yield Warned(message=f"{spike}; back to step {self.step}, and on without the data of the steps up to {num_taken}")

    def _newest_good(self) -> checkpoints.Checkpoint | None:
        """The checkpoint that rank 0 finds."""

        def path() -> str | None:
            found, _ = checkpoints.newest_good(self.job.run.path)
            return None if found is None else str(found.path)

        chosen = self._ranks.on_main(path)
        return None if chosen is None else checkpoints.open_checkpoint(Path(chosen), hashes=False)

    def _stop_if_asked(self, stop: Stop) -> Iterator[Event]:
        number = stop()
        if number is None:
            return
        yield from self._look()
        yield from finish_saving(self)
        if self.saved_step != self.step:
            yield from self._save(stop)
        raise Interrupted(f"stopped at step {self.step}, which is saved; go on with: {self.job.resume_command}", signal_number=number)

    def _one_step(self, batches: Iterator[Batch], stop: Stop) -> bool:
        """Take a step; False when a signal came before its update."""
        job = self.job
        if not self._taken:
            self._looked_at = time.perf_counter()
        with self.profile.phase("data"):
            batch = next(batches)
        made = self.gradients.of(batch, stop)
        if made is None:
            return False
        loss, num_tokens = made
        with self.profile.phase("optimizer"):
            norm = self.optimizer.clip()
            scale = lr_scale(self.step, job.schedule)
            skipped = self._look_every == 1 and not (math.isfinite(float(loss)) and math.isfinite(float(norm)))
            if skipped:
                self._allow_skip(float(loss), float(norm))
            else:
                self.optimizer.step(lr_scale=scale)
        self.step += 1
        num_positions = batch.tokens.numel() * self._ranks.data_size
        self.tokens_seen += num_positions
        self._taken.append(_Taken(self.step, loss, norm, scale, num_tokens, num_positions, self.tokens_seen, skipped))
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
            if self.job.loop.on_spike == "rewind" and not one.skipped:
                limit = self.spikes.limit()
                if self.spikes.is_one(loss):
                    self._spike = f"step {one.step}: loss {loss:.4f} is a spike, the last ones make at most {limit:.4f} usual"
                    break
        for notice in (self.job.run.metrics.take_trouble(), self.gradients.take_notice()):
            if notice:
                yield Warned(message=notice)

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
            first_sample=(one.step - 1) * job.loop.batch_size + self.skipped_samples,
            num_samples=job.loop.batch_size,
            skipped=one.skipped,
            step_s=step_s,
            tokens_per_second=speed,
            peak_share=speed * job.flops_per_token / (job.matmul_peak * self._ranks.size),
            elapsed_s=self.elapsed_s,
            eta_s=(job.schedule.num_steps - one.step) * self.elapsed_s / one.step,
        )
        job.run.metrics.append({"kind": "step", **{k: v for k, v in asdict(done).items() if k != "eta_s"}})
        return done

    def _allow_skip(self, loss: float, norm: float) -> None:
        if self.skipped_steps >= self.job.loop.nonfinite_skips:
            raise self._not_finite(loss, norm)
        self.skipped_steps += 1

    def _not_finite(self, loss: float, norm: float) -> NonFiniteError:
        """The error of step `self.step + 1`."""
        what = f"loss {loss}" if not math.isfinite(loss) else f"gradient norm {norm}"
        kept = f"the last checkpoint is step {self.saved_step}" if self.saved_step is not None else "no checkpoint was saved yet"
        spent = f" after {self.skipped_steps} skipped steps" if self.skipped_steps else ""
        return NonFiniteError(
            f"step {self.step + 1}: {what} is not finite{spent}; the last good step is {self.step}, {kept};"
            " lower --learning-rate, look at the data, or allow some by --nonfinite skip:K"
        )

    def _save(self, stop: Stop, *, behind: bool = False) -> Iterator[Event]:
        with self.profile.phase("saving"):
            yield from save(self, stop, behind=behind)

    def _evaluate(self, stop: Stop, *, final: bool = False) -> Iterator[Event]:
        """Of the weights, and of their moving average where there is one."""
        job = self.job
        if job.held_out is None:
            return
        max_tokens = job.loop.final_eval_tokens if final else job.loop.eval_tokens
        averages: list[HeldOutLoss] = []
        try:
            with self.profile.phase("evaluation"):
                result = evaluate(job.model, job.held_out, max_tokens=max_tokens, stop=stop, ranks=self._ranks)
                if self.optimizer.averages:
                    with self.optimizer.averaged():
                        averages.append(evaluate(job.model, job.held_out, max_tokens=max_tokens, stop=stop, ranks=self._ranks))
        except Stopped:
            yield from self._stop_if_asked(stop)
            return
        self.last_eval = self._eval_done(result, averaged=False)
        done_ones = [self.last_eval, *(self._eval_done(average, averaged=True) for average in averages)]
        for done in done_ones:
            job.run.metrics.append({"kind": "eval", **asdict(done)})
            yield done
        yield from write_scores(self, done_ones)

    def _eval_done(self, result: HeldOutLoss, *, averaged: bool) -> EvalDone:
        return EvalDone(
            step=self.step,
            loss=result.loss,
            bits_per_byte=result.bits_per_byte,
            num_tokens=result.num_tokens,
            num_bytes=result.num_bytes,
            elapsed_s=result.elapsed_s,
            averaged=averaged,
        )

    def _sample(self) -> Iterator[Event]:
        job, sample = self.job, self.job.sample
        if sample is None or job.mesh.tp > 1:  # a rank that holds some of the heads has no cache for them
            return
        try:
            with self.profile.phase("sampling"):
                if job.mesh.shards:  # all take part, and the first one tells
                    prompt, text = sample(job.model, self.step)
                else:
                    prompt, text = self._ranks.on_main(lambda: sample(job.model, self.step))
        except LlmctlError as error:
            yield Warned(message=f"no sample text: {error}")
            return
        done = SampleDrawn(step=self.step, prompt=prompt, text=text)
        job.run.metrics.append({"kind": "sample", **asdict(done)})
        yield done

    def _write_profile(self) -> Profiled | None:
        job = self.job
        peak = job.matmul_peak * self._ranks.size
        return self.profile.write(job.run.path, flops_per_token=job.flops_per_token, matmul_peak=peak)

    def _evaluated(self) -> EvalDone | None:
        """The evaluation at this step that the metrics have, if any."""
        names = {field.name for field in fields(EvalDone)}
        for line in self.job.run.metrics.lines():
            if line.get("kind") == "eval" and line["step"] == self.step and not line.get("averaged") and names <= {*line, "averaged"}:
                return EvalDone(**{name: line[name] for name in names if name in line})
        return None

    def _logged(self, kind: str) -> bool:
        lines = self.job.run.metrics.lines
        return bool(self._ranks.on_main(lambda: any(line.get("kind") == kind and line["step"] == self.step for line in lines())))


def _due(step: int, every: int) -> bool:
    return every > 0 and step > 0 and step % every == 0
