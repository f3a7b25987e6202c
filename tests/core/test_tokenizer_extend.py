"""Extended tokenizers beside the old ones: every id and merge stays, text gets shorter, and `transformers` agrees."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers

from llmctl.core.errors import InputError, UsageError
from llmctl.core.tokenizer import Tokenizer, TokenizerTrained, train_tokenizer
from llmctl.core.tokenizer import intake as intake_module
from llmctl.core.tokenizer.extend import extend_tokenizer
from tests.core.native.models import runnable_kernels
from tests.core.tokenizer_kinds import CHINESE, ENGLISH, KINDS, TEXTS, trained, write_kind

pytestmark = pytest.mark.skipif(not runnable_kernels(), reason="the native library was not built")

NEW_TEXT = "The quick brown foxes jumped. " * 30 + "白日依山尽，黄河入海流。" * 30 + CHINESE + ENGLISH


def extend(base: Tokenizer, texts: list[str], **settings: Any) -> TokenizerTrained:
    """The last event."""
    *_, last = extend_tokenizer(base, texts, **settings)
    assert isinstance(last, TokenizerTrained)
    return last


def check(base: Tokenizer, result: TokenizerTrained, folder: Path) -> None:
    """What is promised of any extension."""
    new = result.tokenizer
    old, fresh = json.loads(base.to_json()), json.loads(new.to_json())
    assert {token: new._ids[token] for token in base._ids} == base._ids
    assert fresh["model"]["merges"][: len(old["model"]["merges"])] == old["model"]["merges"]
    assert sorted(set(new._ids.values()) - set(base._ids.values())) == list(range(base.vocab_size, new.vocab_size))
    assert len(new.encode(NEW_TEXT)) < 0.8 * len(base.encode(NEW_TEXT))
    folder.mkdir(exist_ok=True)
    new.save(folder)
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    reference.backend_tokenizer.encode_special_tokens = True
    for text in (*TEXTS, NEW_TEXT):
        assert new.encode(text) == reference(text)["input_ids"], repr(text)
        assert new.decode(new.encode(text, add_bos=False)) == base.decode(base.encode(text, add_bos=False))


@pytest.mark.parametrize("pattern", ["llama3", "gpt2"])
def test_new_merges_come_after_the_old_ones(pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = trained(pattern=pattern, vocab_size=320)
    results = []
    for least in (1, 1 << 20):  # counted by the native library, and by `tokenizers`
        monkeypatch.setattr(intake_module, "HEAD_CHARS", least)
        results.append(extend(base, [NEW_TEXT], vocab_size=370, special_tokens=["<|tool|>", "<|endoftext|>"]))
    native, plain = results
    assert (native.trainer, plain.trainer) == ("native", "tokenizers")
    assert native.tokenizer.to_json() == plain.tokenizer.to_json()
    check(base, native, tmp_path)
    assert native.tokenizer.vocab_size == 370
    assert native.tokenizer.special_tokens == {**base.special_tokens, "<|tool|>": 369}
    assert native.bytes_per_token_before is not None
    assert native.bytes_per_token_before < native.bytes_per_token
    assert native.tokenizer.chat_template == base.chat_template


def test_nothing_kept_but_bytes_gives_what_training_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake_module, "HEAD_CHARS", 1)
    *_, base = train_tokenizer(["x"], vocab_size=257)
    *_, whole = train_tokenizer([NEW_TEXT], vocab_size=357)
    assert isinstance(base, TokenizerTrained)
    assert isinstance(whole, TokenizerTrained)
    merges = [
        json.loads(t.to_json())["model"]["merges"] for t in (extend(base.tokenizer, [NEW_TEXT], vocab_size=357).tokenizer, whole.tokenizer)
    ]
    assert merges[0] == merges[1]


def test_sentencepiece_with_byte_fallback_can_be_extended(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    write_kind(tmp_path / "base", "llama2")
    base = Tokenizer.load(tmp_path / "base")
    result = extend(base, [NEW_TEXT + "龘" * 50], vocab_size=base.vocab_size + 60)
    check(base, result, tmp_path / "new")
    assert not [token for token in result.tokenizer._ids if "<0x" in token and token not in base._ids]  # bytes of last resort stay apart


def test_added_tokens_that_the_model_does_not_know_keep_their_ids(tmp_path: Path) -> None:
    base = trained(vocab_size=320)
    backend = tokenizers.Tokenizer.from_str(base.to_json())
    backend.add_tokens(["<think>"])
    backend.add_special_tokens(["<|more|>"])
    base = Tokenizer.from_parts(backend, bos="<|endoftext|>", eos="<|endoftext|>", pad=None)
    check(base, extend(base, [NEW_TEXT], vocab_size=400), tmp_path)


def test_what_cannot_be_extended_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="already"):
        extend(trained(vocab_size=320), [NEW_TEXT], vocab_size=300)
    with pytest.raises(InputError, match="no text"):
        extend(trained(vocab_size=320), [" "], vocab_size=400)
    write_kind(tmp_path, "wordpiece")
    with pytest.raises(UsageError, match="WordPiece"):
        extend(Tokenizer.load(tmp_path), [NEW_TEXT], vocab_size=5000)


def test_every_kind_is_extended_or_refused(tmp_path: Path) -> None:
    for kind in KINDS:
        folder = tmp_path / kind
        folder.mkdir()
        write_kind(folder, kind)
        base = Tokenizer.load(folder)
        try:
            result = extend(base, [NEW_TEXT], vocab_size=base.vocab_size + 40)
        except UsageError:
            continue
        check(base, result, tmp_path / f"{kind}-new")
