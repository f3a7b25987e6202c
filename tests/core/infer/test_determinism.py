"""The native executor gives a text the same tokens and log-probabilities, to the bit, whatever it is computed beside and however."""

from typing import Any

import numpy as np
import pytest

from llmctl.core.infer.engine import Engine
from llmctl.core.infer.events import Request
from llmctl.core.infer.rows import sharded
from llmctl.core.infer.sampler import SamplingParams
from llmctl.core.infer.speculate import PromptLookup, Speculator
from llmctl.core.native.cache import CACHE_KINDS
from tests.core.infer.engines import finished, repeating_prompts
from tests.core.infer.tiny import ByteTokenizer
from tests.core.model.families import VOCAB
from tests.core.native.models import loaded, native, runnable_kernels

pytestmark = pytest.mark.skipif(not runnable_kernels(), reason="the native library was not built")

HELD: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quant": "int8"},
    "int4": {"quant": "int4"},
    **{f"cache-{kind}": {"cache_dtype": kind} for kind in CACHE_KINDS},
}
PARAMS = (
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.9, top_p=0.9, repetition_penalty=1.2),
    SamplingParams(temperature=1.4, top_k=30, min_p=0.01, presence_penalty=0.3),
)


def wanted() -> list[Request]:
    """Eleven requests with prompts of 1 to 38 tokens, greedy and sampled."""
    rng = np.random.default_rng(8)
    prompts = [*repeating_prompts(5), *(tuple(rng.integers(0, VOCAB, n).tolist()) for n in (1, 38, 17, 30, 5))]
    prompts.append((*prompts[6][:25], 3))
    return [
        Request(id=f"row {i}", prompt_ids=ids, max_new_tokens=14 + i % 5, params=PARAMS[i % 3], seed=21, num_logprobs=1)
        for i, ids in enumerate(prompts)
    ]


SETTINGS = ("llama-gqa-tied", "qwen2-window", "gpt2-tied", "qwen3_moe-some-layers")
EACH_HELD = [
    pytest.param(setting, held, marks=[] if held in ("float32", "int8") or setting == "qwen2-window" else [pytest.mark.slow])
    for setting in SETTINGS
    for held in HELD
]
"""Two ways of holding weights in every architecture, every way in one; all of both in the slow tests."""


@pytest.mark.parametrize(("setting", "held"), EACH_HELD)
def test_a_text_is_the_same_alone_and_in_any_company(setting: str, held: str) -> None:
    _, config, arrays = loaded(setting)
    executor = native(config, arrays, num_slots=1, capacity=16, **HELD[held])
    threaded = native(config, arrays, num_slots=1, capacity=16, num_threads=2, **HELD[held])

    def run(requests: list[Request], *, on: Any = executor, **options: Any) -> dict[Any, Any]:
        on.release()
        return finished(Engine(on, ByteTokenizer(VOCAB), eos_ids=(9,), **options).run(requests))

    alone: dict[Any, Any] = {}
    for request in wanted():
        alone |= run([request])
    assert len({event.token_ids for event in alone.values()}) == len(alone)
    for num_slots in (1, 3, 8):
        for chunk_tokens in (1, 7, 512):
            assert run(wanted(), num_slots=num_slots, chunk_tokens=chunk_tokens) == alone
    assert run(wanted()[::-1], num_slots=3) == alone
    assert run(wanted(), num_slots=8, share_prefixes=False) == alone
    assert run(wanted(), num_slots=8, on=threaded, chunk_tokens=5) == alone
    assert run(wanted(), num_slots=3, speculator=Speculator(PromptLookup(), token_cost=0.1, num_tokens=5)) == alone
    for count in (2, 3):
        shards: dict[Any, Any] = {}
        for index in range(1, count + 1):
            shards |= run([request for request in sharded(wanted(), (index, count)) if request is not None], num_slots=3)
        assert shards == alone
