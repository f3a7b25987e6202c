"""What most runs of the training tests start from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmctl.core.train.events import Event
from tests.core.train.runs import run


@pytest.fixture
def settings(packed: Path, tmp_path: Path) -> dict[str, Any]:
    """A run of twelve steps of two micro-batches."""
    return {
        "data": packed, "out_dir": tmp_path / "run", "depth": 1, "seq_len": 32, "batch_size": 8, "micro_batch_size": 4, "max_steps": 12,
        "save_every": 4, "eval_every": 6, "sample_every": 0, "threads": 1, "dtype": "f32", "device": "cpu",
    }  # fmt: skip


@pytest.fixture(scope="session")
def run_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], tuple[list[Event], Path]]:
    """Events and folder of a run with which others are compared: made the first time that its settings are asked for."""
    known: dict[str, tuple[list[Event], Path]] = {}

    def call(settings: dict[str, Any]) -> tuple[list[Event], Path]:
        key = repr(sorted((name, str(value)) for name, value in settings.items() if name != "out_dir"))
        if key not in known:
            folder = tmp_path_factory.mktemp("whole") / "run"
            known[key] = run({**settings, "out_dir": folder}), folder
        return known[key]

    return call
