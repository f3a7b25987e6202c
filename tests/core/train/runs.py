"""Runs of pre-training in this process, and their events."""

import signal
from collections.abc import Callable
from typing import Any

from llmctl.core.config.pretrain import PretrainConfig
from llmctl.core.train import pretrain as pretraining
from llmctl.core.train.events import Event


def run(settings: dict[str, Any], **options: Any) -> list[Event]:
    """All events of a run."""
    return list(pretraining.train(PretrainConfig(**settings), **options))


def of(kind: type, events: list[Event]) -> list[Any]:
    """Those of one kind."""
    return [event for event in events if isinstance(event, kind)]


def stop_after(questions: int) -> Callable[[], int | None]:
    """A stop question that says SIGTERM once it was asked so often: with two micro-batches, three times a step."""
    count = 0

    def stop() -> int | None:
        nonlocal count
        count += 1
        return signal.SIGTERM if count > questions else None

    return stop
