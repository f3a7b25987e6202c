"""Draws the events of training: a live panel on a terminal, a line each log interval elsewhere, JSON lines with --json."""

import json
import math
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from llmctl.cli.shell import Shell
from llmctl.cli.streams import out
from llmctl.core.config.finetune import FinetuneConfig
from llmctl.core.config.pretrain import PretrainConfig
from llmctl.core.distributed import place_of
from llmctl.core.train.events import (
    CheckpointSaved,
    EvalDone,
    Event,
    Finished,
    Planned,
    PlannedElsewhere,
    Profiled,
    Resumed,
    RowsRead,
    SampleDrawn,
    StepDone,
    Warned,
)


def draw(events: Iterable[Event], shell: Shell, config: PretrainConfig | FinetuneConfig) -> None:
    """Drain `events`, showing each as `shell` wants it, and giving its numbers to the trackers of --log.

    Of several ranks, only the first shows and gives anything.
    """
    if not place_of(os.environ).is_main:
        for _ in events:
            pass
        return
    from llmctl.core.train.trackers import tracked

    view: View
    if shell.live and not config.dry_run:
        from llmctl.cli.training_panel import LivePanel

        view = LivePanel(shell)
    else:
        view = _LineView(shell, config.log_every)
    with view:
        for event in tracked(events, config.log, settings=_settings(config), every=config.log_every, prints=sys.stderr):
            if shell.json:
                out.line(json.dumps(_plain({"event": type(event).__name__, **asdict(event)}), ensure_ascii=False))
            if isinstance(event, Warned):
                view.warn(event.message)
            else:
                view.show(event)


class View(Protocol):
    """Where events are shown."""

    def __enter__(self) -> Any: ...

    def __exit__(self, *_: object) -> None: ...

    def warn(self, message: str) -> None: ...

    def show(self, event: Event) -> None: ...


def _settings(config: PretrainConfig | FinetuneConfig) -> dict[str, Any]:
    """The settings that were given or have a default, as plain values."""
    plain = ((key, str(value) if isinstance(value, tuple | Path) else value) for key, value in asdict(config).items())
    return {key: value for key, value in plain if value is not None}


def _plain(line: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no NaN and no infinity."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}


def plan_lines(plan: Planned) -> list[str]:
    """The plan as text, before the first step."""
    return [
        f"model      {plan.family}, {counted(plan.num_layers, 'layer')} x {plan.hidden_size}, vocabulary {plan.vocab_size:,}:"
        f" {plan.num_parameters:,} parameters{_trained(plan)}",
        f"data       {plan.data_tokens:,} tokens; {plan.num_tokens:,} will be seen, {plan.epochs:.2f} epochs",
        *(
            f"           {use.share:6.2%} {use.name}: {use.num_tokens:,} of {use.data_tokens:,} tokens, {use.epochs:.2f} epochs"
            for use in plan.sources
        ),
        f"steps      {plan.num_steps:,} of {plan.batch_tokens:,} tokens ({plan.batch_size} x {plan.seq_len}, in micro-batches of"
        f" {plan.micro_batch_size}), warm-up {plan.warmup_steps},"
        f" learning rate {plan.learning_rate:.2g}, of Muon {plan.muon_learning_rate:.2g}",
        f"every      evaluation {_every(plan.eval_every)},"
        f" checkpoint {_every(plan.save_every)}, sample {_every(plan.sample_every, 'never')}",
        f"work       {si(plan.flops_per_token)}FLOP a token, {si(plan.total_flops)}FLOP in all",
        f"machine    {plan.device}, {counted(plan.threads, 'thread')}, {plan.dtype}, matmul peak {si(plan.matmul_peak_flops)}FLOP/s",
        f"needs      about {num_bytes(plan.memory_bytes)} of memory beside torch, {num_bytes(plan.checkpoint_bytes)} a checkpoint",
        f"time       about {duration(plan.estimated_s)} (at half the matmul peak)",
        f"run        {plan.run_dir or 'where --out-dir will say'}, seed {plan.seed}",
    ]


def _trained(plan: Planned) -> str:
    if plan.num_trained == plan.num_parameters:
        return ""
    return f"; adapters of {plan.num_trained:,} ({plan.num_trained / plan.num_parameters:.2%}) are trained"


def elsewhere_lines(plan: PlannedElsewhere) -> list[str]:
    """A plan for other machines as text."""
    held = ", ".join(
        f"{what} {num_bytes(size)}"
        for what, size in (
            ("weights", plan.weight_bytes),
            ("gradients", plan.gradient_bytes),
            ("optimizer", plan.optimizer_bytes),
            ("activations", plan.activation_bytes),
            ("gathered weights and runtime", plan.other_bytes),
        )
    )
    verdict = (
        "" if plan.fits else ": DOES NOT FIT; more fsdp or tp in --mesh, --gradient-checkpointing or a smaller --micro-batch-size may do"
    )
    return [
        f"machines   {plan.gpus}, {plan.mesh}",
        f"memory     {num_bytes(plan.memory_bytes)} of {num_bytes(plan.gpu_memory_bytes)} each{verdict} ({held})",
        f"step       {plan.step_s:.3g} s: {plan.compute_s:.3g} computing, {plan.waiting_s:.3g} waiting for other processes"
        f" (of {plan.communication_s:.3g} communication); {plan.tokens_per_second:,.0f} tokens/s, {plan.peak_share:.0%} of the peak",
        f"time       about {duration(plan.total_s)} for {counted(plan.num_steps, 'step')}",
    ]


def _every(steps: int, zero: str = "at the end") -> str:
    return counted(steps, "step") if steps else zero


def step_line(done: StepDone, num_steps: int) -> str:
    """One step as a line."""
    skipped = "  SKIPPED: not finite" if done.skipped else ""
    return (
        f"step {done.step:>{len(str(num_steps))}}/{num_steps}  loss {done.loss:.4f}  lr {done.learning_rate:.2e}  grad {done.grad_norm:.2f}"
        f"  {done.tokens_per_second:,.0f} tok/s  {done.peak_share:.0%} of peak"
        f"  {duration(done.elapsed_s)} + {duration(done.eta_s)}{skipped}"
    )


def eval_line(done: EvalDone) -> str:
    """An evaluation as a line."""
    bits = f", {done.bits_per_byte:.4f} bits/byte" if done.bits_per_byte is not None else ""
    which = " of the averaged weights" if done.averaged else ""
    return f"step {done.step}  held-out loss{which} {done.loss:.4f}{bits}  ({done.num_tokens:,} tokens, {done.elapsed_s:.1f} s)"


def profile_line(done: Profiled) -> str:
    """Where the time went, as a line."""
    total = sum(done.seconds.values())
    parts = ", ".join(f"{name} {seconds / total:.1%}" for name, seconds in done.seconds.items() if seconds >= 0.0005 * total)
    return (
        f"profile    of {counted(done.num_steps, 'step')}: {parts}; a step takes {done.step_s:.3f} s, {done.step_peak_share:.0%} of the"
        f" matmul peak ({done.path})"
    )


def rows_line(rows: RowsRead) -> str:
    """What became of a set of supervised rows, as a line."""
    counts = ((rows.num_cut, "cut"), (rows.num_dropped, "left out"), (rows.num_skipped, "bad and skipped"))
    odd = "".join(f", {count:,} {what}" for count, what in counts if count)
    return (
        f"{rows.split + ' rows':<10} {rows.num_rows:,} read{odd}: {rows.num_tokens:,} tokens, {rows.num_learned:,} of them learned,"
        f" in {rows.num_sequences:,} sequences of {rows.seq_len}"
    )


def other_line(event: Event) -> str | None:
    """Everything else that is worth a line."""
    if isinstance(event, Resumed):
        return f"going on from step {event.step} of {event.num_steps} ({event.path})"
    if isinstance(event, RowsRead):
        return rows_line(event)
    if isinstance(event, EvalDone):
        return eval_line(event)
    if isinstance(event, CheckpointSaved):
        return f"step {event.step}  saved {event.path} ({num_bytes(event.num_bytes)}, {event.elapsed_s:.1f} s)"
    if isinstance(event, Profiled):
        return profile_line(event)
    if isinstance(event, SampleDrawn):
        return f"step {event.step}  sample: {' '.join(event.text.split())}"
    if isinstance(event, Finished):
        val = f", held-out loss {event.val_loss:.4f}" if event.val_loss is not None else ""
        bits = f" = {event.val_bits_per_byte:.4f} bits/byte" if event.val_bits_per_byte is not None else ""
        done = f"done: {counted(event.step, 'step')}, {event.tokens_seen:,} tokens in {duration(event.elapsed_s)}"
        return f"{done}{val}{bits}; the model is {event.path}"
    return None


class _LineView:
    """Lines on stderr; for logs, pipes and dumb terminals."""

    def __init__(self, shell: Shell, log_every: int) -> None:
        self._shell, self._log_every, self._num_steps = shell, log_every, 0

    def __enter__(self) -> "_LineView":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def warn(self, message: str) -> None:
        """A warning."""
        self._shell.warn(message)

    def show(self, event: Event) -> None:
        """Any other event."""
        if isinstance(event, Planned):
            self._num_steps = event.num_steps
            for line in plan_lines(event):
                self._shell.note(line)
        elif isinstance(event, PlannedElsewhere):
            for line in elsewhere_lines(event):
                self._shell.note(line)
        elif isinstance(event, StepDone):
            if event.step % self._log_every == 0 or event.step in (1, self._num_steps) or event.skipped:
                self._shell.note(step_line(event, self._num_steps))
        elif text := other_line(event):
            self._shell.note(text)


def counted(number: int, noun: str) -> str:
    """ "1 step", "2,000 steps"."""
    return f"{number:,} {noun}" + "s" * (number != 1)


def si(number: float) -> str:
    """1.5e9 as "1.50 G"."""
    for prefix in ("", "k", "M", "G", "T", "P", "E"):
        if abs(number) < 1000:
            return f"{number:.3g} {prefix}"
        number /= 1000
    return f"{number:.3g} Z"


def num_bytes(number: float) -> str:
    """A count of bytes for people."""
    return f"{si(number)}B"


def duration(seconds: float) -> str:
    """Seconds for people: 45s, 12m30s, 3h05m, 2d04h."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02}h"
