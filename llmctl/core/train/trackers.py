"""A run's numbers for other people's dashboards: TensorBoard, W&B, MLflow, trackio; and its energy, by codecarbon. Knows events.

Each library is an extra. A tracker that fails is closed and warned of once: training goes on.
"""

import contextlib
import importlib
import importlib.util
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

from llmctl.core.errors import LlmctlError, UsageError
from llmctl.core.files import read_notes, write_json
from llmctl.core.runlog import ENERGY_NAME
from llmctl.core.train.events import EvalDone, Event, Finished, Planned, SampleDrawn, StepDone, Warned

TRACKERS: dict[str, str] = {
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "trackio": "trackio",
    "codecarbon": "codecarbon",
}
"""Name of a tracker -> the module that it needs, which is the name of the extra too."""
_IDS_NAME = "trackers.json"
_PROJECT = "llmctl"


class Tracker(Protocol):
    """Takes a run's numbers. Methods may raise whatever the library raises."""

    def scalars(self, values: Mapping[str, float], *, step: int) -> None:
        """Numbers at a step."""

    def text(self, name: str, text: str, *, step: int) -> None:
        """A text at a step."""

    def close(self) -> None:
        """Write what is left."""


def check_installed(names: Iterable[str]) -> None:
    """Raise UsageError for a tracker whose library is not installed, with the line that installs it."""
    for name in names:
        if importlib.util.find_spec(TRACKERS[name]) is None:
            raise UsageError(f"--log {name} needs the package {TRACKERS[name]}; install it by: pip install 'llmctl[{name}]'")


def tracked(events: Iterable[Event], names: tuple[str, ...], *, settings: Mapping[str, Any], every: int, prints: TextIO) -> Iterator[Event]:
    """Pass the events on, and give the numbers of every `every`th step, evaluations and samples to the named trackers.

    What the libraries print goes to `prints`.

    They are opened at the first number, so that a dry run, or a run that is refused, leaves no trace in them.
    """
    check_installed(names)
    if not names:
        yield from events
        return
    open_trackers: dict[str, Tracker] = {}
    run_dir: Path | None = None
    started = False
    try:
        for event in events:
            if isinstance(event, Planned):
                run_dir = None if event.run_dir is None else Path(event.run_dir)
            elif isinstance(event, StepDone | EvalDone | SampleDrawn) and not started and run_dir is not None:
                started = True
                for name in names:
                    with _trouble(name, prints) as trouble:
                        open_trackers[name] = _OPENERS[name](run_dir, settings, event.step)
                    if trouble:
                        yield Warned(message=trouble[0])
            for name in list(open_trackers):
                with _trouble(name, prints) as trouble:
                    _give(open_trackers[name], event, every)
                if trouble:
                    del open_trackers[name]
                    yield Warned(message=trouble[0])
            yield event
    finally:
        for name, tracker in open_trackers.items():
            with _trouble(name, prints):
                tracker.close()


def _give(tracker: Tracker, event: Event, every: int) -> None:
    if isinstance(event, StepDone):
        if event.step % every and event.step != 1:
            return
        names = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_share", "tokens_seen")
        tracker.scalars({f"train/{name}": getattr(event, name) for name in names}, step=event.step)
    elif isinstance(event, EvalDone):
        group = "val_averaged" if event.averaged else "val"
        values = {f"{group}/loss": event.loss}
        if event.bits_per_byte is not None:
            values[f"{group}/bits_per_byte"] = event.bits_per_byte
        tracker.scalars(values, step=event.step)
    elif isinstance(event, SampleDrawn):
        tracker.text("sample", event.text, step=event.step)
    elif isinstance(event, Finished) and event.val_loss is not None:
        tracker.scalars({"final/val_loss": event.val_loss}, step=event.step)


@contextlib.contextmanager
def _trouble(name: str, prints: TextIO) -> Iterator[list[str]]:
    """Run a library's code: its prints go to `prints`, and what it raises becomes a text in the list that is given."""
    found: list[str] = []
    with contextlib.redirect_stdout(prints):
        try:
            yield found
        except LlmctlError as error:
            found.append(f"--log {name}: {error}; training goes on without it")
        except Exception as error:  # whatever the library raises, a dashboard must not end a run
            text = " ".join(str(error).split())[:300]
            found.append(f"--log {name}: {type(error).__name__}: {text}; training goes on without it")


class _TensorBoard:
    """Event files in run/tensorboard."""

    def __init__(self, run_dir: Path, settings: Mapping[str, Any], first_step: int) -> None:
        writer: Any = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        # purge_step hides what a killed run logged beyond the checkpoint that it goes on from
        self._writer = writer(log_dir=str(run_dir / "tensorboard"), purge_step=first_step if first_step > 1 else None)
        self._writer.add_text("settings", "\n".join(f"    {key} = {value}" for key, value in settings.items()), first_step)

    def scalars(self, values: Mapping[str, float], *, step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def text(self, name: str, text: str, *, step: int) -> None:
        self._writer.add_text(name, text, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """Weights & Biases, with its own environment variables (WANDB_PROJECT, WANDB_MODE=offline, ...)."""

    def __init__(self, run_dir: Path, settings: Mapping[str, Any], first_step: int) -> None:
        wandb: Any = importlib.import_module("wandb")
        known = _known_id(run_dir, "wandb")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or _PROJECT,
            name=run_dir.name,
            dir=str(run_dir),
            config=dict(settings),
            id=known,
            resume="allow" if known else None,
        )
        _remember_id(run_dir, "wandb", self._run.id)
        self._html: Any = wandb.Html
        self._escape: Any = importlib.import_module("html").escape

    def scalars(self, values: Mapping[str, float], *, step: int) -> None:
        self._run.log(dict(values), step=step)

    def text(self, name: str, text: str, *, step: int) -> None:
        self._run.log({name: self._html(f"<pre>{self._escape(text)}</pre>")}, step=step)

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    """MLflow, with its own environment variables (MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, ...)."""

    def __init__(self, run_dir: Path, settings: Mapping[str, Any], first_step: int) -> None:
        self._mlflow: Any = importlib.import_module("mlflow")
        self._mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME") or _PROJECT)
        known = _known_id(run_dir, "mlflow")
        run = self._mlflow.start_run(run_id=known, run_name=None if known else run_dir.name)
        _remember_id(run_dir, "mlflow", run.info.run_id)
        if not known:
            self._mlflow.log_params({key: str(value)[:500] for key, value in settings.items()})

    def scalars(self, values: Mapping[str, float], *, step: int) -> None:
        self._mlflow.log_metrics(dict(values), step=step)

    def text(self, name: str, text: str, *, step: int) -> None:
        self._mlflow.log_text(text, f"{name}/step-{step:08}.txt")

    def close(self) -> None:
        self._mlflow.end_run()


class _Trackio:
    """trackio's local dashboard (`trackio show`), or a Space by its own settings."""

    def __init__(self, run_dir: Path, settings: Mapping[str, Any], first_step: int) -> None:
        self._trackio: Any = importlib.import_module("trackio")
        self._trackio.init(
            project=os.environ.get("TRACKIO_PROJECT") or _PROJECT,
            name=run_dir.name,
            config={key: str(value) for key, value in settings.items()},
            resume="allow",
        )

    def scalars(self, values: Mapping[str, float], *, step: int) -> None:
        self._trackio.log(dict(values), step=step)

    def text(self, name: str, text: str, *, step: int) -> None:
        self._trackio.log({name: self._trackio.Markdown(text)}, step=step)

    def close(self) -> None:
        self._trackio.finish()


class _Codecarbon:
    """Energy by codecarbon, offline: run/energy.json gets an entry for each start of the run.

    Emissions are given only where the country is (CODECARBON_COUNTRY_ISO_CODE, three letters): the energy does not depend on
    it, the mix of its power does.
    """

    def __init__(self, run_dir: Path, settings: Mapping[str, Any], first_step: int) -> None:
        codecarbon: Any = importlib.import_module("codecarbon")
        self._country = os.environ.get("CODECARBON_COUNTRY_ISO_CODE")
        logging.getLogger("codecarbon").setLevel(logging.CRITICAL)  # it speaks before it reads its own log_level
        self._tracker = codecarbon.OfflineEmissionsTracker(
            country_iso_code=self._country or "USA", save_to_file=False, log_level="critical", allow_multiple_runs=True
        )
        self._tool = f"codecarbon {codecarbon.__version__}"
        self._path = run_dir / ENERGY_NAME
        self._first_step = self._last_step = first_step
        self._started = time.perf_counter()
        self._tracker.start()

    def scalars(self, values: Mapping[str, float], *, step: int) -> None:
        self._last_step = step

    def text(self, name: str, text: str, *, step: int) -> None:
        """Texts have no energy."""

    def close(self) -> None:
        emissions = self._tracker.stop()
        entry = {
            "first_step": self._first_step,
            "last_step": self._last_step,
            "duration_s": round(time.perf_counter() - self._started, 3),
            "energy_kwh": float(self._tracker.final_emissions_data.energy_consumed),
            "emissions_kg": float(emissions) if self._country and emissions is not None else None,
            "country": self._country,
            "tool": self._tool,
        }
        starts = read_notes(self._path).get("starts", [])
        write_json(self._path, {"starts": [*starts, entry]})


_OPENERS: dict[str, Any] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "mlflow": _Mlflow,
    "trackio": _Trackio,
    "codecarbon": _Codecarbon,
}


def _known_id(run_dir: Path, name: str) -> str | None:
    """What the tracker called this run before it was stopped."""
    known = read_notes(run_dir / _IDS_NAME).get(name)
    return known if isinstance(known, str) else None


def _remember_id(run_dir: Path, name: str, run_id: str) -> None:
    write_json(run_dir / _IDS_NAME, {**read_notes(run_dir / _IDS_NAME), name: run_id})
