"""A talk: what the model reads of it, what it keeps of what it read, and that a stored talk goes on as an unbroken one."""

from pathlib import Path
from typing import Any

import pytest

from llmctl.core.errors import InputError, LockedError, NotFoundError, UsageError
from llmctl.core.infer.events import Event, Finished, TokenOut, Warned
from llmctl.core.infer.generator import Generator
from llmctl.core.infer.sampler import SamplingParams
from llmctl.core.infer.talk import Talk, TalkSettings, Turn, grown_text
from llmctl.core.infer.transcript import StoredTalk, Transcript, read_talk, save_talk
from tests.cli.tiny_model import TEMPLATE, make_model

SETTINGS = TalkSettings(params=SamplingParams(temperature=0.9), seed=5, max_new_tokens=12)
GREEDY = TalkSettings(params=SamplingParams(temperature=0.0), seed=0, max_new_tokens=12)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("chat"), template=TEMPLATE)


@pytest.fixture(scope="module")
def raw_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("raw"))


def opened(path: Path) -> Generator:
    return Generator.open(path, dtype="float32", threads=1)


def answered(talk: Talk, message: str) -> Finished:
    talk.say(message)
    (done,) = [event for event in talk.answer() if isinstance(event, Finished)]
    assert talk.turns[-1].answer == done.text
    return done


def alone(path: Path, messages: list[dict[str, str]], *, number: int, retry: int = 0) -> str:
    """The answer of a fresh engine that reads the whole talk at once."""
    generator = opened(path)
    prompt = generator.prompter.from_messages(messages, max_new_tokens=12)
    request = generator.request_for(prompt, id=number, sample_index=retry, seed=5, stop=(), params=SETTINGS.params)
    (done,) = [event for event in generator.engine.run([request]) if isinstance(event, Finished)]
    return done.text


def test_each_answer_is_that_of_a_model_that_reads_the_whole_talk(chat_model: Path) -> None:
    talk = Talk(opened(chat_model), SETTINGS, system="Be brief.")
    messages = [{"role": "system", "content": "Be brief."}]
    for number, text in enumerate(("Hello", "Why?", "And then?"), start=1):
        messages.append({"role": "user", "content": text})
        assert answered(talk, text).text == alone(chat_model, messages, number=number)
        messages.append({"role": "assistant", "content": talk.turns[-1].answer or ""})
    assert talk.retry()
    retried = next(event for event in talk.answer() if isinstance(event, Finished)).text
    assert retried == alone(chat_model, messages[:-1], number=3, retry=1) != messages[-1]["content"]


def test_a_turn_feeds_its_own_tokens_only(chat_model: Path) -> None:
    generator = opened(chat_model)
    fed: list[int] = []
    step = generator.executor.step

    def counting(tokens: Any, positions: Any, slots: Any, **more: Any) -> Any:
        fed.append(tokens.size)
        return step(tokens, positions, slots, **more)

    object.__setattr__(generator.executor, "step", counting)
    talk = Talk(generator, GREEDY)
    first = answered(talk, "A long message, so that reading it again would be seen." * 2)
    fed.clear()
    second = answered(talk, "More")
    assert second.num_prompt_tokens > first.num_prompt_tokens + 10
    # the end of the answer, the template's words around a message, and the message: no more than that
    assert sum(fed) - (second.num_new_tokens - 1) <= second.num_prompt_tokens - first.num_prompt_tokens


def test_without_a_template_the_talk_is_one_text(raw_model: Path) -> None:
    generator = opened(raw_model)
    talk = Talk(generator, GREEDY)
    text = "Once"
    assert answered(talk, "Once").num_prompt_tokens == len(generator.tokenizer.encode(text))
    for message, joined in (("", ""), (" upon", " upon"), ("a time", "\na time")):
        text += (talk.turns[-1].answer or "") + joined
        done = answered(talk, message)
        plain = generator.request(text, id=len(talk.turns), max_new_tokens=12, temperature=0.0)
        assert plain.prompt_ids == tuple(generator.tokenizer.encode(text))
        (oracle,) = [event for event in opened(raw_model).engine.run([plain]) if isinstance(event, Finished)]
        assert done.text == oracle.text
    assert grown_text(talk.turns) == text + (talk.turns[-1].answer or "")


def test_a_message_without_meaning_is_refused(chat_model: Path, raw_model: Path) -> None:
    for path in (chat_model, raw_model):
        with pytest.raises(InputError, match="empty"):
            Talk(opened(path), GREEDY).say("")
    with pytest.raises(InputError, match="needs a chat template"):
        Talk(opened(raw_model), GREEDY, system="x")
    with pytest.raises(UsageError, match="256 new tokens leave nothing"):
        Talk(opened(raw_model), TalkSettings(params=SamplingParams(), seed=0, max_new_tokens=256))


def test_the_oldest_turns_are_left_out_and_that_is_said(chat_model: Path) -> None:
    generator = opened(chat_model)
    talk = Talk(generator, GREEDY, system="S")
    warned: list[list[str]] = []
    for _ in range(12):
        talk.say("x" * 20)
        events: list[Event] = list(talk.answer())
        warned.append([event.message for event in events if isinstance(event, Warned)])
        (done,) = [event for event in events if isinstance(event, Finished)]
        assert done.num_prompt_tokens + 12 <= 256
    times = [number for number, messages in enumerate(warned) if messages]
    assert times[0] > 0
    assert len(times) < 6  # not at every turn: more than needed is left out at a time
    assert all("256 tokens: its oldest turns are left out" in text for messages in warned for text in messages)
    assert 0 < talk.num_left_out < 12
    # the system message is still read, and the last turn is
    kept = talk.turns[talk.num_left_out :]
    messages = [{"role": "system", "content": "S"}]
    for turn in kept[:-1]:
        messages += [{"role": "user", "content": turn.message}, {"role": "assistant", "content": turn.answer or ""}]
    messages.append({"role": "user", "content": kept[-1].message})
    assert done.num_prompt_tokens == len(generator.tokenizer.encode_chat(messages, add_generation_prompt=True))
    left_out = talk.num_left_out
    talk.say("y" * 250)
    with pytest.raises(InputError, match=r"the message comes to 2\d\d tokens"):
        list(talk.answer())
    talk.undo()
    assert talk.num_left_out == left_out
    assert answered(talk, "short").finish in ("eos", "length")


@pytest.mark.parametrize("after", [0, 5])
def test_a_stopped_answer_is_kept_and_one_without_text_leaves_the_message_open(chat_model: Path, after: int) -> None:
    talk = Talk(opened(chat_model), GREEDY)
    answered(talk, "a")
    talk.say("b")
    pieces: list[str] = []
    events = talk.answer(stop=lambda: 2 if len(pieces) >= after else None)
    for event in events:
        if isinstance(event, TokenOut):
            pieces.append(event.text)
    assert talk.is_unanswered == (after == 0)
    if after:
        assert (talk.turns[-1].answer or "").startswith("".join(pieces))
    talk.say("c")
    assert [turn.message for turn in talk.turns] == (["a", "b", "c"] if after else ["a", "c"])
    talk.clear()
    assert (talk.undo(), talk.retry(), talk.turns) == (None, False, [])


def test_a_stored_talk_goes_on_as_the_unbroken_one(chat_model: Path, tmp_path: Path) -> None:
    whole = Talk(opened(chat_model), SETTINGS, system="S")
    path = tmp_path / "talk.jsonl"
    with Transcript(path, flag="--transcript") as transcript:
        transcript.append(StoredTalk(model="m", chat=True, seed=5, system="S").head())
        for text in ("one", "two", "three", "four", "five", "six", "seven", "eight"):
            done = answered(whole, text)
            transcript.append({"role": "user", "content": text})
            transcript.append({"role": "assistant", "content": done.text, "num_left_out": whole.num_left_out})
        with pytest.raises(LockedError, match="another run"):
            Transcript(path, flag="--transcript")
    saved = tmp_path / "saved.jsonl"
    save_talk(read_talk(path), saved)
    with pytest.raises(UsageError, match="is there already"):
        save_talk(read_talk(path), saved)
    texts = []
    for source in (path, saved):
        stored = read_talk(source)
        broken = Talk(opened(chat_model), SETTINGS, system=stored.system)
        broken.turns, broken.num_left_out = stored.turns, stored.num_left_out
        assert broken.turns == whole.turns
        assert broken.num_left_out == whole.num_left_out > 0
        texts.append(answered(broken, "nine").text)
    assert texts == [answered(whole, "nine").text] * 2


ROWS = """{"kind": "talk", "format": 1, "model": "old", "chat": true, "seed": 1, "system": null}
{"role": "user", "content": "forgotten"}
{"kind": "talk", "format": 1, "model": "m", "chat": false, "seed": 9, "system": null}
{"role": "user", "content": "no answer came"}
{"role": "user", "content": "a"}
{"role": "assistant", "content": "b"}
{"role": "user", "content": "c"}
{"role": "assistant", "content": "d"}
{"kind": "retry"}
{"role": "assistant", "content": "e"}
{"role": "user", "content": "f"}
{"kind": "undo"}
{"role": "system", "content": "s"}
"""


def test_a_transcript_tells_what_was_taken_back_and_a_torn_line_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    path.write_text(ROWS + '{"role": "user", "con')
    talk = read_talk(path)
    assert (talk.model, talk.chat, talk.seed, talk.system) == ("m", False, 9, "s")
    assert talk.turns == [Turn(message="a", answer="b"), Turn(message="c", answer="e", num_retries=1)]
    with Transcript(path, flag="--continue") as transcript:
        assert transcript.num_torn_bytes == 21
        transcript.append({"kind": "clear"})
    assert path.read_text() == ROWS + '{"kind": "clear"}\n'
    assert read_talk(path).turns == []


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (None, NotFoundError, "no such file"),
        ("", InputError, "holds no talk"),
        ('{"role": "user", "content": "a"}\n', InputError, "line 1: a talk begins with"),
        (ROWS + "nonsense\n", InputError, "line 14"),
        (ROWS + "[]\n", InputError, "line 14: a JSON object is wanted"),
        (ROWS + '{"role": "assistant", "content": "twice"}\n', InputError, "line 14: is not what can come next"),
        (ROWS + '{"role": "user", "content": 5}\n', InputError, "line 14: is not what can come next"),
        ('{"kind": "talk", "format": 2, "model": "m", "chat": true, "seed": 1, "system": null}\n', InputError, "format 2"),
        ('{"kind": "talk"}\n', InputError, "line 1: a talk's first row has"),
    ],
)
def test_what_is_no_transcript_is_refused(tmp_path: Path, content: str | None, error: type[Exception], words: str) -> None:
    path = tmp_path / "talk.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(error, match=words):
        read_talk(path)
