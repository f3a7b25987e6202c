"""An architecture that is not llmctl's own, in generate and eval: the same text as transformers', and one line that says so."""

from pathlib import Path

import pytest
import torch
import transformers

from tests.cli.in_process import llmctl
from tests.cli.tiny_model import make_model


@pytest.fixture(scope="module")
def bloom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BLOOM beside the tokenizer of `make_model`."""
    folder = make_model(tmp_path_factory.mktemp("bloom"))
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        (folder / name).unlink()
    torch.manual_seed(1)
    config = transformers.BloomConfig(
        vocab_size=259, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.4, bos_token_id=256, eos_token_id=256
    )
    transformers.BloomForCausalLM(config).save_pretrained(folder)
    return folder


def test_generate_writes_what_transformers_does_and_says_once_how_it_runs(bloom: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(bloom)
    tokenizer = transformers.AutoTokenizer.from_pretrained(bloom)
    prompt = torch.tensor([tokenizer("a king").input_ids])
    ids = model.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, prompt.shape[1] :]
    done = llmctl("generate", "a king", "-m", bloom, "-t", "0", "-n", "12", "--raw")
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip("\n") == tokenizer.decode(ids, skip_special_tokens=True).rstrip("\n")
    assert done.stderr.count("'bloom'") == 1
    assert "runs through transformers" in done.stderr
    assert "Traceback" not in done.stderr


def test_eval_scores_it(bloom: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a king.\n" * 3)
    done = llmctl("eval", text, "-m", bloom, "--json", "--seq-len", "64")
    assert done.returncode == 0, done.stderr
    assert "runs through transformers" in done.stderr
    assert '"perplexity"' in done.stdout


def test_training_refuses_it(bloom: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    done = llmctl("finetune", "-m", bloom, "--data", data, "-o", tmp_path / "run", "--max-steps", "1")
    assert done.returncode == 4
    assert "model_type 'bloom' is not supported" in done.stderr
    assert not (tmp_path / "run").exists()
