"""gigatoken beside `tokenizers`: the same ids, or `tokenizers` takes over; and JSON read quickly beside JSON read strictly."""

import hashlib
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.core.config.pack import PackConfig
from llmctl.core.data import encoders, records
from llmctl.core.data.documents import Piece
from llmctl.core.data.encoders import CheckedEncoder, NameFinder, ReferenceEncoder, UnequalError, open_encoder
from llmctl.core.data.pack import pack
from llmctl.core.data.packevents import Packed, PackWarned
from llmctl.core.errors import InputError, LlmctlError
from llmctl.core.files import parse_json
from llmctl.core.tokenizer import Tokenizer
from llmctl.core.tokenizer import fast as fast_module
from llmctl.core.tokenizer.byte_level import byte_to_char
from llmctl.core.tokenizer.fast import FastRefusedError, open_fast

from .conftest import all_pre_tokenizers, byte_level
from .test_pack import hashes, some_documents, write_jsonl

ODD = st.text(alphabet=st.sampled_from(list("aZ7é國。，「\n\n\r \t\u3000\u00a0/.,'!s²\u0301\u200b\U0001f98a#<|>")), max_size=60)


@pytest.fixture(scope="module", params=list(all_pre_tokenizers()))
def kind(request: pytest.FixtureRequest) -> Tokenizer:
    return byte_level(all_pre_tokenizers()[request.param])


def fast_or_skip(tokenizer: Tokenizer) -> Any:
    pytest.importorskip("gigatoken")
    try:
        return open_fast(tokenizer)
    except FastRefusedError as error:
        pytest.skip(f"gigatoken is not used: {error}")


def test_where_gigatoken_is_used_its_ids_are_those_of_tokenizers(kind: Tokenizer) -> None:
    fast = fast_or_skip(kind)

    @settings(deadline=None, max_examples=200, derandomize=True)
    @given(texts=st.lists(ODD, min_size=1, max_size=5))
    def check(texts: list[str]) -> None:
        ids, lengths = fast.encode([text.encode() for text in texts])
        assert [row.tolist() for row in np.split(ids, np.cumsum(lengths)[:-1])] == kind.encode_batch(texts, add_bos=False)

    check()


def test_gpt2_and_llama3_are_among_those_that_gigatoken_takes() -> None:
    pytest.importorskip("gigatoken")
    for pattern in ("gpt2", next(name for name in all_pre_tokenizers() if "N13" in name)):
        tokenizer = byte_level(all_pre_tokenizers()[pattern])
        assert open_encoder(tokenizer, allow_special=False, wants_fast=True).name == "gigatoken", pattern


@pytest.mark.parametrize("allow_special", [False, True])
@pytest.mark.parametrize("workers", [1, 2])
def test_packing_gives_the_same_bytes_with_either(tmp_path: Path, tokenizer_dir: Path, allow_special: bool, workers: int) -> None:
    pytest.importorskip("gigatoken")
    corpus = write_jsonl(tmp_path / "docs.jsonl", some_documents(150, seed=7))
    done = {}
    for encoder in ("auto", "tokenizers"):
        settings = {"allow_special": allow_special, "workers": workers, "encoder": encoder, "shard_tokens": 5000, "val_fraction": 0.2}
        config = PackConfig(inputs=(str(corpus),), tokenizer=str(tokenizer_dir), out_dir=tmp_path / encoder, **settings)
        done[encoder] = list(pack(config))[-1]
    assert hashes(tmp_path / "auto") == hashes(tmp_path / "tokenizers")
    assert (done["auto"].encoder, done["tokenizers"].encoder) == ("gigatoken", "tokenizers")
    assert done["auto"].num_checked_bytes > (0 if allow_special else 10_000), "those with names are encoded by tokenizers then"


def test_a_vocabulary_without_all_bytes_is_left_to_tokenizers(tokenizer: Tokenizer) -> None:
    """As SmolLM2's, from which 21 bytes are missing: `tokenizers` drops them without a word."""
    content = json.loads(tokenizer.to_json())
    del content["model"]["vocab"][byte_to_char()[1]]
    lacking = Tokenizer.from_parts(tokenizers.Tokenizer.from_str(json.dumps(content)), bos=None, eos="<|endoftext|>", pad=None)
    encoder = open_encoder(lacking, allow_special=False, wants_fast=True)
    assert encoder.name == "tokenizers"
    assert encoder.why


def test_without_gigatoken_the_reason_is_how_to_install_it(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    monkeypatch.setitem(sys.modules, "gigatoken.gigatoken_rs", None)
    encoder = open_encoder(tokenizer, allow_special=False, wants_fast=True)
    assert encoder.name == "tokenizers"
    assert "llmctl[fast]" in str(encoder.why)


class Wrong:
    """An encoder that is right until a word comes that it does not know well."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._reference = ReferenceEncoder(tokenizer, allow_special=False)

    def encode(self, texts: list[bytes]) -> Any:
        ids, lengths = self._reference.encode(texts)
        ids = ids.copy()
        for number, text in enumerate(texts):
            if b"quagga" in text:
                ids[lengths[:number].sum()] += 1
        return ids, lengths


@pytest.mark.parametrize("late", [False, True])
def test_a_wrong_encoder_is_found_out_and_all_is_encoded_again(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    texts = some_documents(200, seed=1) + ["a quagga ran"] * (400 if late else 1)
    corpus = write_jsonl(tmp_path / "docs.jsonl", texts if late else texts[::-1])
    monkeypatch.setattr("llmctl.core.data.documents.PIECE_BYTES", 4000)
    monkeypatch.setattr(encoders, "open_fast", Wrong)

    def run(out: str, **settings: Any) -> list[Any]:
        config = PackConfig(
            inputs=(str(corpus),), tokenizer=str(tokenizer_dir), out_dir=tmp_path / out, workers=1, shard_tokens=3000, **settings
        )
        return list(pack(config))

    run("right", encoder="tokenizers")
    events = run("found")
    assert any(isinstance(e, PackWarned) and "encoded again by tokenizers" in e.message for e in events)
    assert isinstance(events[-1], Packed)
    assert events[-1].encoder == "tokenizers"
    assert "quagga" in str(events[-1].encoder_reason)
    assert hashes(tmp_path / "found") == hashes(tmp_path / "right")


def test_what_came_from_a_pipe_has_to_be_given_again(tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    monkeypatch.setattr(encoders, "open_fast", Wrong)
    config = PackConfig(inputs=("-",), tokenizer=str(tokenizer_dir), out_dir=tmp_path / "out", workers=1, format="lines")
    with pytest.raises(LlmctlError, match="--encoder tokenizers"):
        list(pack(config, stdin=io.BytesIO(b"a quagga\n")))
    assert not (tmp_path / "out").exists()


def test_the_sample_runs_all_along(tokenizer: Tokenizer) -> None:
    """An error in one text of a thousand is found before long, wherever it is."""
    encoder = CheckedEncoder(Wrong(tokenizer), ReferenceEncoder(tokenizer, allow_special=False))  # type: ignore[arg-type]
    right = [b"the king " * 100] * 100
    for _ in range(30):
        encoder.encode(right, named=())
    assert 30 * 90_000 / 1024 < encoder.num_checked_bytes < 65_536 + 30 * 90_000 / 800

    def many_times() -> None:
        for _ in range(300):
            encoder.encode([*right[:50], b"quagga " * 100, *right[50:]], named=())

    with pytest.raises(UnequalError, match="quagga"):
        many_times()


def test_names_are_found_as_by_the_tokenizer(tokenizer: Tokenizer) -> None:
    texts = ["a<|endoftext|>b<|endoftext|>", "", "<|endoftext|", "x<|endoftext|>"]
    assert NameFinder(tokenizer).count([text.encode() for text in texts]) == (3, [0, 3])
    assert sum(tokenizer.count_special(text) for text in texts) == 3
    assert NameFinder(tokenizer).count([b"nothing"]) == (0, [])


def test_gigatoken_is_opened_anew_when_it_has_grown(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """It remembers every word: without this the memory of a long packing would have no bound."""
    fast = fast_or_skip(tokenizer)
    text = b"the king and his golden ball"
    before, loads = fast.encode([text])[0].tolist(), []
    load = fast_module._load

    def loading(content: str) -> Any:
        loads.append(content)
        return load(content)

    monkeypatch.setattr(fast_module, "_load", loading)
    sizes = iter([0, 1 << 40, 1, 1, 1])
    monkeypatch.setattr(fast_module, "_resident_bytes", lambda: next(sizes))
    assert [fast.encode([text])[0].tolist() for _ in range(4)] == [before] * 4
    assert len(loads) == 1


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(10**20), 10**20), st.text(alphabet='ab":,{}\\\n é', max_size=8)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(alphabet='ab":', max_size=2), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=300)
@given(pairs=st.lists(st.tuples(st.text(alphabet='ab":', max_size=2), VALUES), max_size=4), colon=st.sampled_from([":", " :", "\t: "]))
def test_json_is_read_as_the_strict_parser_reads_it(pairs: list[tuple[str, Any]], colon: str) -> None:
    pytest.importorskip("orjson")
    line = ("{" + ",".join(json.dumps(key) + colon + json.dumps(value) for key, value in pairs) + "}").encode()

    def outcome(parse: Any) -> Any:
        try:
            return parse()
        except InputError as error:
            return str(error)

    quick, strict = outcome(lambda: records._parsed(line)), outcome(lambda: parse_json(line, where="record"))
    if isinstance(strict, str):
        assert quick == strict, "what is refused is refused, equal keys above all"
    else:
        assert set(quick) == set(strict)
        assert {k: v for k, v in quick.items() if isinstance(v, str)} == {k: v for k, v in strict.items() if isinstance(v, str)}


LINES = [
    '{"text": "a"}',
    '{"text": "b", "text": "c"}',
    '{"text": "{\\"x\\": 1}"}',
    '{"other": [{"text": 1}], "text": "d \u00e9"}',
    '{"text": "e", "deep": {"k": 1, "k": 2}}',
    '{"text": null}',
    '{"text": "\\ud800"}',
    '{"text": ": f"}\r',
    '{"text": [{}',
    '{}], "text": "g"}',
    '{"text": "h"}, {"text": "i"}',
    "7, 8",
    "",
    "   ",
]


@settings(deadline=None, max_examples=400, derandomize=True)
@given(lines=st.lists(st.sampled_from(LINES), max_size=6), skip=st.booleans())
def test_a_block_of_records_is_read_as_line_by_line(lines: list[str], skip: bool) -> None:
    """Among them lines that would make other records of each other, were they only joined by commas."""
    pytest.importorskip("orjson")
    piece = Piece(0, 1, 0, "\n".join(lines).encode(), "jsonl")

    def read() -> Any:
        return records.read_piece(piece, field="text", max_line_bytes=1000, skip_errors=skip)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "_texts_at_once", lambda *_: None)
        patch.setattr(records, "_quick_json", None)
        wanted = read()
    assert read() == wanted


def test_a_text_that_holds_the_separator_is_a_text(tokenizer: Tokenizer) -> None:
    fast = fast_or_skip(tokenizer)
    texts = ["the king", f"a{fast_module._SEPARATOR}b", "", "golden"]
    halves = [fast_module._SEPARATOR[:-1], fast_module._SEPARATOR[1:], fast_module._SEPARATOR[-1:], fast_module._SEPARATOR[:1], "a"]
    for part in (texts, texts[1:2], texts[:1], texts[2:3], halves, halves[::-1], [*halves[1:], *halves]):
        ids, lengths = fast.encode([text.encode() for text in part])
        assert [row.tolist() for row in np.split(ids, np.cumsum(lengths)[:-1])] == tokenizer.encode_batch(part, add_bos=False)


def test_where_only_the_first_word_gets_a_blank_each_text_is_a_first_one() -> None:
    vocab = {token: number for number, token in enumerate(["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"\u2581abc"])}
    model = tokenizers.models.BPE({**vocab, "\u2581a": len(vocab)}, [("\u2581", "a")], byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    sentencepiece = Tokenizer.from_parts(backend, bos=None, eos="</s>", pad=None)
    fast = fast_or_skip(sentencepiece)
    texts = ["a b", "c", "", "ab"]
    ids, lengths = fast.encode([text.encode() for text in texts])
    assert [row.tolist() for row in np.split(ids, np.cumsum(lengths)[:-1])] == sentencepiece.encode_batch(texts, add_bos=False)


def test_threads_share_an_encoder_and_its_proof(tokenizer: Tokenizer) -> None:
    encoder = CheckedEncoder(fast_or_skip(tokenizer), ReferenceEncoder(tokenizer, allow_special=False))
    texts = [text.encode() for text in some_documents(200, seed=3)]
    wanted = ReferenceEncoder(tokenizer, allow_special=False).encode(texts)
    with ThreadPoolExecutor(4) as executor:
        for ids, lengths in executor.map(lambda _: encoder.encode(texts, named=()), range(40)):
            assert np.array_equal(ids, wanted[0])
            assert np.array_equal(lengths, wanted[1])
    num_bytes = 40 * sum(map(len, texts))
    assert num_bytes / 2048 < encoder.num_checked_bytes < 65_536 + num_bytes / 800


def test_text_is_read_the_same_without_orjson(tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = write_jsonl(tmp_path / "docs.jsonl", some_documents(60, seed=4))

    def packed(name: str) -> str:
        config = PackConfig(inputs=(str(corpus),), tokenizer=str(tokenizer_dir), out_dir=tmp_path / name, workers=1)
        list(pack(config))
        return hashlib.sha256((tmp_path / name / "train-00000.tokens").read_bytes()).hexdigest()

    quick = packed("quick")
    monkeypatch.setattr(records, "_quick_json", None)
    assert packed("plain") == quick
