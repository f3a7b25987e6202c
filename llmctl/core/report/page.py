"""The report as one HTML page that needs nothing else: curves, samples, differences, machine, energy. Knows RunRecord; trains nothing."""

from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from llmctl import __version__
from llmctl.core.report.chart import Series, line_chart, smoothed
from llmctl.core.report.record import RunRecord, differences

MAX_RUNS = 8
"""Colours that an eye tells apart."""
_SAMPLES_SHOWN = 12
_AXES: tuple[tuple[str, str, float], ...] = (
    ("step", "optimizer steps", 1.0),
    ("tokens_seen", "tokens", 1.0),
    ("elapsed_s", "hours", 3600.0),
)
"""Column, name and divisor of the horizontal axes."""


def render(runs: Sequence[RunRecord]) -> str:
    """The page. Raises ValueError for no run, or for more than `MAX_RUNS`."""
    if not 1 <= len(runs) <= MAX_RUNS:
        raise ValueError(f"a report shows 1 to {MAX_RUNS} runs, not {len(runs)}")
    names = labels([run.path for run in runs])
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(files(__package__).joinpath("page.html.j2").read_text("utf-8"))
    return template.render(
        title=" and ".join(names) if len(names) < 3 else f"{len(names)} runs",
        version=__version__,
        runs=[_summary(run, name, index) for index, (run, name) in enumerate(zip(runs, names, strict=True))],
        axes=[name for _, name, _ in _AXES],
        charts=[
            {"title": title, "drawn": [Markup(draw(runs, names, axis)) for axis in _AXES]}
            for title, draw in _CHARTS.items()
            if draw(runs, names, _AXES[0])
        ],
        differences=[(key, [_setting(value) for value in values]) for key, values in differences(list(runs))],
        settings=[(key, _setting(value)) for key, value in sorted(runs[0].settings.items())] if len(runs) == 1 else [],
    )


def labels(paths: Sequence[Path]) -> list[str]:
    """What to call each run: the end of its path, as much of it as tells the runs apart."""
    parts = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{path} ({number})" for number, path in enumerate(paths, 1)]


def _summary(run: RunRecord, name: str, index: int) -> dict[str, Any]:
    """What the page says of one run in words and numbers."""
    last = {key: next((v for v in reversed(column) if v is not None), None) for key, column in run.steps.items()}
    bits = [v for columns in (run.evals, run.averaged) for v in columns["bits_per_byte"] if v is not None]
    speeds = sorted(v for v in run.steps["tokens_per_second"] if v is not None)
    energy = [e for e in run.energy if isinstance(e.get("energy_kwh"), int | float)]
    chosen = run.samples if len(run.samples) <= _SAMPLES_SHOWN else _spread(run.samples, _SAMPLES_SHOWN)
    numbers = {
        "state": _state(run),
        "parameters": _whole(run.plan.get("num_parameters")),
        "model": f"{run.plan.get('family')}, {run.plan.get('num_layers')} layers × {run.plan.get('hidden_size')}" if run.plan else "?",
        "steps": _whole(last["step"]),
        "tokens": _whole(last["tokens_seen"]),
        "last training loss": _number(last["loss"]),
        "last held-out loss": _number(next((v for v in reversed(run.evals["loss"]) if v is not None), None)),
        "best bits per byte": _number(min(bits, default=None)),
        "time": _duration(last["elapsed_s"]),
        "median tokens/s": _whole(speeds[len(speeds) // 2]) if speeds else "?",
        "energy": _energy(energy),
    }
    return {
        "name": name,
        "colour": f"c{index}",
        "numbers": numbers,
        "samples": [{"step": f"{sample.step:,}", "text": sample.text} for sample in chosen],
        "machine": [(key.replace("_", " "), _fact(key, value)) for key, value in run.machine.items() if value is not None],
        "energy": energy,
        "bad_lines": run.num_bad_lines,
    }


def _state(run: RunRecord) -> str:
    state, message = run.status.get("state", "?"), run.status.get("message")
    return f"{state}: {message}" if message else str(state)


def _spread(samples: Sequence[Any], count: int) -> list[Any]:
    """So many, evenly over the run, the first and the last among them."""
    return [samples[round(i * (len(samples) - 1) / (count - 1))] for i in range(count)]


_Axis = tuple[str, str, float]


def _smoothing(run: RunRecord) -> float:
    """The weight of an exponential mean over about a fiftieth of the run, 500 steps at most."""
    return 1 - 1 / min(500.0, max(2.0, len(run.steps["step"]) / 50))


def _over(column: Sequence[float | None], divisor: float) -> list[float | None]:
    return [None if value is None else value / divisor for value in column]


def _loss(runs: Sequence[RunRecord], names: Sequence[str], axis: _Axis) -> str:
    lines: list[Series] = []
    for index, (run, name) in enumerate(zip(runs, names, strict=True)):
        xs, colour = _over(run.steps[axis[0]], axis[2]), f"c{index}"
        lines.append(Series(label=name, colour=colour, xs=xs, ys=run.steps["loss"], faint=True))
        lines.append(Series(label=f"{name}, training", colour=colour, xs=xs, ys=smoothed(run.steps["loss"], weight=_smoothing(run))))
        held_out = _over(run.evals[axis[0]], axis[2])
        lines.append(Series(label=f"{name}, held out", colour=colour, xs=held_out, ys=run.evals["loss"], marks=True, dashed=True))
    return _chart("Loss, nats a token", lines, axis)


def _bits(runs: Sequence[RunRecord], names: Sequence[str], axis: _Axis) -> str:
    lines: list[Series] = []
    for index, (run, name) in enumerate(zip(runs, names, strict=True)):
        for columns, label, dashed in ((run.evals, name, False), (run.averaged, f"{name}, averaged weights", True)):
            xs = _over(columns[axis[0]], axis[2])
            lines.append(Series(label=label, colour=f"c{index}", xs=xs, ys=columns["bits_per_byte"], marks=True, dashed=dashed))
    return _chart("Held out, bits per byte", lines, axis)


def _of_steps(title: str, column: str, factor: float = 1.0) -> Callable[[Sequence[RunRecord], Sequence[str], _Axis], str]:
    def draw(runs: Sequence[RunRecord], names: Sequence[str], axis: _Axis) -> str:
        lines = [
            Series(label=name, colour=f"c{index}", xs=_over(run.steps[axis[0]], axis[2]), ys=_over(run.steps[column], 1 / factor))
            for index, (run, name) in enumerate(zip(runs, names, strict=True))
        ]
        return _chart(title, lines, axis)

    return draw


_CHARTS: dict[str, Callable[[Sequence[RunRecord], Sequence[str], _Axis], str]] = {
    "Loss, nats a token": _loss,
    "Held out, bits per byte": _bits,
    "Learning rate": _of_steps("Learning rate", "learning_rate"),
    "Gradient norm": _of_steps("Gradient norm", "grad_norm"),
    "Tokens a second": _of_steps("Tokens a second", "tokens_per_second"),
    "Share of the matmul peak, %": _of_steps("Share of the matmul peak, %", "peak_share", 100.0),
}


def _chart(title: str, lines: Sequence[Series], axis: _Axis) -> str:
    return line_chart(title, lines, x_label=axis[1], x_text=_short, y_text=_short)


def _short(value: float) -> str:
    """A number for a tick: 0.0015, 12.5, 30k, 1.2M."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / {'G': 1e9, 'M': 1e6, 'k': 1e3}[suffix]:.4g}{suffix}"
    return f"{value:.4g}"


def _whole(value: Any) -> str:
    return f"{int(value):,}" if isinstance(value, int | float) else "?"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60:02} min" if hours else f"{rest // 60} min {rest % 60:02} s"


def _energy(energy: Sequence[dict[str, Any]]) -> str:
    if not energy:
        return "not measured"
    kwh = sum(float(e["energy_kwh"]) for e in energy)
    return f"{kwh * 1000:.3g} Wh (estimate)"


def _fact(key: str, value: Any) -> str:
    return f"{value / 1e9:.1f} GB" if key.endswith("_bytes") and isinstance(value, int | float) else str(value)


def _setting(value: Any) -> str:
    if value is None:
        return "–"
    return {True: "true", False: "false"}.get(value, str(value)) if isinstance(value, bool) else str(value)
