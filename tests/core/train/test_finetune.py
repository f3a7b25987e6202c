"""Supervised fine-tuning: packed documents, learned tokens, resume, and what a run leaves behind."""

import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from llmctl.core.checkpoint import load_model, save_model
from llmctl.core.config import ModelConfig
from llmctl.core.config.finetune import FinetuneConfig
from llmctl.core.data.loader import IGNORE, batch_at
from llmctl.core.data.packing import EncodedRows, PackedSource
from llmctl.core.errors import InputError, Interrupted, NotFoundError, PartialFailure, UsageError
from llmctl.core.files import sha256_file
from llmctl.core.model import Decoder
from llmctl.core.tokenizer import CHATML_TEMPLATE, Tokenizer
from llmctl.core.train.events import EvalDone, Finished, RowsRead, StepDone, Warned
from llmctl.core.train.finetune import train
from llmctl.core.train.objectives import NextToken
from tests.core.data.chat_tokenizers import byte_tokenizer
from tests.core.data.test_chat import write_jsonl
from tests.core.model.tiny import SHAPE


def shape(**facts: object) -> ModelConfig:
    return ModelConfig(**{**SHAPE, **facts})  # type: ignore[arg-type]


def tiny_model(**facts: object) -> Decoder:
    model = Decoder(shape(**facts))
    model.init_weights(torch.Generator().manual_seed(0))
    return model.double()


def random_rows(count: int, *, longest: int) -> EncodedRows:
    draw = np.random.default_rng(1)
    lengths = draw.integers(2, longest + 1, count)
    total = int(lengths.sum())
    learn = draw.random(total) < 0.6
    learn[np.cumsum(lengths) - 1] = True
    return EncodedRows(draw.integers(0, 61, total).astype(np.int32), learn, np.cumsum(lengths))


@pytest.mark.parametrize(
    "facts",
    [{}, {"positions": "learned"}, {"qk_norm": True, "tie_embeddings": True}, {"windows": (5, None)}, {"attention_softcap": 5.0}],
    ids=["rope", "learned", "qk-norm", "window", "soft-cap"],
)
def test_packed_rows_have_the_loss_and_the_gradient_of_the_rows_alone(facts: dict[str, object]) -> None:
    model = tiny_model(**facts)
    rows = random_rows(11, longest=20)
    source = PackedSource(rows, seq_len=24, seed=4, data_hash="x")
    batch = batch_at(source, 0, source.samples_per_epoch)
    objective = NextToken()
    packed = objective.loss(model, batch, total_weight=objective.weight_of(batch))
    packed.backward()
    packed_gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    losses, num_learned = torch.zeros((), dtype=torch.float64), 0
    for number in range(len(rows)):
        ids, learn = rows.row(number)
        logits = model(torch.from_numpy(ids[:-1].astype(np.int64))[None])[0]  # (T, V)
        targets = torch.from_numpy(np.where(learn[1:], ids[1:], IGNORE).astype(np.int64))
        losses = losses + F.cross_entropy(logits, targets, reduction="sum")
        num_learned += int((targets != IGNORE).sum())
    alone = losses / num_learned
    alone.backward()

    assert objective.weight_of(batch) == num_learned
    torch.testing.assert_close(packed, alone, rtol=1e-12, atol=1e-12)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            packed_gradients[name], parameter.grad, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )


# --- whole runs, on a tiny model in a directory


def tiny_base(folder: Path, *, tokenizer: Tokenizer | None = None, vocab_size: int | None = None, max_positions: int = 128) -> Path:
    """A base model of two layers with a byte-level tokenizer, as a Hugging Face directory."""
    tokenizer = tokenizer or byte_tokenizer(chat_template=None)
    config = shape(vocab_size=vocab_size or tokenizer.vocab_size, hidden_size=64, mlp_size=128, head_dim=16, max_positions=max_positions)
    model = Decoder(dataclasses.replace(config, initializer_range=0.02))
    model.init_weights(torch.Generator().manual_seed(1))
    folder.mkdir()
    save_model(folder, config=config, family="llama", tensors=model.state_dict(), tokenizer=tokenizer)
    return folder


QUESTIONS = [("Who are you?", "A small model."), ("2 + 2?", "4"), ("Sky?", "Blue <|im_end|> blue."), ("你好", "你好！")]
ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]} for question, answer in QUESTIONS
]


def config_of(tmp_path: Path, **settings: Any) -> FinetuneConfig:
    data = tmp_path / "rows.jsonl"
    if not data.exists():
        write_jsonl(data, ROWS)
    if not (tmp_path / "base").exists():
        tiny_base(tmp_path / "base")
    return FinetuneConfig(
        **{
            "model": str(tmp_path / "base"),
            "data": (data,),
            "out_dir": tmp_path / "run",
            "seq_len": 64,
            "batch_size": 2,
            "learning_rate": 1e-3,
            "max_steps": 6,
            "dtype": "f32",
            "device": "cpu",
            "threads": 1,
            **settings,
        }
    )


def run_all(config: FinetuneConfig) -> list[Any]:
    return list(train(config))


def test_a_tiny_model_learns_its_answers_by_heart_and_stops_after_them(tmp_path: Path) -> None:
    """transformers loads the checkpoint, applies its chat template and generates: text and end are what was taught."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = config_of(tmp_path, max_steps=150, learning_rate=5e-3, batch_size=4, save_every=0, log_every=100)
    finished = run_all(config)[-1]
    assert isinstance(finished, Finished)
    model = AutoModelForCausalLM.from_pretrained(finished.path).eval()
    tokenizer = AutoTokenizer.from_pretrained(finished.path)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in model.generation_config.eos_token_id
    for question, answer in QUESTIONS:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        ids = model.generate(prompt, max_new_tokens=60, do_sample=False, attention_mask=torch.ones_like(prompt))[0, prompt.shape[1] :]
        assert tokenizer.decode(ids, skip_special_tokens=False) == answer + "<|im_end|>"
        assert len(ids) < 60


def test_a_checkpoint_gives_transformers_our_logits(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    path = Path(run_all(config_of(tmp_path))[-1].path)
    tokens = torch.arange(40)[None] * 5 % 250
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(tokens).logits
        ours = load_model(path, dtype=torch.float32).model(tokens)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def digests(folder: Path) -> dict[str, str]:
    return {name: sha256_file(folder / name) for name in ("model.safetensors", "trainer/optimizer.safetensors")}


@pytest.mark.parametrize("stops", [(3,), (1, 2, 5)])
def test_a_run_stopped_and_resumed_equals_an_unbroken_one(tmp_path: Path, stops: tuple[int, ...]) -> None:
    whole = run_all(config_of(tmp_path, out_dir=tmp_path / "whole"))
    seen: list[int] = []

    def run_to(number: int) -> None:
        for event in train(config_of(tmp_path, resume=bool(seen)), stop=lambda: signal.SIGTERM if len(seen) >= number else None):
            if isinstance(event, StepDone):
                seen.append(event.step)

    for number in stops:
        with pytest.raises(Interrupted) as caught:
            run_to(number)
        assert caught.value.exit_code == 143
    rest = run_all(config_of(tmp_path, resume=True))
    seen += [event.step for event in rest if isinstance(event, StepDone)]
    assert seen == list(range(1, 7))
    assert digests(Path(rest[-1].path)) == digests(Path(whole[-1].path))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"data": "order"}, InputError, "cannot resume with other data"),
        ({"data": "content"}, InputError, "cannot resume with other data"),
        ({"model": "other"}, InputError, "cannot resume with other base_model"),
        ({"chat_template": "other"}, InputError, "cannot resume with other chat_template"),
        ({"learning_rate": 2e-3}, UsageError, "--allow-change learning_rate"),
        ({"mask_prompt": False}, UsageError, "--allow-change mask_prompt"),
        ({"seq_len": 32, "batch_size": 2}, UsageError, "--allow-change seq_len"),
    ],
)
def test_a_resume_with_something_else_is_refused(tmp_path: Path, change: dict[str, Any], error: type, message: str) -> None:
    run_all(config_of(tmp_path, max_steps=2))
    before = digests(tmp_path / "run" / "step-00000002")
    change = dict(change)
    if "data" in change:
        rows = ROWS[::-1] if change["data"] == "order" else [*ROWS[:3], {"messages": [ROWS[3]["messages"][0], ROWS[0]["messages"][1]]}]
        change["data"] = (write_jsonl(tmp_path / "other.jsonl", rows),)
    if "model" in change:
        model = tiny_base(tmp_path / "other")
        weights = load_file(model / "model.safetensors")
        save_file({name: tensor * 1.01 for name, tensor in weights.items()}, model / "model.safetensors", metadata={"format": "pt"})
        change["model"] = str(model)
    if "chat_template" in change:
        change["chat_template"] = tmp_path / "other.jinja"
        change["chat_template"].write_text(CHATML_TEMPLATE + " ")
    with pytest.raises(error, match=message):
        run_all(config_of(tmp_path, resume=True, **{"max_steps": 2, **change}))
    assert digests(tmp_path / "run" / "step-00000002") == before


def test_the_base_model_is_only_read(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    before = {path.name: sha256_file(path) for path in (tmp_path / "base").iterdir()}
    for path in (tmp_path / "base").iterdir():
        path.chmod(0o444)
    (tmp_path / "base").chmod(0o555)
    run_all(config)
    assert {path.name: sha256_file(path) for path in (tmp_path / "base").iterdir()} == before


def test_skipped_rows_are_listed_and_end_in_a_partial_failure(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [ROWS[0], {"messages": []}, *ROWS[1:]])
    with pytest.raises(InputError, match="row 2"):
        run_all(config_of(tmp_path))
    assert not (tmp_path / "run").exists()
    events = []
    with pytest.raises(PartialFailure, match="1 bad rows were skipped"):
        events.extend(train(config_of(tmp_path, on_error="skip")))
    listed = [json.loads(line) for line in (tmp_path / "run" / "skipped_rows.jsonl").read_text().splitlines()]
    assert [(line["row"], line["file"]) for line in listed] == [(2, str(tmp_path / "rows.jsonl"))]
    assert (tmp_path / "run" / "step-00000006" / "model.safetensors").is_file()


def test_what_was_read_is_told_before_the_plan(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "val.jsonl", ROWS[:2])
    events = run_all(config_of(tmp_path, val_data=(tmp_path / "val.jsonl",), eval_every=3))
    kinds = [type(event).__name__ for event in events]
    assert kinds[:4] == ["Warned", "RowsRead", "RowsRead", "Planned"]
    read = [event for event in events if isinstance(event, RowsRead)]
    assert [(r.split, r.num_rows, r.num_examples) for r in read] == [("train", 4, 4), ("val", 2, 2)]
    steps = [event for event in events if isinstance(event, StepDone)]
    assert sum(step.num_tokens for step in steps[: read[0].num_sequences // 2]) <= read[0].num_learned
    evaluations = [event for event in events if isinstance(event, EvalDone)]
    assert [event.num_tokens for event in evaluations] == [read[1].num_learned] * 2
    assert evaluations[0].bits_per_byte is not None


def test_the_loss_of_a_step_is_the_mean_over_the_answers_of_its_rows(tmp_path: Path) -> None:
    """An epoch in one step: the first loss is that of transformers' model on the rows alone, answers only."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = config_of(tmp_path, max_steps=1, batch_size=64)
    events = run_all(config)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(events[-1].path)  # the base has no template; the result has the default one
    total, count = 0.0, 0
    for row in ROWS:
        if "<|im_end|>" in row["messages"][1]["content"]:
            continue  # transformers would take it for the control token
        ids = tokenizer.apply_chat_template(row["messages"], return_dict=False)
        prompt = tokenizer.apply_chat_template(row["messages"][:1], add_generation_prompt=True, return_dict=False)
        labels = torch.tensor([[-100] * len(prompt) + ids[len(prompt) : -1] + [-100]])  # the template's last newline is not learned
        learned = int((labels != -100).sum())
        with torch.no_grad():
            total += float(model(torch.tensor([ids]), labels=labels).loss) * learned
        count += learned
    only = [row for row in ROWS if "<|im_end|>" not in row["messages"][1]["content"]]
    write_jsonl(tmp_path / "rows.jsonl", only)
    (step,) = [event for event in run_all(dataclasses.replace(config, out_dir=tmp_path / "again")) if isinstance(event, StepDone)]
    assert step.num_tokens == count
    assert step.loss == pytest.approx(total / count, abs=1e-5)


def test_a_tokenizer_larger_than_the_model_needs_a_word(tmp_path: Path) -> None:
    vocab_size = byte_tokenizer().vocab_size
    tiny_base(tmp_path / "base", vocab_size=vocab_size - 2)
    with pytest.raises(InputError, match=f"{vocab_size} ids, the model has {vocab_size - 2} embeddings; --resize-vocab"):
        run_all(config_of(tmp_path))
    path = Path(run_all(config_of(tmp_path, resize_vocab=True, max_steps=1, learning_rate=1e-9))[-1].path)
    old, new = load_model(tmp_path / "base").model.state_dict(), load_model(path).model.state_dict()
    assert new["embed.weight"].shape[0] == vocab_size
    torch.testing.assert_close(new["embed.weight"][:-2], old["embed.weight"], atol=1e-6, rtol=0)
    torch.testing.assert_close(new["embed.weight"][-1], old["embed.weight"].mean(0), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"model": None}, UsageError, "--model is missing"),
        ({"data": ()}, UsageError, "--data is missing"),
        ({"data": (Path("/nowhere.jsonl"),)}, NotFoundError, "/nowhere.jsonl: no such file"),
        ({"model": "/nowhere"}, NotFoundError, "nowhere"),
        ({"chat_template": Path("/nowhere.jinja")}, NotFoundError, "--chat-template /nowhere.jinja: no such file"),
        ({"seq_len": 129}, UsageError, "the model sees 128 tokens"),
        ({"seq_len": 8}, InputError, "no answer token within --seq-len 8"),
        ({"val_fraction": 1e-9}, UsageError, "leaves no row for validation"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_created(
    tmp_path: Path, settings: dict[str, Any], error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        run_all(config_of(tmp_path, **settings))
    assert not (tmp_path / "run").exists()


def test_a_used_run_folder_is_refused_before_the_rows_are_read(tmp_path: Path) -> None:
    run_all(config_of(tmp_path, max_steps=1))
    (tmp_path / "rows.jsonl").write_text("not json")
    with pytest.raises(UsageError, match="a run is there already"):
        run_all(config_of(tmp_path, max_steps=1))


@pytest.mark.parametrize("bad", [{"lora_alpha": 2.0}, {"val_data": (Path("x"),), "val_fraction": 0.1}, {"epochs": 1.0, "max_steps": 1}])
def test_settings_that_contradict_are_usage_errors(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        FinetuneConfig(**bad)


def test_a_small_file_still_gives_several_steps_an_epoch(tmp_path: Path) -> None:
    """By default a step holds about 16 rows, however many fit in a sequence."""
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(160)])
    events = run_all(config_of(tmp_path, seq_len=None, batch_size=None, max_steps=None, epochs=1.0, dry_run=True))
    plan = events[-1]
    assert plan.seq_len == 128
    assert 6 <= plan.num_steps <= 16


def test_a_base_model_without_control_tokens_learns_through_the_plain_template(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tiny_base(tmp_path / "base", tokenizer=byte_tokenizer(("<|endoftext|>",), chat_template=None))
    rows = [{"instruction": "Name", "input": "a colour", "output": "Red"}, {"instruction": "Count", "output": "1 2 3"}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    events = run_all(config_of(tmp_path, max_steps=60, learning_rate=1e-2, seq_len=128, save_every=0))
    assert any(isinstance(event, Warned) and "default plain-text" in event.message for event in events)
    model = AutoModelForCausalLM.from_pretrained(events[-1].path).eval()
    tokenizer = AutoTokenizer.from_pretrained(events[-1].path)
    for question, answer in (("Name\na colour", "Red"), ("Count", "1 2 3")):
        text = f"### Instruction:\n{question}\n\n### Response:\n"
        prompt = tokenizer(text, return_tensors="pt").input_ids
        chat = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False)
        assert chat == prompt[0].tolist()
        ids = model.generate(prompt, max_new_tokens=20, do_sample=False, attention_mask=torch.ones_like(prompt))[0, prompt.shape[1] :]
        assert tokenizer.decode(ids) == answer + "<|endoftext|>"


def test_plain_completions_leave_a_base_model_without_a_template(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "Once upon", "completion": " a time"}])
    path = Path(run_all(config_of(tmp_path, max_steps=1))[-1].path)
    assert not (path / "chat_template.jinja").exists()
    templated = run_all(config_of(tmp_path, max_steps=1, chat=True, out_dir=tmp_path / "chat"))
    assert (Path(templated[-1].path) / "chat_template.jinja").read_text() == CHATML_TEMPLATE
