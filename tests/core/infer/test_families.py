"""The engine against a naive loop over transformers' model, for every family: no cache, no batch, the whole text anew for each token."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from llmctl.core.infer.engine import Engine
from llmctl.core.infer.events import Failed, Request
from llmctl.core.infer.executor import Executor
from llmctl.core.infer.sampler import SamplingParams
from llmctl.core.infer.torch_executor import TorchExecutor
from llmctl.core.native.executor import supports
from tests.core.infer.engines import finished
from tests.core.infer.tiny import ByteTokenizer
from tests.core.model.families import SETTINGS, VOCAB, reference_model
from tests.core.native.models import loaded, native, runnable_kernels

GREEDY = SamplingParams(temperature=0)
TIE = 1e-4
"""Logits this near to the largest, as a share of their spread, are a tie, which float32 may decide either way."""


def ragged_requests() -> list[Request]:
    """Prompts of 1 to 29 tokens, longer than every window; two pairs with a common beginning; answers of several lengths."""
    rng = np.random.default_rng(4)
    lengths = (29, 1, 12, 25, 7, 29)
    prompts = [tuple(rng.integers(0, VOCAB, length).tolist()) for length in lengths]
    prompts[3] = (*prompts[0][:20], *prompts[3][20:])  # shares what must be copied from another slot
    prompts[5] = prompts[0]
    return [Request(id=i, prompt_ids=ids, max_new_tokens=6 + 3 * (i % 3), params=GREEDY) for i, ids in enumerate(prompts)]


def one_after_another(requests: list[Request]) -> Iterator[Request | None]:
    """Requests that come while others are under way."""
    for request in requests:
        yield request
        yield None
        yield None


@cache
def naive_texts(setting: str) -> dict[int | str, tuple[list[int], list[np.ndarray]]]:
    """For each request the tokens that transformers' model takes, and the logits that it took them from."""
    theirs = reference_model(setting)
    found: dict[int | str, Any] = {}
    for request in ragged_requests():
        ids, chosen = list(request.prompt_ids), []
        for _ in range(request.max_new_tokens):
            with torch.no_grad():
                chosen.append(theirs(torch.tensor([ids]), use_cache=False).logits[0, -1].numpy())
            ids.append(int(chosen[-1].argmax()))
        found[request.id] = ids[len(request.prompt_ids) :], chosen
    return found


def check(setting: str, executor: Executor, **options: Any) -> None:
    engine = Engine(executor, ByteTokenizer(VOCAB), **options)
    events = list(engine.run(one_after_another(ragged_requests())))
    assert not any(isinstance(event, Failed) for event in events)
    ours = finished(events)
    for id, (tokens, logits) in naive_texts(setting).items():
        for place, (mine, theirs) in enumerate(zip(ours[id, 0].token_ids, tokens, strict=True)):
            if mine != theirs:
                values = logits[place]
                assert values[theirs] - values[mine] < TIE * np.ptp(values), f"request {id}, token {place}"
                break  # after a tie the texts go their own ways


@pytest.mark.parametrize("setting", SETTINGS)
def test_greedy_texts_are_those_of_a_naive_loop(setting: str) -> None:
    """Ragged batches, chunks smaller than the prompts, admission in mid-flight, shared beginnings, windows shorter than the text."""
    check(setting, TorchExecutor(loaded(setting)[0]), num_slots=3, chunk_tokens=8)


@pytest.mark.skipif(not runnable_kernels(), reason="the native library was not built")
@pytest.mark.parametrize("setting", SETTINGS)
def test_greedy_texts_of_the_native_executor_are_those_of_a_naive_loop(setting: str) -> None:
    _, config, arrays = loaded(setting)
    if (reason := supports(config)) is not None:
        pytest.skip(reason)
    check(setting, native(config, arrays, num_slots=1, capacity=16), num_slots=3, chunk_tokens=8)
    check(setting, native(config, arrays, num_slots=1, capacity=16), num_slots=1)
