"""What `llmctl generate` tells of its choices, and end tokens: against transformers, torch and its own plain runs."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.generate_tools import Llmctl
from tests.cli.tiny_model import make_model

EOS = 256


@pytest.fixture(scope="module")
def theirs(model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model).eval()


def log_probs_of(theirs: Any, ids: list[int], num_new: int) -> torch.Tensor:
    """Log-probabilities (num_new, V) of each of the last `num_new` ids' places, computed from the whole text at once."""
    with torch.no_grad():
        logits = theirs(torch.tensor([ids])).logits[0, -num_new - 1 : -1].double()
    return torch.log_softmax(logits, -1)


def test_logprobs_are_those_of_the_model(llmctl: Llmctl, model: Path, theirs: Any) -> None:
    row = llmctl("-m", model, "Once", "-n", 8, "--seed", 5, "--json", "--logprobs", 3, "--temp", 1.3, "--dtype", "float32").rows[0]
    prompt = json.loads(llmctl("-m", model, "Once", "--show-prompt", "--json").out)["token_ids"]
    expected = log_probs_of(theirs, [*prompt, *row["token_ids"]], 8)
    assert [item["id"] for item in row["logprobs"]] == row["token_ids"]
    for place, item in enumerate(row["logprobs"]):
        assert item["logprob"] == pytest.approx(float(expected[place, item["id"]]), abs=1e-4)
        values, ids = expected[place].topk(3)
        assert [top["id"] for top in item["top"]] == ids.tolist()
        assert [top["logprob"] for top in item["top"]] == pytest.approx(values.tolist(), abs=1e-4)
    plain = llmctl("-m", model, "Once", "-n", 8, "--seed", 5, "--json", "--temp", 1.3, "--dtype", "float32").rows[0]
    assert {name: value for name, value in row.items() if name != "logprobs"} == plain
    settings = ("-n", 8, "--seed", 5, "--logprobs", 0, "--temp", 1.3, "--dtype", "float32")
    batch = llmctl("-m", model, "-i", "-", *settings, stdin=b'{"prompt": "Once"}')
    told = batch.rows[0]["logprobs"]
    assert [item["id"] for item in told] == row["token_ids"]
    assert all(item["top"] == [] for item in told)


def test_best_of_keeps_the_texts_that_are_most_probable_on_average(llmctl: Llmctl, model: Path) -> None:
    base = ("-m", model, "-n", 6, "--seed", 3, "--temp", 1.5)
    every = llmctl(*base, "Once", "--json", "--num-samples", 5, "--logprobs", 0).rows
    means = {row["text"]: math.fsum(item["logprob"] for item in row["logprobs"]) / len(row["logprobs"]) for row in every}
    ranked = sorted(means, key=lambda text: -means[text])[:2]
    best = llmctl(*base, "Once", "--json", "--num-samples", 2, "--best-of", 5).rows
    assert [row["text"] for row in best] == ranked
    assert [row["sample"] for row in best] == [0, 1]
    assert [row["score"] for row in best] == pytest.approx([means[text] for text in ranked])
    assert "logprobs" not in best[0]
    batch = llmctl(*base, "-i", "-", "--num-samples", 2, "--best-of", 5, "-b", 3, stdin=b'{"prompt": "Once"}\n{"prompt": ""}\n')
    assert batch.code == 3
    assert [(row["sample"], row["text"]) for row in batch.rows if "text" in row] == [(0, ranked[0]), (1, ranked[1])]


def test_a_batch_with_best_of_goes_on_where_a_sample_is_missing(llmctl: Llmctl, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    (tmp_path / "in.jsonl").write_text('{"prompt": "Once"}\n{"prompt": "upon"}\n')
    job = ("-m", model, "-n", 4, "--seed", 3, "-i", tmp_path / "in.jsonl", "-o", out, "--num-samples", 2, "--best-of", 3)
    assert llmctl(*job).code == 0
    whole = out.read_bytes()
    assert len(whole.splitlines()) == 4
    out.write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]))
    assert llmctl(*job).code == 0
    found, wanted = ({(row["id"], row["sample"]): row for row in map(json.loads, text.splitlines())} for text in (out.read_bytes(), whole))
    assert found == {key: {**row, "score": pytest.approx(row["score"], abs=1e-4)} for key, row in wanted.items()}
    assert llmctl(*job[:-1], 4).code == 4, "another --best-of is another job"


@pytest.fixture(scope="module")
def ending_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose most likely token is the end of text at many places: its row in the head is enlarged."""
    from safetensors.torch import load_file, save_file

    folder = make_model(tmp_path_factory.mktemp("ending"))
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][EOS] *= 6
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_min_new_tokens_equals_transformers(llmctl: Llmctl, ending_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(ending_model)
    num_early = 0
    for text in ("Once", "upon", "a time", "there"):
        base = ("-m", ending_model, text, "-n", 12, "-t", 0, "--json", "--dtype", "float32")
        prompt = json.loads(llmctl(*base, "--show-prompt").out)["token_ids"]
        ids = torch.tensor([prompt])
        wanted = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, min_new_tokens=7, do_sample=False, pad_token_id=0
        )
        found = llmctl(*base, "--min-new-tokens", 7).rows[0]
        assert found["token_ids"] == wanted[0, len(prompt) :].tolist()
        num_early += llmctl(*base).rows[0]["num_new_tokens"] < 7
    assert num_early, "no text ended early by itself, so nothing was tested"


def test_ignore_eos_goes_on_with_the_same_tokens(llmctl: Llmctl, ending_model: Path) -> None:
    num_ended = 0
    for text in ("Once", "upon", "a time", "there"):
        base = ("-m", ending_model, text, "-n", 12, "-t", 0, "--json")
        plain, whole = llmctl(*base).rows[0], llmctl(*base, "--ignore-eos").rows[0]
        assert (whole["finish"], whole["num_new_tokens"]) == ("length", 12)
        assert whole["token_ids"][: plain["num_new_tokens"]] == plain["token_ids"]
        assert "<|endoftext|>" not in whole["text"]
        num_ended += plain["finish"] == "eos"
    assert num_ended, "no text ended by itself, so nothing was tested"


def test_the_prompt_is_shown_as_the_model_reads_it(llmctl: Llmctl, chat_model: Path) -> None:
    from transformers import AutoTokenizer

    wanted = AutoTokenizer.from_pretrained(chat_model).apply_chat_template(
        [{"role": "user", "content": "hé\n"}], add_generation_prompt=True, return_dict=False
    )
    found = llmctl("-m", chat_model, "hé\n", "--show-prompt")
    assert found.code == 0
    lines = [line.split("\t") for line in found.out.splitlines()]
    assert [int(line[0]) for line in lines] == wanted
    assert lines[0] == ["257", '"<|im_start|>"', "special"]
    assert lines[1] == [lines[1][0], '"u"']
    assert json.loads(next(line for line in lines if line[1] == '"\\n"')[1]) == "\n"
    assert found.err == f"{len(wanted)} tokens\n"
    # a name of a special token in a person's text is text
    plain = json.loads(llmctl("-m", chat_model, "<|im_end|>", "--show-prompt", "--json").out)
    assert plain["is_special"].count(True) == 3
    assert plain["num_prompt_tokens"] == len(plain["token_ids"]) == len(plain["tokens"])


def test_stats_tell_counts_and_memory_on_stderr(llmctl: Llmctl, model: Path) -> None:
    found = llmctl("-m", model, "Once", "-n", 5, "-t", 0, "--stats", "-q")
    plain = llmctl("-m", model, "Once", "-n", 5, "-t", 0)
    assert found.bytes == plain.bytes
    pattern = (
        r"prompt: 4 tokens, [\d,.]+ tokens/s\nanswer: 5 tokens, [\d,.]+ tokens/s\n"
        r"first token: [\d.]+ s, after [\d.]+ s of loading\npeak memory: [\d,]+ MB.*\n"
    )
    assert re.fullmatch(pattern, found.err), found.err
    batch = llmctl("-m", model, "-i", "-", "-n", 5, "-t", 0, "--stats", stdin=b'{"prompt": "Once"}\n{"prompt": "On"}\n')
    assert re.search(r"prompts: 6 tokens.*\nanswers: 10 tokens.*\ntime: .*\npeak memory: ", batch.err), batch.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--logprobs", "2"], "--logprobs needs --json"),
        (["--best-of", "2", "--num-samples", "3"], "--best-of 2 is less than --num-samples 3"),
        (["--min-new-tokens", "9", "-n", "8"], "--min-new-tokens 9 is more than --max-new-tokens 8"),
        (["--show-prompt", "--stats"], "--stats does not go with --show-prompt"),
        (["--num-beams", "2", "--best-of", "2"], "--best-of does not go with --num-beams"),
        (["--logprobs", "-1"], "--logprobs: -1 is out of range"),
    ],
)
def test_what_does_not_go_together(llmctl: Llmctl, arguments: list[str], words: str) -> None:
    found = llmctl("x", *arguments)
    assert (found.code, found.bytes) == (2, b"")
    assert words in found.last
