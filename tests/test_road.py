"""The whole road by the program's own commands: text, tokenizer, shards, a model, its score, a fine-tuned one, its words.

In English and in Chinese, each process a fresh one, as a person would do it. `transformers` is the judge of the models.
"""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
DATA = os.environ.get("LLMCTL_TEST_DATA")


def llmctl(*arguments: object, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "llmctl", *map(str, arguments)]
    environ = {**os.environ, "LLMCTL_MODEL": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, input=stdin, capture_output=True, cwd=REPOSITORY, env=environ, check=False)
    assert done.returncode == 0, (arguments, done.stderr.decode())
    return done


def english(folder: Path) -> tuple[Path, str, str]:
    path = folder / "english.txt"
    path.write_bytes((REPOSITORY / "examples" / "tinyshakespeare.txt").read_bytes()[:150_000])
    return path, "What news?", "Ill news, my lord: the king is dead."


def chinese(folder: Path) -> tuple[Path, str, str]:
    if DATA is None:
        pytest.skip("LLMCTL_TEST_DATA is not set")
    path = folder / "chinese.txt"
    with gzip.open(Path(DATA, "corpora", "zh_tang_poems_12k.txt.gz")) as poems:
        path.write_bytes(poems.read(150_000).decode("utf-8", "ignore").encode())
    return path, "床前明月光", "疑是地上霜。"


@pytest.mark.parametrize("language", [english, pytest.param(chinese, marks=pytest.mark.slow)])
def test_from_a_text_file_to_words(language: "type[None]", tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text, question, answer = language(tmp_path)  # type: ignore[call-arg, misc]
    tokenizer, shards, run, chat = (tmp_path / name for name in ("tokenizer", "shards", "run", "chat"))
    llmctl("tokenize", "train", text, "--vocab-size", 600, "--chat", "-o", tokenizer)
    encoded = llmctl("tokenize", "encode", "--tokenizer", tokenizer, stdin=text.read_bytes()).stdout
    assert llmctl("tokenize", "decode", "--tokenizer", tokenizer, stdin=encoded).stdout == text.read_bytes()
    llmctl("tokenize", "pack", text, "--tokenizer", tokenizer, "-o", shards)
    llmctl("tokenize", "verify", shards)
    pretrain = ("--depth", 1, "--seq-len", 64, "--batch-size", 8, "--max-steps", 30, "--sample-every", 30, "--sample-tokens", 8)
    llmctl("pretrain", "--data", shards, "-o", run, *pretrain)
    step = run / "step-00000030"
    scored = json.loads(llmctl("eval", "--model", step, text, "--json", "--no-cache", "--limit", 1).stdout.splitlines()[-1])
    assert "bits_per_byte" in json.dumps(scored)

    rows = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    rows.write_text((json.dumps({"messages": turns}, ensure_ascii=False) + "\n") * 4, encoding="utf-8")
    finetune = ("--epochs", 40, "--batch-size", 4, "--lr", "3e-3", "--val-fraction", 0, "--save-every", 0, "--keep-last", 2)
    llmctl("finetune", "--model", step, "--data", rows, "-o", chat, *finetune)
    final = max(chat.glob("step-*"))
    said = llmctl("generate", "--model", final, "--temperature", 0, stdin=question.encode()).stdout.decode()
    assert said.strip() == answer

    ids = AutoTokenizer.from_pretrained(final)(question, return_tensors="pt").input_ids
    for folder in (step, final):
        from llmctl.core.checkpoint import load_model

        with torch.no_grad():
            theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
            ours = load_model(folder).model(ids)
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
