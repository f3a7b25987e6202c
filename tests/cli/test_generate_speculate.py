"""Guessing ahead by the command's flags: the same texts, what --stats tells of it, and what is refused."""

import re
from pathlib import Path

import pytest

from tests.cli.generate_tools import Llmctl
from tests.cli.tiny_model import make_model
from tests.core.native.models import library_is_built

BASE = ("-n", 60, "--seed", 4, "--temp", 0.2, "--json", "abcabcabcabcabc")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("small"), seed=5)


@pytest.mark.parametrize(
    "executor", [pytest.param("native", marks=pytest.mark.skipif(not library_is_built(), reason="not built")), "torch"]
)
def test_the_text_is_the_same_and_stats_tell_the_share(llmctl: Llmctl, model: Path, small: Path, executor: str) -> None:
    base = ("-m", model, "--executor", executor, "--device", "cpu", "--dtype", "float32", *BASE)
    plain = llmctl(*base, "--stats", "--speculate", "off")
    assert "guessed" not in plain.err
    for flags in (("--speculate", 4), ("--draft-model", small, "--speculate", 3), ("--draft-model", model, "--speculate", 2)):
        ahead = llmctl(*base, "--stats", *flags)
        assert ahead.out == plain.out
        told = re.search(r"guessed ahead: ([\d,]+) tokens, ([\d,]+) came true \((\d+)%\)", ahead.err)
        assert told, ahead.err
        drafted, accepted, share = (int(number) for number in told.groups())
        assert share == round(100 * accepted / drafted)
        assert model not in flags or share == 100
    rows = b'{"prompt": "abcabcabc"}\n{"prompt": "xyxyxyxyxy", "temperature": 0}\n'
    base = ("-m", model, "--executor", executor, "--device", "cpu", "--dtype", "float32", "-n", 40, "--seed", 1, "--ordered", "-i", "-")
    assert llmctl(*base, "--speculate", 3, stdin=rows).out == llmctl(*base, "--speculate", "off", stdin=rows).out
    assert "came true" in llmctl(*base, "--speculate", 3, "--stats", stdin=rows).err


@pytest.mark.skipif(not library_is_built(), reason="the native library was not built")
def test_it_is_on_by_itself_where_rows_never_mix(llmctl: Llmctl, model: Path) -> None:
    assert "came true" in llmctl("-m", model, "--executor", "native", *BASE, "--stats").err
    assert "came true" not in llmctl("-m", model, "--executor", "torch", *BASE, "--stats").err


def test_what_cannot_be_is_refused(llmctl: Llmctl, model: Path, tmp_path: Path) -> None:
    import tokenizers

    for value in ("0", "257", "often", "-1", "1.5"):
        result = llmctl("-m", model, "x", f"--speculate={value}")
        assert (result.code, result.out) == (2, "")
        assert f"--speculate {value}: auto, off, or a number of tokens from 1 to 256 is wanted" in result.last
    assert llmctl("-m", model, "x", "--speculate", "off", "--draft-model", model).code == 2
    assert llmctl("-m", model, "x", "--num-beams", 2, "--draft-model", model).code == 2
    assert llmctl("-m", model, "x", "--draft-model", tmp_path / "nowhere").code == 10
    other = make_model(tmp_path / "other")
    words = tokenizers.Tokenizer.from_file(str(other / "tokenizer.json"))
    words.add_tokens(["new"])
    words.save(str(other / "tokenizer.json"))
    result = llmctl("-m", model, "x", "--draft-model", other)
    assert (result.code, result.out) == (4, "")
    assert re.search(r"its tokenizer \(\w{12}\) is not the model's \(\w{12}\)", result.last)


def test_budgets_and_number_formats_of_the_cache_are_checked(llmctl: Llmctl, model: Path) -> None:
    for value in ("0", "many", "-3", "1e3"):
        result = llmctl("-m", model, "x", f"--batch-tokens={value}")
        assert (result.code, result.out) == (2, "")
        assert f"--batch-tokens {value}: auto, or a number of tokens from 1 on is wanted" in result.last
    result = llmctl("-m", model, "x", "--executor", "torch", "--kv-dtype", "int8")
    assert result.code == 2
    assert "--kv-dtype int8 needs the native executor" in result.last
    rows = b'{"prompt": "abc"}\n{"prompt": "xyxyxyxyxyxyxyxyxyxyxy"}\n{"prompt": "z"}\n'
    base = ("-m", model, "-n", 12, "--seed", 1, "--ordered", "-i", "-")
    assert llmctl(*base, "--batch-tokens", 20, stdin=rows).out == llmctl(*base, stdin=rows).out


@pytest.mark.skipif(not library_is_built(), reason="the native library was not built")
def test_keys_and_values_in_fewer_bits(llmctl: Llmctl, model: Path, tmp_path: Path) -> None:
    base = ("-m", model, "--executor", "native", "-n", 30, "--temp", 0, "abcabcabc")
    assert "keys and values in int8" in llmctl(*base, "--kv-dtype", "int8", "--verbose").err
    assert llmctl(*base, "--kv-dtype", "float32").out == llmctl(*base).out
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a"}\n')
    batch = ("-m", model, "--executor", "native", "-n", 4, "--seed", 1, "-i", rows, "-o", tmp_path / "out.jsonl")
    assert llmctl(*batch, "--kv-dtype", "int8").code == 0
    assert llmctl(*batch).code == 4, "the texts may be others, so it is another job"
