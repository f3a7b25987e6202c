"""The engine against transformers' generate, against itself alone, and against its own rules."""

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from llmctl.core.errors import NonFiniteError
from llmctl.core.infer.engine import Engine
from llmctl.core.infer.events import Event, Failed, Finished, Request, TokenOut, Warned
from llmctl.core.infer.sampler import SamplingParams, sample, stream_key, uniform_at
from llmctl.core.infer.torch_executor import TorchExecutor
from tests.core.infer.tiny import ByteTokenizer, pair

FAMILIES = ("gpt2", "llama", "qwen3")
GREEDY = SamplingParams(temperature=0)
HOT = SamplingParams(temperature=1.1, top_k=60, top_p=0.95)


def prompts(count: int, seed: int = 1) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(seed)
    return [tuple(rng.integers(0, 256, int(rng.integers(1, 30))).tolist()) for _ in range(count)]


def requests(params: SamplingParams, count: int = 9, *, max_new_tokens: int = 12) -> list[Request]:
    return [
        Request(id=i, prompt_ids=ids, max_new_tokens=max_new_tokens + i % 4, params=params, seed=7) for i, ids in enumerate(prompts(count))
    ]


def texts(events: list[Event]) -> dict[int | str, tuple[int, ...]]:
    return {event.id: event.token_ids for event in events if isinstance(event, Finished)}


def engine(family: str, *, num_slots: int = 1, **options: object) -> Engine:
    return Engine(TorchExecutor(pair(family)[1].model), ByteTokenizer(), num_slots=num_slots, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers(family: str) -> None:
    theirs, _ = pair(family)
    ours = texts(list(engine(family, num_slots=4).run(requests(GREEDY))))
    for request in requests(GREEDY):
        ids = torch.tensor([request.prompt_ids])
        whole = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=request.max_new_tokens, do_sample=False, pad_token_id=0
        )
        assert ours[request.id] == tuple(whole[0, ids.shape[1] :].tolist())


def test_repetition_penalty_equals_transformers() -> None:
    theirs, _ = pair("llama")
    wanted = requests(SamplingParams(temperature=0, repetition_penalty=1.7), 4)
    ours = texts(list(engine("llama").run(wanted)))
    for request in wanted:
        ids = torch.tensor([request.prompt_ids])
        whole = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=request.max_new_tokens,
            do_sample=False,
            pad_token_id=0,
            repetition_penalty=1.7,
        )
        assert ours[request.id] == tuple(whole[0, ids.shape[1] :].tolist())


def test_sampling_equals_a_naive_loop_over_the_whole_text() -> None:
    """No cache, no slots: the model of transformers, the sampler, and the uniforms by their definition."""
    theirs, _ = pair("qwen3")
    wanted = requests(HOT, 3)
    ours = texts(list(engine("qwen3", num_slots=2).run(wanted)))
    for request in wanted:
        ids = list(request.prompt_ids)
        for index in range(request.max_new_tokens):
            with torch.no_grad():
                logits = theirs(torch.tensor([ids])).logits[0, -1].numpy()
            ids.append(sample(logits, HOT, uniform_at(7, stream_key(request.id), index)))
        assert ours[request.id] == tuple(ids[len(request.prompt_ids) :])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("params", [GREEDY, HOT], ids=["greedy", "sampled"])
def test_a_text_does_not_depend_on_its_companions(family: str, params: SamplingParams) -> None:
    alone = {}
    for request in requests(params):
        alone |= texts(list(engine(family).run([request])))
    for num_slots, chunk_tokens in itertools.product((1, 3, 8), (5, 512)):
        assert texts(list(engine(family, num_slots=num_slots, chunk_tokens=chunk_tokens).run(requests(params)))) == alone
    assert texts(list(engine(family, num_slots=3).run(reversed(requests(params))))) == alone
    assert texts(list(engine(family, num_slots=3, share_prefixes=False).run(requests(params)))) == alone


def test_shared_beginnings_change_nothing_and_are_fed_once() -> None:
    fed: list[int] = []

    class Counting(TorchExecutor):
        def step(self, tokens, positions, slots, *, lengths=None, all_logits=False):  # type: ignore[no-untyped-def]
            fed.append(tokens.size)
            return super().step(tokens, positions, slots, lengths=lengths, all_logits=all_logits)

    common = prompts(1)[0] * 3
    wanted = [Request(id=i, prompt_ids=(*common, i), max_new_tokens=6, params=HOT) for i in range(6)]
    wanted += [Request(id="same", sample_index=s, prompt_ids=common, max_new_tokens=6, params=HOT) for s in range(3)]
    model = pair("llama")[1].model
    results = []
    for share in (False, True):
        fed.clear()
        events = list(Engine(Counting(model), ByteTokenizer(), num_slots=4, share_prefixes=share).run(wanted))
        results.append({(e.id, e.sample_index): e.token_ids for e in events if isinstance(e, Finished)})
        num_fed = sum(fed) - 9 * 5
        assert num_fed >= 9 * len(common) if not share else num_fed < 2 * len(common) + 9 * 3
    assert results[0] == results[1]
    assert len({results[0]["same", s] for s in range(3)}) == 3, "samples of one prompt differ"


def test_events_tell_the_whole_story() -> None:
    events = list(engine("gpt2", num_slots=3).run(requests(HOT)))
    for request in requests(HOT):
        tokens = [e for e in events if isinstance(e, TokenOut) and e.id == request.id]
        (done,) = [e for e in events if isinstance(e, Finished) and e.id == request.id]
        assert [e.token_index for e in tokens] == list(range(done.num_new_tokens))
        assert tuple(e.token_id for e in tokens) == done.token_ids
        assert done.text.startswith("".join(e.text for e in tokens))
        assert done.text == bytes(done.token_ids).decode("utf-8", "replace")
        assert (done.finish, done.num_prompt_tokens, done.seed) == ("length", len(request.prompt_ids), 7)
        assert events.index(done) > events.index(tokens[-1])


def test_eos_ends_a_text_and_is_no_part_of_it() -> None:
    request = requests(GREEDY)[0]
    (free,) = texts(list(engine("llama").run([request]))).values()
    eos = free[5]
    (done,) = [e for e in engine("llama", eos_ids=(eos, 300)).run([request]) if isinstance(e, Finished)]
    cut = free.index(eos)
    assert done.finish == "eos"
    assert done.token_ids == free[: cut + 1]
    assert done.text == bytes(free[:cut]).decode("utf-8", "replace")


def test_stop_strings_span_tokens_and_release_the_slot() -> None:
    request = requests(GREEDY)[1]
    (free,) = [e for e in engine("llama").run([request]) if isinstance(e, Finished)]
    stop = free.text[2:5]
    wanted = [
        Request(id=1, prompt_ids=request.prompt_ids, max_new_tokens=12, params=GREEDY, stop=("never seen", stop)),
        requests(GREEDY)[2],
    ]
    events = list(engine("llama").run(wanted))
    done = [e for e in events if isinstance(e, Finished)]
    assert (done[0].text, done[0].finish, done[0].stop) == (free.text[: free.text.index(stop)], "stop", stop)
    assert done[0].num_new_tokens < free.num_new_tokens
    assert done[1].finish == "length"


def test_special_tokens_are_no_text() -> None:
    request = requests(GREEDY)[0]
    (free,) = texts(list(engine("llama").run([request]))).values()
    special = Engine(TorchExecutor(pair("llama")[1].model), ByteTokenizer(special_ids=frozenset(free[:4])))
    (done,) = [e for e in special.run([request]) if isinstance(e, Finished)]
    assert done.token_ids == free
    assert done.text == bytes(t for t in free if t not in free[:4]).decode("utf-8", "replace")


def test_ids_that_the_tokenizer_lacks_are_never_chosen() -> None:
    short = Engine(TorchExecutor(pair("gpt2")[1].model), ByteTokenizer(vocab_size=40))
    wanted = [Request(id=0, prompt_ids=(1, 2), max_new_tokens=60, params=SamplingParams(temperature=3.0))]
    (ids,) = texts(list(short.run(wanted))).values()
    assert max(ids) < 40


@pytest.mark.parametrize(
    ("prompt_ids", "max_new_tokens", "words"),
    [((), 5, "empty"), ((1,) * 120, 9, "120 prompt tokens and 9 new ones exceed the model's context of 128"), ((1, 256), 5, "lacks")],
)
def test_a_bad_request_fails_alone(prompt_ids: tuple[int, ...], max_new_tokens: int, words: str) -> None:
    bad = Request(id="bad", prompt_ids=prompt_ids, max_new_tokens=max_new_tokens)
    passed_on = Failed(id="earlier", sample_index=0, error="no JSON")
    events = list(engine("gpt2").run([passed_on, bad, requests(GREEDY)[0]]))
    failed = [e for e in events if isinstance(e, Failed)]
    assert failed[0] == passed_on
    assert failed[1].id == "bad"
    assert words in failed[1].error
    assert len(texts(events)) == 1


def test_the_context_can_be_filled_to_the_last_place() -> None:
    request = Request(id=0, prompt_ids=(1,) * 120, max_new_tokens=8, params=GREEDY)
    (ids,) = texts(list(engine("gpt2").run([request]))).values()
    assert len(ids) == 8


def test_requests_are_read_only_when_a_slot_is_free() -> None:
    taken: list[int] = []

    def endless() -> Iterator[Request | None]:
        for i in itertools.count():
            taken.append(i)
            yield None if i % 3 == 1 else Request(id=i, prompt_ids=(i % 256, 5), max_new_tokens=4, params=GREEDY)

    done = 0
    for event in engine("gpt2", num_slots=2).run(endless()):
        if isinstance(event, Finished):
            done += 1
            assert len(taken) <= 2 * (done + 2)
        if done == 10:
            break


def test_stopping_closes_what_is_under_way() -> None:
    asked = iter(range(100))
    events = list(engine("gpt2", num_slots=2).run(requests(GREEDY), stop=lambda: 15 if next(asked) > 4 else None))
    done = [e for e in events if isinstance(e, Finished)]
    assert [e.finish for e in done] == ["interrupted", "interrupted"]
    assert all(0 < e.num_new_tokens < 12 and e.text for e in done)


def test_nan_is_named_with_its_item_and_token() -> None:
    class Broken(TorchExecutor):
        calls = 0

        def step(self, tokens, positions, slots, *, lengths=None, all_logits=False):  # type: ignore[no-untyped-def]
            logits = super().step(tokens, positions, slots, lengths=lengths, all_logits=all_logits)
            self.calls += 1
            return logits * np.float32(np.nan) if self.calls == 4 else logits

    broken = Engine(Broken(pair("gpt2")[1].model), ByteTokenizer())
    with pytest.raises(NonFiniteError, match="token 3 of item 0"):
        list(broken.run(requests(HOT)))


class Cramped(TorchExecutor):
    """Has room for so many slots only."""

    room = 2

    def reserve(self, *, num_slots: int, capacity: int) -> None:
        if num_slots > self.room:
            raise MemoryError
        super().reserve(num_slots=num_slots, capacity=capacity)


def test_short_memory_halves_the_batch_and_changes_no_text() -> None:
    events = list(Engine(Cramped(pair("qwen3")[1].model), ByteTokenizer(), num_slots=8).run(requests(HOT)))
    assert [e.message for e in events if isinstance(e, Warned)] == [
        "not enough memory for 8 texts at once; going on with 4",
        "not enough memory for 4 texts at once; going on with 2",
    ]
    assert texts(events) == texts(list(engine("qwen3").run(requests(HOT))))


def test_memory_that_runs_out_in_a_step_changes_no_text() -> None:
    class Flaky(TorchExecutor):
        calls = 0

        def step(self, tokens, positions, slots, *, lengths=None, all_logits=False):  # type: ignore[no-untyped-def]
            self.calls += 1
            if self.calls == 9:
                raise MemoryError
            return super().step(tokens, positions, slots, lengths=lengths, all_logits=all_logits)

    events = list(Engine(Flaky(pair("qwen3")[1].model), ByteTokenizer(), num_slots=4).run(requests(HOT)))
    assert texts(events) == texts(list(engine("qwen3").run(requests(HOT))))
    indices = [e.token_index for e in events if isinstance(e, TokenOut) and e.id == 0]
    assert indices == list(range(len(indices))), "no token is told twice"


def test_no_memory_for_a_single_text_fails_it_and_goes_on() -> None:
    class Tiny(TorchExecutor):
        def reserve(self, *, num_slots: int, capacity: int) -> None:
            if capacity > 50:
                raise MemoryError
            super().reserve(num_slots=num_slots, capacity=capacity)

    big = Request(id="big", prompt_ids=(1,) * 60, max_new_tokens=5)
    events = list(Engine(Tiny(pair("gpt2")[1].model), ByteTokenizer()).run([requests(GREEDY)[0], big, requests(GREEDY)[1]]))
    assert [e.id for e in events if isinstance(e, Finished)] == [0, 1]
    assert [e.error for e in events if isinstance(e, Failed)] == ["out of memory for one text of 60 prompt tokens and up to 5 new ones"]


def test_an_engine_can_run_again_and_reuses_the_conversation() -> None:
    once = engine("llama")
    first = requests(HOT)[3]
    (answer,) = texts(list(once.run([first]))).values()
    longer = Request(id=9, prompt_ids=(*first.prompt_ids, *answer, 3, 4), max_new_tokens=10, params=HOT)
    assert texts(list(once.run([longer]))) == texts(list(engine("llama").run([longer])))
