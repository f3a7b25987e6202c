"""Batches scored by several processes, each some of them, all knowing all scores. Knows no task and no model.

What a batch holds does not depend on the number of processes, so a score is the same bits for any number of them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from llmctl.core.distributed.ranks import Ranks
from llmctl.core.evals.progress import Progress

BatchT = TypeVar("BatchT")
Rows = list[tuple[str, list[float]]]
"""Units and their numbers, as Progress keeps them."""


def open_progress(cache_dir: Path | None, key: str, *, data: Mapping[str, str], restart: bool, ranks: Ranks) -> Progress:
    """The progress of a job, whose files rank 0 holds; what it found there all ranks know."""
    own: list[Progress] = []

    def open_here() -> list[tuple[str, list[float]]]:
        own.append(Progress.open(cache_dir, key, data=data, restart=restart))
        return own[0].rows()

    rows = ranks.on_main(open_here)
    if own:
        return own[0]
    progress = Progress.open(None, key, data=data, restart=restart)
    progress.add([(unit, values) for unit, values in rows])
    return progress


def scored(
    batches: Sequence[BatchT],
    *,
    is_known: Callable[[BatchT], bool],
    score: Callable[[BatchT], Rows],
    progress: Progress,
    stop: Callable[[], None],
    ranks: Ranks,
) -> Iterator[tuple[BatchT, bool]]:
    """The batches in their order, each when its scores are in `progress`, with whether they were there before.

    `stop` is called before and after a round in which each rank scores one; it raises on all ranks or on none.
    """
    for start in range(0, len(batches), ranks.size):
        turn = batches[start : start + ranks.size]
        known = [is_known(batch) for batch in turn]
        todo = [batch for batch, there in zip(turn, known, strict=True) if not there]
        if todo:
            stop()
            for rows in ranks.gather(score(todo[ranks.rank]) if ranks.rank < len(todo) else []):
                progress.add([(unit, values) for unit, values in rows])
            stop()  # a signal during the last batch ends the program too, as it would a shell's loop around it
        yield from zip(turn, known, strict=True)
