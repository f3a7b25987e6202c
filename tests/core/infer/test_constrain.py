"""Structured answers: against Python's re and json, jsonschema, a brute force over the choices, and a naive masked loop."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import tokenizers
import torch

from llmctl.core.errors import InputError
from llmctl.core.infer.constrain import Constrainer, Constraint, DeadEndError
from llmctl.core.infer.engine import Engine
from llmctl.core.infer.events import Event, Failed, Finished, Request
from llmctl.core.infer.generator import Generator
from llmctl.core.infer.sampler import SamplingParams, sample, stream_key, uniform_at
from llmctl.core.infer.torch_executor import TorchExecutor
from tests.cli.tiny_model import make_model
from tests.core.native.models import library_is_built

pytest.importorskip("llguidance")

EXECUTORS = [pytest.param("native", marks=pytest.mark.skipif(not library_is_built(), reason="not built")), "torch"]
GREEDY, HOT = SamplingParams(temperature=0), SamplingParams(temperature=1.5, top_p=0.98)
PENALISED = SamplingParams(temperature=1.0, repetition_penalty=1.4, frequency_penalty=0.3)

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "bc", "def"]}, "maxItems": 3},
        "mood": {"anyOf": [{"const": "good"}, {"type": "null"}, {"type": "boolean"}]},
    },
    "required": ["name", "age", "mood"],
    "additionalProperties": False,
}
POINT = {
    "type": "array",
    "prefixItems": [{"type": "number", "minimum": -9, "maximum": 9}] * 2,
    "minItems": 2,
    "maxItems": 2,
    "items": False,
}
CODE = r"[A-Z]{2}-[0-9]{3}(x|yz)?"
CHOICES = ["yes", "no", 'say "no"', "new\nline", "naïve 😀", "yes, but", "back\\slash"]
BRACKETS = 'root ::= "[" item ("," item){0,2} "]"\nitem ::= [0-9] | "<" [a-c]{1,2} ">"'


def follows(constraint: Constraint, text: str) -> bool:
    """Whether a text is what was asked for, judged by others."""
    if constraint.kind == "json_schema":
        jsonschema.validate(json.loads(text), json.loads(constraint.text))
        return True
    if constraint.kind == "choice":
        return text in CHOICES
    expression = {CODE: CODE, BRACKETS: r"\[([0-9]|<[a-c]{1,2}>)(,([0-9]|<[a-c]{1,2}>)){0,2}\]"}.get(constraint.text)
    return re.fullmatch(str(expression), text) is not None


CONSTRAINTS = {
    "person": Constraint.of("json_schema", PERSON),
    "point": Constraint.of("json_schema", POINT),
    "code": Constraint.of("regex", CODE),
    "choice": Constraint.of("choice", CHOICES),
    "brackets": Constraint.of("grammar", BRACKETS),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), context=512)


def opened(model: Path, executor: Any, **options: Any) -> Generator:
    return Generator.open(model, executor=executor, device="cpu", dtype="float32", threads=1, **options)


def wanted(generator: Generator, params: SamplingParams, **more: Any) -> list[Request]:
    """For each constraint two requests, between others that have none."""
    prompt = generator.prompter.from_text("Once upon", max_new_tokens=300)
    common = {"seed": 5, "stop": (), "params": params}
    requests = [
        generator.request_for(prompt, id=name, sample_index=index, constraint=constraint, **{**common, **more})
        for name, constraint in CONSTRAINTS.items()
        for index in range(2)
    ]
    free = generator.prompter.from_text("Free", max_new_tokens=20)
    return [generator.request_for(free, id="free", sample_index=9, **common), *requests]


def by_key(events: list[Event]) -> dict[tuple[int | str, int], Finished]:
    assert not [event for event in events if isinstance(event, Failed)]
    return {(event.id, event.sample_index): event for event in events if isinstance(event, Finished)}


@pytest.mark.parametrize("params", [GREEDY, HOT, PENALISED], ids=["greedy", "hot", "penalised"])
@pytest.mark.parametrize("executor", EXECUTORS)
def test_answers_are_whole_and_right_in_any_batch_and_with_guessing(executor: str, params: SamplingParams, model: Path) -> None:
    alone = opened(model, executor, speculate="off")
    plain = {key: event for request in wanted(alone, params) for key, event in by_key(list(alone.engine.run([request]))).items()}
    for (name, _), event in plain.items():
        if name != "free":
            assert event.finish == "eos", event
            assert follows(CONSTRAINTS[str(name)], event.text), event.text
    for num_slots, speculate in ((3, "off"), (8, 4), (8, "auto"), (1, 7)):
        several = opened(model, executor, num_slots=num_slots, speculate=speculate)
        ours = by_key(list(several.engine.run(wanted(several, params))))
        assert {key: (event.token_ids, event.text) for key, event in ours.items()} == {
            key: (event.token_ids, event.text) for key, event in plain.items()
        }
    assert len({event.text for event in plain.values()}) > (5 if params is GREEDY else 8)


def test_what_the_grammar_forces_is_guessed(model: Path) -> None:
    generator = opened(model, "torch", speculate=6)
    (request,) = [r for r in wanted(generator, HOT) if (r.id, r.sample_index) == ("person", 0)]
    list(generator.engine.run([request]))
    speculator = generator.engine.speculator
    assert speculator is not None
    assert speculator.num_accepted >= len('{"name": "') + len(', "age": ') - 4


def tokenizer_with_merges() -> tokenizers.Tokenizer:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merged = ["ye", "yes", "no", "ne", "new", "sa", "say"]
    vocab = {token: i for i, token in enumerate([*alphabet, *merged])}
    merges = [("y", "e"), ("ye", "s"), ("n", "o"), ("n", "e"), ("ne", "w"), ("s", "a"), ("sa", "y")]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>", "<|turn|>"])
    return backend


def token_bytes(backend: tokenizers.Tokenizer) -> list[bytes]:
    """What each ordinary id stands for."""
    from llmctl.core.tokenizer.byte_level import token_to_bytes

    size = backend.get_vocab_size(with_added_tokens=False)
    return [token_to_bytes(str(backend.id_to_token(i))) for i in range(size)]


def test_masks_are_those_of_a_brute_force_over_the_choices() -> None:
    backend = tokenizer_with_merges()
    pieces, num_choices = token_bytes(backend), backend.get_vocab_size()
    ends = [backend.token_to_id("<|end|>"), backend.token_to_id("<|turn|>")]
    constrainer = Constrainer(backend.to_str, num_choices=num_choices, eos_ids=frozenset(ends))
    goals = [choice.encode() for choice in CHOICES]
    rng = np.random.default_rng(0)

    def agrees(mask: np.ndarray, said: bytes) -> bool:
        """Equal to what can go on to a choice; where only one choice is left, the usual tokens of its rest are enough."""
        left = [goal for goal in goals if goal.startswith(said)]
        expected = np.zeros(num_choices, dtype=bool)
        expected[: len(pieces)] = [any(goal.startswith(said + piece) for goal in left) for piece in pieces]
        expected[ends] = said in left
        if len(left) == 1:
            return bool(mask.any() and (expected | ~mask).all())
        return bool((mask == expected).all())

    for _ in range(30):
        text, said = constrainer.start(Constraint.of("choice", CHOICES)), b""
        while not text.is_complete:
            (mask,) = text.masks([])
            assert agrees(mask, said)
            token = int(rng.choice(np.flatnonzero(mask[: len(pieces)])))
            assert text.num_valid([token, ends[0]]) == 1
            now, later = text.masks([token])
            assert (now == mask).all()
            said += pieces[token]
            assert agrees(later, said)
            text.take(token)
        assert said in goals


def test_choosing_under_a_mask_equals_a_naive_loop(model: Path) -> None:
    """No cache and no grammar: the model of transformers over the whole text, and the choices tried one by one."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(model).eval()
    generator = opened(model, "torch")
    pieces = token_bytes(tokenizers.Tokenizer.from_file(str(model / "tokenizer.json")))
    goals = [choice.encode() for choice in CHOICES]
    prompt = generator.prompter.from_text("Once upon", max_new_tokens=40)
    for index in range(4):
        constraint = Constraint.of("choice", CHOICES)
        request = generator.request_for(prompt, id="a", sample_index=index, seed=3, stop=(), params=HOT, constraint=constraint)
        (done,) = by_key(list(generator.engine.run([request]))).values()
        ids, said = list(prompt.ids), b""
        for place in range(40):
            with torch.no_grad():
                logits = theirs(torch.tensor([ids])).logits[0, -1].numpy().copy()
            allowed = [any(goal.startswith(said + piece) for goal in goals) for piece in pieces]
            logits[: len(pieces)][np.logical_not(allowed)] = -np.inf
            logits[len(pieces) :] = -np.inf
            if said in goals:
                logits[256] = theirs(torch.tensor([ids])).logits[0, -1, 256].item()
            token = sample(logits, HOT, uniform_at(3, stream_key("a", index), place))
            ids.append(token)
            if token == 256:
                break
            said += pieces[token]
            if said in goals and not any(goal != said and goal.startswith(said) for goal in goals):
                break
        assert done.token_ids == tuple(ids[len(prompt.ids) :])
        assert done.text.encode() == said


def test_limits_stops_and_end_tokens(model: Path) -> None:
    generator = opened(model, "torch", num_slots=4)
    requests = wanted(generator, HOT)
    whole = by_key(list(generator.engine.run(requests)))

    def run(**more: Any) -> dict[tuple[int | str, int], Finished]:
        return by_key(list(generator.engine.run(wanted(generator, HOT, **more))))

    stopped = run(stop=('"',))["person", 0]
    assert (stopped.finish, stopped.text) == ("stop", "{")
    short = generator.prompter.from_text("Once upon", max_new_tokens=5)
    cut = generator.request_for(short, id="person", sample_index=0, seed=5, stop=(), params=HOT, constraint=CONSTRAINTS["person"])
    (done,) = by_key(list(generator.engine.run([cut]))).values()
    assert (done.finish, done.text) == ("length", whole["person", 0].text[:5])
    for (name, _), event in run(min_new_tokens=200).items():
        if name != "free":  # an answer that can go no further ends all the same
            assert follows(CONSTRAINTS[str(name)], event.text)
    endless = run(ignore_eos=True)
    assert all(event.finish in ("eos", "length") for event in endless.values())
    assert endless["choice", 0].text in CHOICES


def test_a_model_without_an_end_token_ends_when_nothing_can_follow(model: Path) -> None:
    generator = opened(model, "torch")
    words = generator.tokenizer
    constrainer = Constrainer(words.to_json, num_choices=words.vocab_size, eos_ids=())
    assert isinstance(generator.executor, TorchExecutor)
    engine = Engine(generator.executor, words, constrainer=constrainer)
    done = by_key(list(engine.run(wanted(generator, HOT)[1:])))
    assert all(follows(CONSTRAINTS[str(name)], event.text) for (name, _), event in done.items())


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [
        ("json_schema", {"type": "nope"}, "json_schema: Invalid type: nope"),
        ("json_schema", "{", "not JSON"),
        ("json_schema", {"not": {"type": "string"}}, "Unimplemented keys"),
        ("json_schema", 5, "an object or a string"),
        ("regex", "a(", "unclosed group"),
        ("regex", "(?=x)a", "look-around"),
        ("choice", [], "a list of strings"),
        ("choice", "yes", "a list of strings"),
        ("choice", ["a", ""], "a list of strings"),
        ("grammar", 'start: "a" | b', "unknown name"),
        ("grammar", "root ::= (", "grammar: "),
        ("grammar", "gibberish !!", "lexer error"),
    ],
)
def test_what_is_malformed_is_told_in_one_line(kind: Any, value: Any, words: str, model: Path) -> None:
    constrainer = opened(model, "torch").constrainer
    with pytest.raises(InputError) as caught:
        constrainer.start(Constraint.of(kind, value))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 350


def test_a_text_that_cannot_go_on_fails_alone(model: Path) -> None:
    generator = opened(model, "torch", num_slots=3)
    requests = wanted(generator, GREEDY)
    start = generator.constrainer.start

    class Stuck:
        """A state that forbids everything after three tokens."""

        def __init__(self, constraint: Constraint) -> None:
            self._real, self._num_taken = start(constraint), 0

        is_complete = False

        def take(self, token: int) -> None:
            self._num_taken += 1
            self._real.take(token)

        def masks(self, drafts: Any) -> Any:
            masks = self._real.masks(drafts)
            return [mask & (self._num_taken < 3) for mask in masks]

    generator.constrainer.start = lambda constraint: Stuck(constraint) if constraint.kind == "regex" else start(constraint)  # type: ignore[method-assign,assignment,return-value]
    events = list(generator.engine.run(requests))
    failed = [event for event in events if isinstance(event, Failed)]
    assert {event.id for event in failed} == {"code"}
    assert all("cannot be continued after 3 tokens: no token of the model can go on here" in event.error for event in failed)
    assert len([event for event in events if isinstance(event, Finished)]) == len(requests) - 2
    with pytest.raises(DeadEndError):
        start(CONSTRAINTS["code"]).take(5)
