"""What a run folder tells about its run, read back. Knows the files of a run; draws nothing.

run/metrics.jsonl  run/config.toml  run/plan.json  run/status.json  run/energy.json
"""

import json
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmctl.core.errors import InputError, NotFoundError
from llmctl.core.files import read_notes
from llmctl.core.runlog import CONFIG_NAME, ENERGY_NAME, METRICS_NAME, PLAN_NAME, STATUS_NAME

_MAX_LINE_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A text that the model in training wrote."""

    step: int
    text: str


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run as its folder tells it. Columns of `steps` and `evals` are as long as each other; None where a number is missing."""

    name: str
    path: Path
    steps: dict[str, list[float | None]]
    """From the lines of kind "step": step, tokens_seen, elapsed_s, loss, learning_rate, grad_norm, tokens_per_second, peak_share."""
    evals: dict[str, list[float | None]]
    """From the lines of kind "eval": step, tokens_seen, elapsed_s, loss, bits_per_byte."""
    averaged: dict[str, list[float | None]]
    """As `evals`, of the moving average of the weights (--ema)."""
    samples: tuple[Sample, ...]
    settings: dict[str, Any]
    plan: dict[str, Any]
    machine: dict[str, Any]
    status: dict[str, Any]
    energy: tuple[dict[str, Any], ...]
    """One entry for each start of the run that was measured: energy_kwh, emissions_kg, duration_s, country, tool."""
    num_bad_lines: int = field(default=0)


_STEP_COLUMNS = ("step", "tokens_seen", "elapsed_s", "loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_share")
_EVAL_COLUMNS = ("step", "loss", "bits_per_byte")


def read_run(path: Path) -> RunRecord:
    """Read a run folder. Raises NotFoundError when there is no run, InputError when its log holds nothing to show."""
    if not path.is_dir():
        raise NotFoundError(f"{path}: no such run folder; give the --out-dir of a pretrain or finetune run")
    metrics = path / METRICS_NAME
    if not metrics.is_file():
        raise NotFoundError(f"{path}: holds no {METRICS_NAME}; give the --out-dir of a pretrain or finetune run")
    steps: dict[str, list[float | None]] = {name: [] for name in _STEP_COLUMNS}
    evals: dict[str, list[float | None]] = {name: [] for name in _EVAL_COLUMNS}
    averaged: dict[str, list[float | None]] = {name: [] for name in _EVAL_COLUMNS}
    samples: list[Sample] = []
    num_bad = 0
    try:
        with metrics.open("rb") as file:
            while raw := file.readline(_MAX_LINE_BYTES):
                line = _parsed(raw)
                if line is None:
                    num_bad += 1
                elif line["kind"] == "step":
                    _add(steps, line)
                elif line["kind"] == "eval":
                    _add(averaged if line.get("averaged") is True else evals, line)
                elif line["kind"] == "sample" and isinstance(line.get("text"), str):
                    samples.append(Sample(step=line["step"], text=line["text"]))
    except OSError as error:
        raise InputError(f"{metrics}: cannot be read: {error.strerror}") from error
    if not steps["step"]:
        raise InputError(f"{metrics}: holds no step yet, so there is nothing to report on")
    for columns in (evals, averaged):
        for name in ("tokens_seen", "elapsed_s"):
            columns[name] = _at_steps(steps, name, columns["step"])
    plan = read_notes(path / PLAN_NAME)
    energy = read_notes(path / ENERGY_NAME).get("starts", [])
    return RunRecord(
        name=path.name or str(path.resolve().name),
        path=path,
        steps=steps,
        evals=evals,
        averaged=averaged,
        samples=tuple(samples),
        settings=_toml(path / CONFIG_NAME),
        plan=_dict(plan.get("plan")),
        machine=_dict(plan.get("machine")),
        status=read_notes(path / STATUS_NAME),
        energy=tuple(e for e in energy if isinstance(e, dict)) if isinstance(energy, list) else (),
        num_bad_lines=num_bad,
    )


def differences(runs: list[RunRecord]) -> list[tuple[str, list[Any]]]:
    """Settings in which the runs differ: (key, the value of each run; None where a run has none), by key.

    Where a run was written is no setting of it.
    """
    keys = sorted({key for run in runs for key in run.settings} - {"out_dir"})
    rows = [(key, [run.settings.get(key) for run in runs]) for key in keys]
    return [(key, values) for key, values in rows if any(value != values[0] for value in values)]


def _parsed(raw: bytes) -> dict[str, Any] | None:
    """A whole line with a step and a kind, else None."""
    if not raw.endswith(b"\n"):
        return None
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or not isinstance(line.get("step"), int) or not isinstance(line.get("kind"), str):
        return None
    return line


def _add(columns: dict[str, list[float | None]], line: dict[str, Any]) -> None:
    for name, column in columns.items():
        value = line.get(name)
        column.append(float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None)


def _at_steps(steps: dict[str, list[float | None]], name: str, wanted: list[float | None]) -> list[float | None]:
    """The column `name` at the wanted steps."""
    found = dict(zip(steps["step"], steps[name], strict=True))
    return [found.get(step) for step in wanted]


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
