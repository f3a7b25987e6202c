"""Tokenizer against transformers, tokenizers and arithmetic: ids, text, bytes, streams, files."""

import hashlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.core.errors import InputError, NotFoundError
from llmctl.core.tokenizer import Tokenizer
from llmctl.core.tokenizer.parts import fingerprint_of
from tests.core.tokenizer_kinds import KINDS, TEXTS, trained, write_kind

OURS = {
    "gpt2": {"pattern": "gpt2"},
    "llama3": {"pattern": "llama3"},
    "words": {"model": "word", "vocab_size": 600},
}
TEST_DATA = os.environ.get("LLMCTL_TEST_DATA")
needs_data = pytest.mark.skipif(TEST_DATA is None, reason="needs $LLMCTL_TEST_DATA")


@pytest.fixture(scope="module", params=OURS)
def ours(request: pytest.FixtureRequest) -> Tokenizer:
    """One of those that llmctl trains."""
    return trained(**OURS[request.param])


@pytest.fixture(scope="module", params=KINDS)
def foreign(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    """A tokenizer as the hub holds them: (ours, transformers')."""
    folder = tmp_path_factory.mktemp("foreign")
    write_kind(folder, request.param)
    return Tokenizer.load(folder), reference(folder)


def reference(folder: Path) -> Any:
    """transformers' tokenizer of a folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


# ids


def test_ids_of_any_tokenizer_are_those_of_transformers(foreign: tuple[Tokenizer, Any]) -> None:
    tokenizer, theirs = foreign
    for text in TEXTS:
        assert tokenizer.encode(text, allow_special=True) == theirs.encode(text), repr(text)
        assert tokenizer.encode(text, allow_special=True, add_bos=False) == theirs.encode(text, add_special_tokens=False), repr(text)
    assert tokenizer.encode_batch(TEXTS, allow_special=True) == [theirs.encode(text) for text in TEXTS]


def test_facts_of_any_tokenizer_are_those_of_transformers(foreign: tuple[Tokenizer, Any]) -> None:
    tokenizer, theirs = foreign
    assert tokenizer.vocab_size == len(theirs) == max(theirs.get_vocab().values()) + 1
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert tokenizer.adds_bos == (theirs.bos_token_id is not None and theirs.encode("x")[0] == theirs.bos_token_id)
    special = {i for i, token in theirs.added_tokens_decoder.items() if token.special}
    assert tokenizer.special_ids == special
    assert tokenizer.model_max_length == (theirs.model_max_length if theirs.model_max_length < 1e9 else None)


def test_text_of_any_ids_is_that_of_transformers(foreign: tuple[Tokenizer, Any]) -> None:
    tokenizer, theirs = foreign
    for text in TEXTS:
        ids = theirs.encode(text)
        for skip in (False, True):
            assert tokenizer.decode(ids, skip_special=skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_what_save_writes_is_for_transformers_the_same_tokenizer(ours: Tokenizer, tmp_path: Path) -> None:
    ours.save(tmp_path)
    for model_type in (None, "gpt2", "llama", "qwen3"):  # AutoTokenizer looks at the model beside it
        if model_type is not None:
            (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        theirs = reference(tmp_path)
        for text in [*TEXTS, "<|im_start|>user\nhi<|im_end|>"]:
            ids = ours.encode(text, allow_special=True)
            assert ids == theirs.encode(text), (model_type, text)
            assert theirs.decode(ids) == ours.decode(ids) == text
        assert theirs.chat_template == ours.chat_template
        assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == ("<|endoftext|>",) * 3
        assert len(theirs) == ours.vocab_size


def test_save_and_load_change_nothing(foreign: tuple[Tokenizer, Any], tmp_path: Path) -> None:
    tokenizer, _ = foreign
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    assert again.adds_bos == tokenizer.adds_bos
    theirs = reference(tmp_path)
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text)
        assert theirs.encode(text) == tokenizer.encode(text, allow_special=True)


def test_a_tokenizer_json_reads_the_configs_beside_it(tmp_path: Path) -> None:
    write_kind(tmp_path, "llama2")
    assert Tokenizer.load(tmp_path / "tokenizer.json").bos_token == "<s>"


def test_bos_when_asked_for(foreign: tuple[Tokenizer, Any]) -> None:
    tokenizer, _ = foreign
    plain = tokenizer.encode("a king", add_bos=False)
    if tokenizer.bos_id is None:
        with pytest.raises(InputError, match="no BOS token"):
            tokenizer.encode("a king", add_bos=True)
    else:
        assert tokenizer.encode("a king", add_bos=True) == [tokenizer.bos_id, *plain]
        assert tokenizer.encode_batch(["a king"], add_bos=True) == [[tokenizer.bos_id, *plain]]


@pytest.mark.parametrize("config", [None, {"add_bos_token": True}, {"add_prefix_space": True, "eos_token": "<|im_end|>"}])
def test_vocab_and_merges_files_give_gpt2s_tokenizer(config: dict[str, Any] | None, tmp_path: Path) -> None:
    content = json.loads(trained(pattern="gpt2").to_json())
    vocab = {**content["model"]["vocab"], **{token["content"]: token["id"] for token in content["added_tokens"]}}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    merges = [" ".join(pair) for pair in content["model"]["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    if config is not None:
        named = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**named, **config}))
    tokenizer, theirs = Tokenizer.load(tmp_path), reference(tmp_path)
    for text in TEXTS:
        assert tokenizer.encode(text, allow_special=True) == theirs.encode(text)
    assert (tokenizer.bos_token, tokenizer.eos_token) == (theirs.bos_token, theirs.eos_token)
    assert tokenizer.adds_bos == bool(config and config.get("add_bos_token"))
    assert tokenizer.vocab_size == len(theirs)


@needs_data
def test_gpt2s_published_ids() -> None:
    gpt2 = Tokenizer.load(Path(str(TEST_DATA)) / "tokenizers" / "gpt2")
    # openai/gpt-2 and the documentation of tiktoken
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.encode("Once upon a time") == [7454, 2402, 257, 640]
    assert gpt2.encode("hello <|endoftext|>", allow_special=True) == [31373, 220, 50256]
    assert (gpt2.vocab_size, gpt2.eos_id, gpt2.is_lossless, gpt2.adds_bos) == (50257, 50256, True, False)
    assert gpt2.fingerprint == "f6dfb6c6a984742a3e161140bd3252f5a286203bbfe63f2e11e392961a7a4bf1"


# special tokens are text


@given(
    st.lists(st.sampled_from(["<|endoftext|>", "<|im_end|>", "<|im_start|>", "<|", "|>", "a", " ", "\n", "im_end"]), max_size=8).map(
        "".join
    )
)
def test_names_of_special_tokens_in_a_text_are_text(text: str) -> None:
    for tokenizer in LOSSLESS:
        for ids in (tokenizer.encode(text), tokenizer.encode_batch([text])[0]):
            assert tokenizer.special_ids.isdisjoint(ids)
            assert tokenizer.decode(ids) == text


def test_names_of_special_tokens_are_text_even_where_the_model_knows_them_as_words(foreign: tuple[Tokenizer, Any]) -> None:
    tokenizer, theirs = foreign
    framing = theirs.encode("", add_special_tokens=True)
    unknown = {theirs.unk_token_id}
    for name in tokenizer.special_tokens:
        for text in (name, f"a {name} b", name * 2):
            for ids in (tokenizer.encode(text), tokenizer.encode_batch([text])[0]):
                control = [i for i in ids if i in tokenizer.special_ids - unknown]
                assert control == [i for i in framing if i not in unknown], (name, text)
            if tokenizer.token_id(name) not in unknown:
                assert tokenizer.token_id(name) in tokenizer.encode(f"a {name} b", allow_special=True)


def test_merges_that_build_a_control_token_do_not_give_it() -> None:
    vocab = {"<": 0, "s": 1, ">": 2, "s>": 3, "<s>": 4, "a": 5}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[("s", ">"), ("<", "s>")]))
    tokenizer = Tokenizer.from_parts(backend, bos="<s>", eos=None, pad=None)
    assert tokenizer.encode("a<s>a") == [5, 0, 3, 5]
    assert tokenizer.encode("a<s>a", allow_special=True) == [5, 4, 5]


def test_special_names_are_counted() -> None:
    tokenizer = trained()
    assert tokenizer.count_special("a<|im_end|><|im_end|> <|endoftext|> <|im_end") == 3


# bytes


LOSSLESS = [trained(**given_settings) for given_settings in OURS.values()]


@given(st.text())
@settings(max_examples=300)
def test_encode_then_decode_is_the_identity(text: str) -> None:
    for tokenizer in LOSSLESS:
        assert tokenizer.is_lossless
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode_bytes(ids) == text.encode()


@given(st.text())
def test_bytes_of_the_tokens_add_up_to_the_text(text: str) -> None:
    for tokenizer in LOSSLESS:
        lengths = tokenizer.token_bytes()
        assert lengths.shape == (tokenizer.vocab_size,)
        assert sum(int(lengths[i]) for i in tokenizer.encode(text)) == len(text.encode())


def test_special_tokens_stand_for_no_bytes(foreign: tuple[Tokenizer, Any]) -> None:
    tokenizer, _ = foreign
    lengths = tokenizer.token_bytes()
    assert all(lengths[i] == 0 for i in tokenizer.special_ids)
    assert lengths.sum() > 0


def test_bytes_of_sentencepiece_tokens_add_up_to_the_decoded_text(tmp_path: Path) -> None:
    write_kind(tmp_path, "llama2")
    tokenizer = Tokenizer.load(tmp_path)
    lengths = tokenizer.token_bytes()
    for text in TEXTS:
        ids = tokenizer.encode(text, add_bos=False)
        # The space that SentencePiece puts before a text is in the first token, and decoding takes it away.
        assert sum(int(lengths[i]) for i in ids) == len(tokenizer.decode(ids).encode()) + bool(ids)


def test_missing_bytes_and_lost_characters(tmp_path: Path) -> None:
    write_kind(tmp_path, "incomplete bytes")
    tokenizer = Tokenizer.load(tmp_path)
    assert not tokenizer.is_byte_complete
    assert not tokenizer.is_lossless
    for text in TEXTS:
        good = sum(1 for char in text if tokenizer.decode(tokenizer.encode(char)) == char)
        assert tokenizer.count_lost(text) == len(text) - good, repr(text)
    assert all(tokenizer.count_lost(text) == 0 for text in TEXTS[2:4])


def test_lost_characters_of_a_tokenizer_with_an_unknown_token(tmp_path: Path) -> None:
    write_kind(tmp_path, "unigram")
    assert Tokenizer.load(tmp_path).count_lost("king 🤗☃ king") == 2


def test_text_of_one_id() -> None:
    tokenizer = trained()
    assert tokenizer.token_text(tokenizer.encode("King", allow_special=True)[0]) in "King"
    assert tokenizer.token_text(tokenizer.special_tokens["<|im_end|>"]) == "<|im_end|>"
    assert tokenizer.token_text(tokenizer.vocab_size) == ""


def test_ids_that_no_token_has_decode_to_nothing() -> None:
    tokenizer = trained()
    ids = tokenizer.encode("king")
    assert tokenizer.decode([*ids, tokenizer.vocab_size + 7, -1]) == "king"
    assert tokenizer.is_known(tokenizer.vocab_size - 1)
    assert not tokenizer.is_known(tokenizer.vocab_size)


def test_a_lone_surrogate_is_refused() -> None:
    for call in (trained().encode, lambda text: trained().encode_batch([text])):
        with pytest.raises(InputError, match="surrogate"):
            call("a\ud800")


# streams


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """The pieces that the stream decoder gives."""
    decoder = tokenizer.stream()
    return [*(decoder.push(i) for i in ids), decoder.finish()]


@given(st.text())
def test_a_stream_gives_whole_characters_and_all_of_them(text: str) -> None:
    for tokenizer in LOSSLESS:
        so_far = ""
        for piece in stream(tokenizer, tokenizer.encode(text)):
            so_far += piece
            assert text.startswith(so_far)
        assert so_far == text


@given(st.lists(st.integers(0, 399), max_size=30))
@settings(max_examples=300)
def test_a_stream_of_any_ids_is_what_tokenizers_decodes(ids: list[int]) -> None:
    tokenizer = LOSSLESS[0]
    backend = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    assert "".join(stream(tokenizer, ids)) == backend.decode(ids, skip_special_tokens=False) == tokenizer.decode(ids)


def test_a_stream_of_any_tokenizer_is_what_it_decodes(foreign: tuple[Tokenizer, Any]) -> None:
    tokenizer, _ = foreign
    for text in TEXTS:
        ids = tokenizer.encode(text)
        whole = tokenizer.decode(ids)
        so_far = ""
        for piece in stream(tokenizer, ids):
            so_far += piece
            assert whole.startswith(so_far), (text, so_far)
        assert so_far == whole


def test_a_stream_can_leave_special_tokens_out() -> None:
    tokenizer = trained()
    decoder = tokenizer.stream(skip_special=True)
    ids = tokenizer.encode("a<|im_end|>b", allow_special=True)
    assert "".join(map(decoder.push, ids)) + decoder.finish() == "ab"


# fingerprint


def test_fingerprints_stay_what_they_were_since_shards_hold_them() -> None:
    vocab = {"a": 0, "b": 1, "ab": 2}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[("a", "b")]))
    tokenizer = Tokenizer.from_parts(backend, bos=None, eos="b", pad=None)
    assert tokenizer.fingerprint == "3664c45ccd8273d8bf14ae99e71e0a0f7797d616ddf546cfee0c3e9fd588462c"


def test_the_fingerprint_is_that_of_plain_json_with_and_without_orjson(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its text as json.dumps writes it whole: strings of every kind in a vocabulary, and floats of every size."""
    odd = ["a", "ab", "b", *map(chr, range(0x2100)), "\U0001f98a", "\u2028", '"', "\\", "\uffff", "zé"]
    vocab = {token: number for number, token in enumerate(dict.fromkeys(odd))}
    scores = [(token, -(10.0 ** -(number % 30))) for number, token in enumerate(vocab)]
    for model in (
        tokenizers.models.BPE(vocab, [("a", "b")]),
        tokenizers.models.Unigram(scores, unk_id=0),
        tokenizers.models.WordLevel(vocab, "a"),
    ):
        backend = tokenizers.Tokenizer(model)
        content = json.loads(backend.to_str())
        content = {key: value for key, value in content.items() if value is not None and key != "version"}
        content["model"] = {key: value for key, value in content["model"].items() if value is not None}
        text = json.dumps({**content, "eos": "a"}, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        wanted = hashlib.sha256(text.encode()).hexdigest()
        assert fingerprint_of(backend, bos=None, eos="a") == wanted
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "orjson", None)
            assert fingerprint_of(backend, bos=None, eos="a") == wanted


def test_the_fingerprint_does_not_depend_on_how_the_json_is_written(tmp_path: Path) -> None:
    tokenizer = trained()
    tokenizer.save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    content["model"]["vocab"] = dict(reversed(content["model"]["vocab"].items()))
    content["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(dict(reversed(content.items())), ensure_ascii=True))
    (tmp_path / "chat_template.jinja").write_text("other")
    again = Tokenizer.load(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    assert len(again.encode("king " * 50)) > 8


@pytest.mark.parametrize("change", ["merges", "vocab", "special", "eos", "pattern"])
def test_the_fingerprint_sees_what_changes_ids(change: str, tmp_path: Path) -> None:
    tokenizer = trained()
    tokenizer.save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    if change == "merges":
        content["model"]["merges"][:2] = reversed(content["model"]["merges"][:2])
    elif change == "vocab":
        vocab = content["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    elif change == "special":
        content["added_tokens"][-1]["content"] = "<|other|>"
    elif change == "eos":
        config["eos_token"] = "<|im_end|>"
    else:
        content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{L}+"
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.load(tmp_path).fingerprint != tokenizer.fingerprint


def test_a_tokenizer_can_be_sent_to_another_process() -> None:
    tokenizer = trained()
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.fingerprint == tokenizer.fingerprint
    assert again.chat_template == tokenizer.chat_template


# files that are wrong


BROKEN = {
    "empty": "",
    "not JSON": "{",
    "no model": "{}",
    "a list": "[1, 2]",
    "model of no known type": '{"model": {"type": "Magic"}, "added_tokens": []}',
    "merge of unknown tokens": '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}, "added_tokens": []}',
    "ids that are text": '{"model": {"type": "BPE", "vocab": {"a": "x"}, "merges": []}, "added_tokens": []}',
    "not UTF-8": b"\xff\xfe{}",
    "nested deeply": "[" * 100_000,
    "bad regex": '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "pre_tokenizer": {"type": "Split", "pattern": '
    '{"Regex": "("}, "behavior": "Isolated", "invert": false}, "added_tokens": []}',
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_malformed_tokenizer_is_an_input_error_that_names_it(name: str, tmp_path: Path) -> None:
    content = BROKEN[name]
    (tmp_path / "tokenizer.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


CONFIGS = [
    "{",
    "[]",
    '{"eos_token": 5}',
    '{"eos_token": "x", "eos_token": "y"}',
    '{"added_tokens_decoder": {"a": {"content": "b"}}}',
    '{"chat_template": 5}',
]


@pytest.mark.parametrize("config", CONFIGS)
def test_a_malformed_config_is_an_input_error(config: str, tmp_path: Path) -> None:
    trained().save(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(InputError):
        Tokenizer.load(tmp_path)


def test_what_is_not_there_is_not_found(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none", tmp_path / "tokenizer.json"):
        with pytest.raises(NotFoundError):
            Tokenizer.load(path)


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.txt"])
def test_files_for_slow_tokenizers_are_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x0a\x0e")
    with pytest.raises(InputError, match=f"only {name}.*save_pretrained"):
        Tokenizer.load(tmp_path)


def test_a_named_token_that_is_not_there_is_an_input_error() -> None:
    backend = tokenizers.Tokenizer.from_str(trained().to_json())
    with pytest.raises(InputError, match="'<none>'"):
        Tokenizer.from_parts(backend, bos=None, eos="<none>", pad=None)


def test_loading_and_encoding_need_neither_torch_nor_transformers(tmp_path: Path) -> None:
    trained().save(tmp_path)
    program = (
        "import sys; from pathlib import Path; from llmctl.core.tokenizer import Tokenizer\n"
        f"t = Tokenizer.load(Path({str(tmp_path)!r})); t.encode_chat([dict(role='user', content='x')], add_generation_prompt=True)\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=240)
    assert done.stdout == "[]\n"
