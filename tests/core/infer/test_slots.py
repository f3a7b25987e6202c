"""A budget of tokens: kept to, all texts made, and the same as without one; shared beginnings computed once, by count."""

import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmctl.core.infer import memory
from llmctl.core.infer.engine import Engine
from llmctl.core.infer.events import Request, Warned
from llmctl.core.infer.generator import Generator
from llmctl.core.infer.sampler import SamplingParams
from llmctl.core.infer.torch_executor import TorchExecutor
from tests.cli.tiny_model import make_model
from tests.core.infer.engines import finished
from tests.core.infer.tiny import ByteTokenizer
from tests.core.model.families import VOCAB
from tests.core.native.models import loaded, native, runnable_kernels

WARM = SamplingParams(temperature=0.8)


class Watched(TorchExecutor):
    """Counts the tokens that are computed, the rows of each call, and the tokens that the slots have room for."""

    def __init__(self) -> None:
        super().__init__(loaded("llama-gqa-tied")[0])
        self.num_computed, self.most_rows = 0, 0
        self.shape = (0, 0)
        self.sizes: list[int] = []

    def reserve(self, *, num_slots: int, capacity: int) -> None:
        super().reserve(num_slots=num_slots, capacity=capacity)
        self.shape = max(num_slots, self.shape[0]), max(capacity, self.shape[1])  # as the contract says: what is there stays
        self.sizes.append(self.shape[0] * self.shape[1])

    def release(self) -> None:
        super().release()
        self.shape = (0, 0)

    def step(self, tokens, positions, slots, *, lengths=None, all_logits=False):  # type: ignore[no-untyped-def]
        self.num_computed += int(tokens.size if lengths is None else lengths.sum())
        self.most_rows = max(self.most_rows, len(tokens))
        return super().step(tokens, positions, slots, lengths=lengths, all_logits=all_logits)


def mixed_requests() -> list[Request]:
    """Texts of 5 to 16 tokens, with one of 60 here and there."""
    rng = np.random.default_rng(1)
    lengths = [4, 9, 2, 52, 11, 3, 7, 7, 50, 52, 2, 5, 6, 3, 9, 10]
    return [
        Request(id=i, prompt_ids=tuple(rng.integers(0, VOCAB, n).tolist()), max_new_tokens=5 + i % 4, params=WARM)
        for i, n in enumerate(lengths)
    ]


@pytest.mark.parametrize("budget", [1, 40, 64, 130, 300, 10_000])
def test_a_budget_is_kept_and_changes_no_text(budget: int) -> None:
    plain = finished(Engine(Watched(), ByteTokenizer(VOCAB)).run(mixed_requests()))
    watched = Watched()
    ours = finished(Engine(watched, ByteTokenizer(VOCAB), num_slots=8, batch_tokens=budget, chunk_tokens=32).run(mixed_requests()))
    assert ours == plain
    longest = max(len(request.prompt_ids) + request.max_new_tokens for request in mixed_requests())
    assert max(watched.sizes) <= max(budget, longest), "a text that is longer than the budget is alone"
    assert (watched.most_rows == 1) == (budget == 1)
    assert budget < 10_000 or watched.most_rows > 5


def test_after_a_long_text_short_ones_are_many_again() -> None:
    short = [Request(id=i, prompt_ids=(i + 1, 2), max_new_tokens=6, params=WARM) for i in range(8)]
    long = Request(id="long", prompt_ids=(5,) * 50, max_new_tokens=6, params=WARM)
    watched = Watched()
    engine = Engine(watched, ByteTokenizer(VOCAB), num_slots=8, batch_tokens=64)
    finished(engine.run([long]))
    assert watched.most_rows == 1
    finished(engine.run(short))
    assert watched.most_rows == 8


def test_memory_that_runs_out_within_a_budget_loses_no_row() -> None:
    class Flaky(Watched):
        num_calls = 0

        def step(self, tokens, positions, slots, *, lengths=None, all_logits=False):  # type: ignore[no-untyped-def]
            self.num_calls += 1
            if self.num_calls in (5, 9):
                raise MemoryError
            return super().step(tokens, positions, slots, lengths=lengths, all_logits=all_logits)

    plain = finished(Engine(Watched(), ByteTokenizer(VOCAB)).run(mixed_requests()))
    events = list(Engine(Flaky(), ByteTokenizer(VOCAB), num_slots=8, batch_tokens=150).run(mixed_requests()))
    assert finished(events) == plain
    assert len([event for event in events if isinstance(event, Warned)]) == 2


def test_a_common_beginning_is_computed_once() -> None:
    """Ten prompts that begin with the same 40 tokens: the count of computed tokens is that of one beginning and ten ends."""
    beginning = tuple(np.random.default_rng(2).integers(0, VOCAB, 40).tolist())
    wanted = [Request(id=i, prompt_ids=(*beginning, i, i + 1, i + 2), max_new_tokens=4, params=WARM) for i in range(10)]
    for num_slots, chunk_tokens in ((1, 16), (4, 512), (10, 20)):
        watched = Watched()
        shared = finished(Engine(watched, ByteTokenizer(VOCAB), num_slots=num_slots, chunk_tokens=chunk_tokens).run(wanted))
        assert watched.num_computed == 40 + 10 * (3 + 3), "of four new tokens the last one is not fed"
        apart = Watched()
        assert finished(Engine(apart, ByteTokenizer(VOCAB), num_slots=num_slots, share_prefixes=False).run(wanted)) == shared
        assert apart.num_computed == 10 * (43 + 3)


@pytest.mark.skipif(not runnable_kernels(), reason="the native library was not built")
@pytest.mark.parametrize("kind", ["float32", "float16", "int8"])
def test_bytes_of_a_token_are_those_that_a_cache_takes(kind: Any) -> None:
    _, config, arrays = loaded("llama-head-dim")
    executor = native(config, arrays, num_slots=3, capacity=32, cache_dtype=kind)
    assert memory.cache_token_bytes(config, kind) == executor._cache.num_bytes / (3 * 32)
    torch_cache = TorchExecutor(loaded("llama-head-dim")[0])
    torch_cache.reserve(num_slots=3, capacity=32)
    assert torch_cache._cache is not None
    assert memory.cache_token_bytes(config, "float32") == torch_cache._cache.num_bytes / (3 * 32)


def test_free_memory_knows_the_limits_of_container_and_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = memory.free_bytes("cpu")
    assert free is not None
    assert 0 < free < 1 << 50
    for name, text in (("memory.max", "5000000\n"), ("memory.current", "3000000\n"), ("memory.stat", "anon 1\ninactive_file 500000\n")):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory.free_bytes("cpu") == 2_500_000
    assert memory.batch_tokens(1000, "cpu") == 1250
    (tmp_path / "memory.max").write_text("max\n")
    more = memory.free_bytes("cpu")
    assert more is not None
    assert more > 2_500_000
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (0, 0))
    assert memory.batch_tokens(1000, "cpu") == 1, "less than nothing is left, and one text is tried all the same"


def test_the_generator_takes_the_budget(tmp_path: Path) -> None:
    model = make_model(tmp_path)
    texts = []
    for budget in ("auto", 30, 1):
        generator = Generator.open(model, device="cpu", executor="torch", dtype="float32", num_slots=4, batch_tokens=budget)  # type: ignore[arg-type]
        texts.append(finished(generator.engine.run([generator.request("Once", id=i, max_new_tokens=9) for i in range(6)])))
    assert texts[0] == texts[1] == texts[2]
