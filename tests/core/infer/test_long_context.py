"""Texts of several thousand tokens, windows and whole attention mixed, against one pass of transformers over all of them."""

import dataclasses
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from llmctl.core.infer.engine import Engine
from llmctl.core.infer.events import Request
from llmctl.core.infer.executor import Executor
from llmctl.core.infer.sampler import SamplingParams
from llmctl.core.infer.speculate import PromptLookup, Speculator
from llmctl.core.infer.torch_executor import TorchExecutor
from llmctl.core.model import Decoder
from llmctl.core.native.executor import supports
from tests.core.infer.engines import finished
from tests.core.infer.tiny import ByteTokenizer
from tests.core.model.families import SETTINGS, VOCAB, reference_model
from tests.core.native.models import loaded, native, runnable_kernels

CONTEXT, NUM_PROMPT, NUM_NEW = 4096, 3300, 24
GREEDY = SamplingParams(temperature=0)
PLACES = ["mistral-window", "gemma3-windows", "llama-gqa-tied"]
"""Windows of 7, windows of 5 in most layers, none."""


def prompt() -> tuple[int, ...]:
    """Random tokens, whose last hundred stood before, so that there is something to guess."""
    ids = np.random.default_rng(6).integers(0, VOCAB, NUM_PROMPT).tolist()
    return tuple(ids[:-100] + ids[500:600])


@cache
def theirs(setting: str) -> transformers.PreTrainedModel:
    """The model of transformers for long texts; none of the settings here has weights that depend on their length."""
    model_type, options = SETTINGS[setting]
    config = transformers.AutoConfig.for_model(model_type, **{**options, "max_position_embeddings": CONTEXT})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(reference_model(setting).state_dict())
    return model.eval()


def executor_of(setting: str, kind: str) -> Executor:
    decoder, config, arrays = loaded(setting)
    longer = dataclasses.replace(config, max_positions=CONTEXT)
    if kind == "torch":
        model = Decoder(longer)
        model.load_state_dict(decoder.state_dict())
        return TorchExecutor(model)
    if not runnable_kernels():
        pytest.skip("the native library was not built")
    if (reason := supports(longer)) is not None:
        pytest.skip(reason)
    return native(longer, arrays, num_slots=1, capacity=16)


@pytest.mark.parametrize("kind", ["torch", "native"])
@pytest.mark.parametrize("setting", PLACES)
def test_a_long_text_is_that_of_one_pass_over_it(setting: str, kind: str) -> None:
    executor = executor_of(setting, kind)
    request = Request(id=0, prompt_ids=prompt(), max_new_tokens=NUM_NEW, params=GREEDY)
    short = [Request(id=i, prompt_ids=prompt()[: 40 * i], max_new_tokens=NUM_NEW, params=GREEDY) for i in (1, 2)]

    def run(**options: Any) -> tuple[int, ...]:
        executor.release()
        found = finished(Engine(executor, ByteTokenizer(VOCAB), **options).run([*short, request]))
        return found[0, 0].token_ids

    tokens = run(num_slots=3, chunk_tokens=256)
    with torch.no_grad():
        logits = theirs(setting)(torch.tensor([[*prompt(), *tokens[:-1]]])).logits[0, -NUM_NEW:].numpy()
    largest = logits.max(-1)
    chosen = logits[np.arange(NUM_NEW), list(tokens)]
    assert (largest - chosen < 1e-4 * np.ptp(logits, axis=-1)).all(), "each token is the most likely one, ties apart"
    assert len(set(tokens)) > 1
    assert run(num_slots=1, chunk_tokens=1000) == tokens
    assert run(num_slots=2, speculator=Speculator(PromptLookup(), token_cost=0.1, num_tokens=6)) == tokens
