"""The best of several texts of one prompt. Knows the engine's events; knows no model and no terminal."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from llmctl.core.infer.events import Event, Failed, Finished, TokenOut


def best_of(events: Iterable[Event], counts: Callable[[int | str], tuple[int, int] | None]) -> Iterator[Event]:
    """The events of an engine that makes several samples of an id, with the best in their place.

    `counts(id)` gives how many samples come and how many of them are kept, or None for an id whose samples are not
    compared; it is asked when the first of an id's samples is there. The best are those whose tokens are the most
    probable on average (the sum would favour short texts), ties by sample; they come when all of an id are there, best
    first, numbered anew from 0, with their mean as `score`. The requests must ask for log-probabilities. Where samples
    failed and too few are left, a Failed comes for each that lacks. What an interruption leaves incomplete comes as
    "interrupted". TokenOut are left out.
    """
    groups: dict[int | str, tuple[int, int, list[Finished | Failed]]] = {}
    for event in events:
        if isinstance(event, TokenOut):
            continue
        if not isinstance(event, Finished | Failed) or (isinstance(event, Failed) and event.line is not None):
            yield event
            continue
        if event.id not in groups:
            found = counts(event.id)
            if found is None:
                yield event
                continue
            groups[event.id] = *found, []
        num_made, num_kept, group = groups[event.id]
        group.append(event)
        if len(group) == num_made:
            del groups[event.id]
            yield from _chosen(group, num_kept, whole=True)
    for _, num_kept, group in groups.values():
        yield from _chosen(group, num_kept, whole=False)


def _chosen(group: list[Finished | Failed], num_kept: int, *, whole: bool) -> Iterator[Finished | Failed]:
    made = [event for event in group if isinstance(event, Finished)]
    failed = [event for event in group if isinstance(event, Failed)]
    whole = whole and all(event.finish != "interrupted" for event in made)
    made.sort(key=lambda event: (-event.mean_logprob, event.sample_index))
    for rank, event in enumerate(made[:num_kept]):
        score = event.mean_logprob
        yield replace(event, sample_index=rank, score=score, finish=event.finish if whole else "interrupted")
    for rank, failure in zip(range(len(made), num_kept), failed, strict=False):
        yield replace(failure, sample_index=rank)
