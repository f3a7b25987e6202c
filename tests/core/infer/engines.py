"""Engines over tiny random models on either executor, and the requests that the tests give them."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from llmctl.core.infer.engine import Engine
from llmctl.core.infer.events import Event, Failed, Finished, Request
from llmctl.core.infer.executor import Executor
from llmctl.core.infer.sampler import SamplingParams
from llmctl.core.infer.torch_executor import TorchExecutor
from tests.core.infer.tiny import ByteTokenizer
from tests.core.model.families import VOCAB
from tests.core.native.models import loaded, native

KINDS = ("native-float32", "native-bfloat16", "native-int8", "torch")


def executor_of(setting: str, kind: str) -> Executor:
    """An executor over a model of tests/core/model/families.py; `kind` is one of KINDS."""
    model, config, arrays = loaded(setting)
    if kind == "torch":
        return TorchExecutor(model)
    dtype = kind.removeprefix("native-")
    if dtype == "int8":
        return native(config, arrays, quant="int8", num_slots=1, capacity=16)
    return native(config, arrays, dtype=dtype, num_slots=1, capacity=16)


def engine_of(setting: str, kind: str, **options: Any) -> Engine:
    """An engine over such an executor; ids stand for bytes."""
    return Engine(executor_of(setting, kind), ByteTokenizer(VOCAB), **options)


def repeating_prompts(count: int, *, longest: int = 24, seed: int = 3) -> list[tuple[int, ...]]:
    """Prompts that say a few tokens again and again, each another number of times."""
    rng = np.random.default_rng(seed)
    prompts = []
    for _ in range(count):
        phrase = rng.integers(0, VOCAB, int(rng.integers(2, 7))).tolist()
        prompts.append(tuple((phrase * longest)[: int(rng.integers(3, longest))]))
    return prompts


def requests_of(params: SamplingParams, prompts: Sequence[tuple[int, ...]], *, max_new_tokens: int = 24, **more: Any) -> list[Request]:
    """A request for each prompt, of different lengths."""
    return [
        Request(id=i, prompt_ids=ids, max_new_tokens=max_new_tokens - i % 3, params=params, seed=11, **more)
        for i, ids in enumerate(prompts)
    ]


def finished(events: Iterable[Event]) -> dict[tuple[int | str, int], Finished]:
    """The texts of a run, by id and sample. A failure is an error of the test."""
    found = {}
    for event in events:
        assert not isinstance(event, Failed), event.error
        if isinstance(event, Finished):
            found[event.id, event.sample_index] = event
    return found
