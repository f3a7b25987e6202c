"""--quant of generate and eval, and what training says to quantised weights."""

import json
from pathlib import Path

import pytest

from llmctl.cli.main import run
from llmctl.core.checkpoint import load_model_and_tokenizer, save_quantised
from tests.cli.tiny_model import make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def quantised(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    loaded, tokenizer = load_model_and_tokenizer(model, quant="int4")
    folder = tmp_path_factory.mktemp("quantised")
    save_quantised(
        folder, config=loaded.config, family=loaded.family, tensors=loaded.model.state_dict(), layout="int4", tokenizer=tokenizer
    )
    return folder


@pytest.fixture
def prompt(tmp_path: Path) -> Path:
    (tmp_path / "prompt.txt").write_text("some text")
    return tmp_path / "prompt.txt"


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_generate_runs_quantised_weights(quant: str, model: Path, prompt: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "-m", str(model), "--quant", quant, "-t", "0", "-n", "8", "--json", "-v", "-f", str(prompt)]
    assert run(arguments) == 0
    out, err = capfd.readouterr()
    assert len(json.loads(out)["token_ids"]) == 8
    assert f"{quant} in float32" in err


def test_generate_gives_the_same_from_a_quantised_directory_as_at_load(
    model: Path, quantised: Path, prompt: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["generate", "-m", str(model), "--quant", "int4", "-t", "0", "-n", "20", "-f", str(prompt)]) == 0
    first = capfd.readouterr().out
    assert run(["generate", "-m", str(quantised), "-t", "0", "-n", "20", "-f", str(prompt)]) == 0
    assert capfd.readouterr().out == first
    assert run(["generate", "-m", str(quantised), "--quant", "int8", "-f", str(prompt)]) == 4
    assert "quantised already" in capfd.readouterr().err


def test_eval_tells_scores_of_quantised_weights_apart(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("the cat sat on the mat and looked at the moon " * 20)
    scores = []
    for extra in ([], ["--quant", "int8"], ["--quant", "int4"]):
        fixed = ["-m", str(model), "--json", "--cache-dir", str(tmp_path / "cache"), "--device", "cpu"]
        assert run(["eval", str(tmp_path / "a.txt"), *fixed, *extra]) == 0
        last = json.loads(capfd.readouterr().out.splitlines()[-1])
        (value,) = (metric["value"] for metric in last["metrics"] if metric["name"] == "perplexity")
        scores.append(value)
    plain, eight, four = scores
    assert plain != eight != four
    assert eight == pytest.approx(plain, rel=0.01)
    assert four == pytest.approx(plain, rel=0.2)


def test_training_refuses_quantised_weights(quantised: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    code = run(["finetune", "--model", str(quantised), "--data", str(tmp_path / "rows.jsonl"), "-o", str(tmp_path / "run")])
    assert code == 4
    assert "cannot be trained" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_unknown_layout_is_a_usage_error(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "-m", str(model), "--quant", "int2", "text"]) == 2
    assert "int8, int4" in capfd.readouterr().err
