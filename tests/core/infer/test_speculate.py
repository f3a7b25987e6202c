"""Speculation against plain decoding, its choice of lengths against trying all, its matches against a search through the text."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.core.infer.draft_model import DraftModel
from llmctl.core.infer.engine import Engine
from llmctl.core.infer.events import Event, Finished, Request, TokenOut, Warned
from llmctl.core.infer.sampler import SamplingParams
from llmctl.core.infer.sequence import TextUnderWay
from llmctl.core.infer.speculate import PromptLookup, Speculator, draft_lengths
from llmctl.core.infer.torch_executor import TorchExecutor
from tests.core.infer.engines import KINDS, engine_of, executor_of, finished, repeating_prompts, requests_of
from tests.core.infer.tiny import ByteTokenizer
from tests.core.model.families import VOCAB
from tests.core.native.models import loaded, runnable_kernels

GREEDY = SamplingParams(temperature=0)
PENALISED = SamplingParams(temperature=0, repetition_penalty=1.3, presence_penalty=0.2, frequency_penalty=0.1)
WARM = SamplingParams(temperature=0.3, top_k=20, top_p=0.9)
HOT = SamplingParams(temperature=1.2, min_p=0.02, frequency_penalty=0.4)
CHOICES = {"greedy": GREEDY, "penalised": PENALISED, "warm": WARM, "hot": HOT}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stop strings": {"stop": ("\x11", "A", "\x05\x06")},
    "logprobs": {"num_logprobs": 2, "min_new_tokens": 9},
    "no end": {"ignore_eos": True},
}
EOS = (7, 50)


def kinds() -> list[str]:
    return [kind for kind in KINDS if kind == "torch" or runnable_kernels()]


def lookup(num_tokens: int | None) -> Speculator:
    return Speculator(PromptLookup(), token_cost=0.1, num_tokens=num_tokens)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.floats(0.01, 1), max_size=3), min_size=1, max_size=3),
    st.sampled_from([0.02, 0.1, 0.5]),
    st.sampled_from([0.0, 0.2]),
)
def test_lengths_give_the_most_tokens_a_time(rows: list[list[float]], token_cost: float, draft_cost: float) -> None:
    chances = [np.minimum.accumulate(row).tolist() if row else [] for row in rows]

    def rate(lengths: tuple[int, ...]) -> float:
        tokens = len(rows) + sum(sum(row[:length]) for row, length in zip(chances, lengths, strict=True))
        return float(tokens / (1 + (len(rows) - 1 + sum(lengths)) * token_cost + sum(lengths) * draft_cost))

    best = max(rate(lengths) for lengths in itertools.product(*(range(len(row) + 1) for row in chances)))
    ours = draft_lengths(chances, token_cost=token_cost, draft_cost=draft_cost)
    assert rate(tuple(ours)) == pytest.approx(best)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=30), st.lists(st.integers(0, 2), max_size=12))
def test_drafts_are_what_followed_the_longest_match(prompt: list[int], answer: list[int]) -> None:
    text = TextUnderWay(Request(id=0, prompt_ids=tuple(prompt), max_new_tokens=100), ByteTokenizer(), eos_ids=())
    drafter = PromptLookup()
    for token in [*answer, None]:
        chances = drafter.chances(text, 5)
        tokens = text.tokens
        matches = []  # (length, end) of all places where the last two tokens stood before
        for end in range(1, len(tokens) - 1):
            length = 0
            while length < 16 and length <= end and tokens[end - length] == tokens[len(tokens) - 1 - length]:
                length += 1
            if length >= 2:
                matches.append((length, end))
        recent = sorted(matches, key=lambda match: match[1])[-8:]
        assert bool(chances) == bool(matches)
        if recent:
            _, end = max(recent)
            repeated = list(tokens)
            for place in range(end + 1, end + 6):
                repeated.append(repeated[place])
            assert drafter.drafts([(0, text)], [5]) == [repeated[len(tokens) :]]
            assert all(later <= earlier for earlier, later in itertools.pairwise(chances))
        if token is not None:
            text.tokens.append(token)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("kind", kinds())
def test_guessing_changes_no_text(kind: str, choice: str, way: str) -> None:
    """The whole result is equal, log-probabilities to the bit on the native executor: drafts and companions leave no trace."""
    wanted = requests_of(CHOICES[choice], repeating_prompts(9), **WAYS[way])
    plain = finished(engine_of("llama-gqa-tied", kind, eos_ids=EOS).run(wanted))
    sizes = [(3, 1), (8, None), (1, 4), (1, None), (8, 7)]
    for num_slots, num_tokens in sizes if kind != "torch" else sizes[:2]:  # a step of torch takes ten times as long
        speculator = lookup(num_tokens)
        engine = engine_of("llama-gqa-tied", kind, eos_ids=EOS, num_slots=num_slots, speculator=speculator, chunk_tokens=13)
        ours = finished(engine.run(wanted))
        if kind != "torch":
            assert ours == plain
        else:
            assert {key: (e.token_ids, e.text, e.finish, e.stop) for key, e in ours.items()} == {
                key: (e.token_ids, e.text, e.finish, e.stop) for key, e in plain.items()
            }
        assert speculator.num_drafted > 0 or choice == "hot"
        assert 0 <= speculator.num_accepted <= speculator.num_drafted


@pytest.mark.parametrize("kind", kinds())
@pytest.mark.parametrize("choice", CHOICES)
def test_a_draft_model_changes_no_text(kind: str, choice: str) -> None:
    wanted = requests_of(CHOICES[choice], repeating_prompts(7), stop=("\x11",))
    plain = finished(engine_of("llama-gqa-tied", kind, eos_ids=EOS).run(wanted))
    for num_slots, num_tokens, draft in ((1, 3, "llama-mha"), (3, None, "gpt2-tied"), (8, 5, "llama-gqa-tied")):
        speculator = Speculator(
            DraftModel(executor_of(draft, kind), relative_cost=0.2, num_choices=VOCAB), token_cost=0.05, num_tokens=num_tokens
        )
        engine = engine_of("llama-gqa-tied", kind, eos_ids=EOS, num_slots=num_slots, speculator=speculator)
        assert {key: event.token_ids for key, event in finished(engine.run(wanted)).items()} == {
            key: event.token_ids for key, event in plain.items()
        }


@pytest.mark.parametrize("choice", CHOICES)
def test_the_same_model_guesses_everything_right(choice: str) -> None:
    """The draft is made with the uniform number that the target draws with, so that chance itself agrees."""
    speculator = Speculator(
        DraftModel(executor_of("llama-gqa-tied", "torch"), relative_cost=0.2, num_choices=VOCAB), token_cost=0.05, num_tokens=4
    )
    wanted = requests_of(CHOICES[choice], repeating_prompts(5, longest=30), max_new_tokens=20)
    engine = engine_of("llama-gqa-tied", "torch", num_slots=2, speculator=speculator)
    finished(engine.run(wanted))
    assert speculator.num_drafted == speculator.num_accepted > 5 * 12


class Counting(TorchExecutor):
    """Counts its calls."""

    num_calls = 0

    def step(self, tokens, positions, slots, *, lengths=None, all_logits=False):  # type: ignore[no-untyped-def]
        self.num_calls += 1
        return super().step(tokens, positions, slots, lengths=lengths, all_logits=all_logits)


def test_what_repeats_itself_takes_fewer_calls() -> None:
    model = loaded("llama-gqa-tied")[0]
    (request,) = requests_of(GREEDY, [(5, 6, 7, 8)], max_new_tokens=58)
    plain = Counting(model)
    (text,) = finished(Engine(plain, ByteTokenizer(VOCAB)).run([request])).values()
    assert len(set(text.token_ids[-20:])) < 15, "a greedy text of a small model goes round in circles"
    ahead = Counting(model)
    speculator = lookup(None)
    assert finished(Engine(ahead, ByteTokenizer(VOCAB), speculator=speculator).run([request]))[0, 0] == text
    assert ahead.num_calls == plain.num_calls - speculator.num_accepted
    assert ahead.num_calls < 0.7 * plain.num_calls


def test_what_does_not_come_true_is_given_up() -> None:
    """A text of random tokens over few ids: the pairs stand there before, and nothing follows from it."""
    drafter = PromptLookup()
    speculator = Speculator(drafter, token_cost=0.1)
    rng = np.random.default_rng(0)
    text = TextUnderWay(Request(id=0, prompt_ids=(1, 2), max_new_tokens=5000), ByteTokenizer(), eos_ids=())
    drafted = []
    for _ in range(3000):
        (drafts,) = speculator.drafts([(0, text)])
        chosen = int(rng.integers(0, 40))
        if drafts:
            speculator.note(text, len(drafts), int(drafts[0] == chosen))
        drafted.append(len(drafts))
        text.tokens.append(chosen)
    assert sum(drafted[:400]) > 10
    assert np.mean(drafted[-1000:]) < 0.15


def test_events_come_token_by_token() -> None:
    wanted = requests_of(WARM, repeating_prompts(4))
    events = list(engine_of("llama-gqa-tied", "torch", num_slots=2, speculator=lookup(6)).run(wanted))
    for request in wanted:
        (done,) = [e for e in events if isinstance(e, Finished) and e.id == request.id]
        tokens = [e for e in events if isinstance(e, TokenOut) and e.id == request.id]
        assert [e.token_index for e in tokens] == list(range(done.num_new_tokens))
        assert tuple(e.token_id for e in tokens) == done.token_ids


def test_short_memory_changes_no_text() -> None:
    class Flaky(TorchExecutor):
        num_calls = 0

        def step(self, tokens, positions, slots, *, lengths=None, all_logits=False):  # type: ignore[no-untyped-def]
            self.num_calls += 1
            if self.num_calls in (6, 11):
                raise MemoryError
            return super().step(tokens, positions, slots, lengths=lengths, all_logits=all_logits)

    wanted = requests_of(WARM, repeating_prompts(6))
    plain = finished(engine_of("llama-gqa-tied", "torch").run(wanted))

    def messages(events: list[Event]) -> list[str]:
        return [event.message for event in events if isinstance(event, Warned)]

    model = loaded("llama-gqa-tied")[0]
    events = list(Engine(Flaky(model), ByteTokenizer(VOCAB), num_slots=4, speculator=lookup(5)).run(wanted))
    assert finished(events) == plain
    assert len(messages(events)) == 2

    speculator = Speculator(DraftModel(Flaky(model), relative_cost=0.1, num_choices=VOCAB), token_cost=0.1, num_tokens=3)
    events = list(Engine(TorchExecutor(model), ByteTokenizer(VOCAB), num_slots=4, speculator=speculator).run(wanted))
    assert finished(events) == plain
    assert messages(events) == ["not enough memory for the draft model; going on without it"]


def test_a_text_beyond_the_draft_models_context_goes_on_alone() -> None:
    short = TorchExecutor(loaded("llama-gqa-tied")[0])
    wanted = [Request(id=0, prompt_ids=(3,) * 40, max_new_tokens=24, params=WARM, seed=2)]
    plain = finished(engine_of("llama-mha", "torch").run(wanted))

    class Short(TorchExecutor):
        @property
        def max_positions(self) -> int:
            return 50

    short = Short(loaded("llama-gqa-tied")[0])
    speculator = Speculator(DraftModel(short, relative_cost=0.1, num_choices=VOCAB), token_cost=0.1, num_tokens=3)
    assert finished(engine_of("llama-mha", "torch", speculator=speculator).run(wanted)) == plain
    assert 0 < speculator.num_drafted <= 40
