"""What is of torch alone: its several ways to say that memory is short, and, where there is a GPU, the engine on it."""

import numpy as np
import pytest
import torch

from llmctl.core.infer.engine import Engine
from llmctl.core.infer.sampler import SamplingParams
from llmctl.core.infer.torch_executor import DecodeKind, TorchExecutor, memory_errors
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


FIXED = ["gpt2-tied", "llama-gqa-tied", "llama-rope-dynamic", "qwen2-window", "gemma2-windows", "olmo2-mha", "phi3-longrope-short"]


@pytest.mark.parametrize("params", [SamplingParams(temperature=0), SamplingParams(temperature=0.9, top_k=20)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("setting", FIXED)
def test_steps_in_shapes_that_repeat_choose_the_same_tokens(setting: str, params: SamplingParams) -> None:
    """Three slots, more texts than those, ends at different steps: rows come and go, and rows are filled up."""
    model, _, _ = loaded(setting)
    wanted = requests_of(params, repeating_prompts(7))
    texts = [
        finished(Engine(TorchExecutor(model, decode=kind), ByteTokenizer(VOCAB), num_slots=3, chunk_tokens=8).run(wanted))
        for kind in ("eager", "fixed")
    ]
    assert {key: text.token_ids for key, text in texts[0].items()} == {key: text.token_ids for key, text in texts[1].items()}


@pytest.mark.parametrize("setting", FIXED)
def test_steps_in_shapes_that_repeat_give_the_same_logits_and_touch_no_other_slot(setting: str) -> None:
    model, _, _ = loaded(setting)
    eager, fixed = TorchExecutor(model), TorchExecutor(model, decode="fixed")
    rng = np.random.default_rng(5)
    prompt = rng.integers(0, VOCAB, (6, 9))
    for executor in (eager, fixed):
        executor.reserve(num_slots=6, capacity=40)
        executor.step(prompt, np.zeros(6, dtype=np.int64), np.arange(6))
    lengths = np.full(6, 9)
    for slots in ([0], [4], [0, 1], [5, 2, 3], [0, 1, 2, 3, 4, 5], [1, 0, 3], [5]):
        chosen = np.array(slots)
        tokens = rng.integers(0, VOCAB, (len(slots), 1))
        ours, theirs = (executor.step(tokens, lengths[chosen], chosen) for executor in (fixed, eager))
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
        lengths[chosen] += 1
    assert fixed._fixed is not None
    assert fixed._fixed.num_recorded == 5  # rows 1, 2, 4, 8; one in the first slot or in another; two and four in order or not


def test_where_shapes_cannot_repeat_steps_are_those_of_their_rows() -> None:
    model, _, _ = loaded("mixtral-two-of-four")
    executor = TorchExecutor(model, decode="fixed")
    executor.reserve(num_slots=1, capacity=8)
    for position in range(3):
        executor.step(np.array([[1]]), np.array([position]), np.array([0]))
    assert executor._fixed is not None
    assert executor._fixed.num_recorded == 0


def on_cuda(setting: str, dtype: torch.dtype, decode: DecodeKind | None = None) -> TorchExecutor:
    decoder, config, _ = loaded(setting)
    model = Decoder(config)
    model.load_state_dict(decoder.state_dict())
    return TorchExecutor(model.to("cuda", dtype), decode=decode)


@needs_cuda
@pytest.mark.parametrize("setting", FIXED)
def test_recorded_steps_give_the_logits_of_those_that_run(setting: str) -> None:
    recorded, fixed = on_cuda(setting, torch.float32), on_cuda(setting, torch.float32, "fixed")
    assert recorded.decode == "recorded"
    rng = np.random.default_rng(5)
    for executor in (recorded, fixed):
        executor.reserve(num_slots=4, capacity=300)
        executor.step(rng.integers(0, VOCAB, (4, 9)) * 0 + 1, np.zeros(4, dtype=np.int64), np.arange(4))
    for step, slots in enumerate([[0], [0], [0, 1, 2], [3, 1], [0, 1, 2], [0, 1, 2, 3], [3, 1]]):
        tokens, positions = rng.integers(0, VOCAB, (len(slots), 1)), np.full(len(slots), 9 + step)
        ours, theirs = (executor.step(tokens, positions, np.array(slots)) for executor in (recorded, fixed))
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


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
