"""What is of torch alone: its several ways to say that memory is short, and, where there is a GPU, the engine on it."""

import numpy as np
import pytest
import torch

from llmctl.core.infer.engine import Engine
from llmctl.core.infer.sampler import SamplingParams
from llmctl.core.infer.torch_executor import TorchExecutor, memory_errors
from llmctl.core.model import Decoder
from tests.core.infer.engines import finished, repeating_prompts, requests_of
from tests.core.infer.tiny import ByteTokenizer
from tests.core.model.families import VOCAB, reference_model
from tests.core.native.models import loaded

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
MIXED = ["gpt2-tied", "llama-gqa-tied", "qwen2-window", "gemma2-windows", "mixtral-two-of-four"]


@pytest.mark.parametrize(
    "message",
    [
        "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.",
        "[enforce fail at alloc_cpu.cpp] . DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.",
        "MPS backend out of memory (MPS allocated: 9 GB, other allocations: 1 GB, max allowed: 9 GB).",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_short_memory_is_known_by_its_messages(message: str) -> None:
    with pytest.raises(MemoryError), memory_errors():
        raise RuntimeError(message)


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes"), memory_errors():
        raise RuntimeError("shapes cannot be multiplied")


def on_cuda(setting: str, dtype: torch.dtype) -> TorchExecutor:
    decoder, config, _ = loaded(setting)
    model = Decoder(config)
    model.load_state_dict(decoder.state_dict())
    return TorchExecutor(model.to("cuda", dtype))


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("setting", MIXED)
def test_each_token_on_a_gpu_is_the_most_likely_one(setting: str, dtype: torch.dtype) -> None:
    """Judged by transformers' model in float32 on the CPU, over each whole text; ties, as wide as the format makes them, apart."""
    theirs, width = reference_model(setting), 1e-3 if dtype == torch.float32 else 0.1
    wanted = requests_of(SamplingParams(temperature=0), repeating_prompts(6))
    done = finished(Engine(on_cuda(setting, dtype), ByteTokenizer(VOCAB), num_slots=3, chunk_tokens=8).run(wanted))
    for request in wanted:
        tokens = done[request.id, 0].token_ids
        with torch.no_grad():
            logits = theirs(torch.tensor([[*request.prompt_ids, *tokens[:-1]]])).logits[0, -len(tokens) :].numpy()
        chosen = logits[np.arange(len(tokens)), list(tokens)]
        assert (logits.max(-1) - chosen < width * np.ptp(logits, axis=-1)).all()
