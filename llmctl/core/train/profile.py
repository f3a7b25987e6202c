"""Where the time of a run goes, by phases. Knows a clock and a device; knows nothing of what is done in a phase.

The matrix products of the forward pass of the head, and their gradients, lie in the phase "forward": the loss is computed
in pieces, each with its gradient at once (see objectives).
"""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llmctl.core.files import write_json
from llmctl.core.train.events import Profiled
from llmctl.core.train.machine import synchronize

PROFILE_NAME = "profile.json"
PHASES = ("data", "forward", "backward", "optimizer", "logging", "saving", "evaluation", "sampling")
_IN_STEP = PHASES[:5]
_WARM_UP_STEPS = 2
_NUM_OPERATORS = 20


class Profile:
    """Seconds by phase. Off, it costs nothing; on, an accelerator is waited for at the end of each phase.

    The first steps are left out, and so is one in which each operator is timed.
    """

    def __init__(self, device: torch.device, *, on: bool) -> None:
        self.on = on
        self._device = device
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._num_steps = self._num_positions = 0
        self._started: float | None = None
        self._seen_steps = 0
        self._operators: list[dict[str, object]] = []

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time within as that of the phase `name`; phases do not nest."""
        if not self.on:
            yield
            return
        started = time.perf_counter()
        try:
            yield
        finally:
            synchronize(self._device)
            if self._started is not None:
                self._seconds[name] += time.perf_counter() - started

    @contextlib.contextmanager
    def step(self, num_positions: int) -> Iterator[None]:
        """One optimizer step over so many tokens."""
        if not self.on:
            yield
            return
        self._seen_steps += 1
        if self._seen_steps <= _WARM_UP_STEPS:
            yield
        elif self._seen_steps == _WARM_UP_STEPS + 1:
            with _Operators(self._device) as recorded:
                yield
            self._operators = recorded.rows()
            self._started = time.perf_counter()
        else:
            yield
            self._num_steps += 1
            self._num_positions += num_positions

    def write(self, run_dir: Path, *, flops_per_token: float, matmul_peak: float) -> Profiled | None:
        """Write profile.json into the run folder and give what it says; None when no step was measured."""
        if self._started is None or not self._num_steps:
            return None
        elapsed = time.perf_counter() - self._started
        seconds = {**self._seconds, "other": max(0.0, elapsed - sum(self._seconds.values()))}
        step_s = sum(self._seconds[name] for name in _IN_STEP) / self._num_steps
        flops = self._num_positions * flops_per_token
        done = Profiled(
            num_steps=self._num_steps,
            elapsed_s=elapsed,
            step_s=step_s,
            seconds=seconds,
            matmul_peak_flops=matmul_peak,
            step_peak_share=flops / (step_s * self._num_steps * matmul_peak),
            run_peak_share=flops / (elapsed * matmul_peak),
            path=str(run_dir / PROFILE_NAME),
        )
        content = {
            "num_steps": done.num_steps,
            "elapsed_s": elapsed,
            "step_s": step_s,
            "seconds": seconds,
            "seconds_per_step": {name: self._seconds[name] / self._num_steps for name in _IN_STEP},
            "matmul_peak_flops": matmul_peak,
            "flops_per_token": flops_per_token,
            "step_peak_share": done.step_peak_share,
            "run_peak_share": done.run_peak_share,
            "operators_of_one_step": self._operators,
        }
        write_json(run_dir / PROFILE_NAME, content)
        return done


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Times every operator, those of the backward pass too. torch.profiler would do it as well, but writes to stderr."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device
        self._seconds: dict[str, float] = {}
        self._calls: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch for each operator."""
        started = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        synchronize(self._device)
        name = str(func.overloadpacket)
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - started
        self._calls[name] = self._calls.get(name, 0) + 1
        return result

    def rows(self) -> list[dict[str, object]]:
        """The operators that took the most time, most first."""
        names = sorted(self._seconds, key=lambda name: -self._seconds[name])[:_NUM_OPERATORS]
        return [{"operator": name, "seconds": self._seconds[name], "calls": self._calls[name]} for name in names]
