"""LoRA fine-tuning: the same trainer and the same resume, over a base that stays as it is."""

import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmctl.core.card import told_by
from llmctl.core.checkpoint import load_model, load_tokenizer, save_model
from llmctl.core.config.export import ExportConfig
from llmctl.core.config.finetune import FinetuneConfig
from llmctl.core.errors import InputError, Interrupted, UsageError
from llmctl.core.export.export import export
from llmctl.core.files import check_manifest, sha256_file
from llmctl.core.train.events import CheckpointSaved, EvalDone, Finished, Planned, StepDone
from llmctl.core.train.finetune import train
from tests.core.train.test_finetune import QUESTIONS, config_of, run_all, tiny_base

FILES = ("adapter_model.safetensors", "trainer/optimizer.safetensors")


def lora(tmp_path: Path, **settings: Any) -> FinetuneConfig:
    return config_of(tmp_path, **{"method": "lora", "lora_rank": 4, "lora_dropout": 0.3, "learning_rate": 1e-2, **settings})


def digests(folder: str | Path) -> dict[str, str]:
    return {name: sha256_file(Path(folder) / name) for name in FILES}


def test_a_checkpoint_holds_the_adapter_and_the_base_is_only_read(tmp_path: Path) -> None:
    config = lora(tmp_path)
    before = {path.name: sha256_file(path) for path in (tmp_path / "base").iterdir()}
    events = run_all(config)
    path = Path(events[-1].path)
    assert {path.name: sha256_file(path) for path in (tmp_path / "base").iterdir()} == before
    assert not (path / "model.safetensors").exists()
    assert (path / "tokenizer.json").is_file()
    assert (path / "README.md").is_file()
    written = json.loads((path / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(tmp_path / "base")
    plan = next(event for event in events if isinstance(event, Planned))
    tensors = load_file(path / FILES[0])
    assert plan.num_trained == sum(tensor.numel() for tensor in tensors.values())
    saved = next(event for event in events if isinstance(event, CheckpointSaved))
    weights = sum((path / name).stat().st_size for name in FILES)
    assert plan.checkpoint_bytes <= weights < 1.2 * plan.checkpoint_bytes
    assert saved.num_bytes < (tmp_path / "base" / "model.safetensors").stat().st_size
    assert set(load_file(path / FILES[1])) == {
        f"layers.{i}.{name}.{kind}.{moment}"
        for i in range(2)
        for name in ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
        for kind in ("lora_a", "lora_b")
        for moment in ("exp_avg", "exp_avg_sq")
    }


def test_the_dry_run_counts_a_frozen_base_once(tmp_path: Path) -> None:
    plans = [run_all(config)[-1] for config in (config_of(tmp_path, dry_run=True), lora(tmp_path, dry_run=True))]
    full, adapters = plans
    saved = 4 * (full.num_parameters - adapters.num_trained) * 3  # gradients and two moments
    assert full.num_trained == full.num_parameters == adapters.num_parameters
    assert full.memory_bytes - adapters.memory_bytes == saved - 4 * adapters.num_trained
    multiplied = full.num_parameters - (267 + 5) * 64  # all but the embeddings and the norms
    assert full.flops_per_token - adapters.flops_per_token == 2 * multiplied - 6 * adapters.num_trained


@pytest.mark.parametrize("stops", [(3,), (1, 2, 5)])
def test_a_run_stopped_and_resumed_equals_an_unbroken_one(tmp_path: Path, stops: tuple[int, ...]) -> None:
    """With dropout, and stopped between the micro-batches of a step: the broken-off half leaves no trace."""
    whole = run_all(lora(tmp_path, out_dir=tmp_path / "whole", micro_batch_size=1))
    seen: list[int] = []

    def run_to(number: int) -> None:
        calls_since = 0

        def stop() -> int | None:
            nonlocal calls_since
            calls_since += len(seen) >= number
            return signal.SIGTERM if calls_since > 2 else None  # one call before a step, one before each micro-batch

        for event in train(lora(tmp_path, resume=bool(seen), micro_batch_size=1), stop=stop):
            if isinstance(event, StepDone):
                seen.append(event.step)

    for number in stops:
        with pytest.raises(Interrupted):
            run_to(number)
    rest = run_all(lora(tmp_path, resume=True, micro_batch_size=1))
    seen += [event.step for event in rest if isinstance(event, StepDone)]
    assert seen == list(range(1, 7))
    assert digests(rest[-1].path) == digests(whole[-1].path)


def test_the_held_out_loss_is_that_of_the_saved_adapter_without_dropout(tmp_path: Path) -> None:
    """Measured a second time by full fine-tuning at rate 0 from the merged model."""
    config = lora(tmp_path, max_steps=4, eval_every=4)
    config = dataclasses.replace(config, val_data=config.data)
    events = run_all(config)
    last = [event for event in events if isinstance(event, EvalDone)][-1]
    merged = load_model(tmp_path / "base", adapter=Path(events[-1].path))
    (tmp_path / "merged").mkdir()
    tokenizer = load_tokenizer(Path(events[-1].path))
    save_model(tmp_path / "merged", config=merged.config, family="llama", tensors=merged.model.state_dict(), tokenizer=tokenizer)
    still = config_of(
        tmp_path, model=str(tmp_path / "merged"), out_dir=tmp_path / "still", val_data=config.data, learning_rate=1e-12, max_steps=1
    )
    (again,) = [event for event in run_all(still) if isinstance(event, EvalDone)]
    assert again.loss == pytest.approx(last.loss, abs=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": "other"}, InputError, "cannot resume with other base_model"),
        ({"lora_rank": 8}, UsageError, "--allow-change lora_rank"),
        ({"lora_dropout": 0.1}, UsageError, "--allow-change lora_dropout"),
        ({"lora_targets": ("q_proj",)}, UsageError, "--allow-change lora_targets"),
    ],
)
def test_a_resume_with_something_else_is_refused(tmp_path: Path, change: dict[str, Any], error: type, message: str) -> None:
    run_all(lora(tmp_path, max_steps=1, lora_alpha=8.0))
    before = digests(tmp_path / "run" / "step-00000001")
    if "model" in change:
        model = tiny_base(tmp_path / "other")
        weights = load_file(model / "model.safetensors")
        save_file({name: tensor * 1.01 for name, tensor in weights.items()}, model / "model.safetensors", metadata={"format": "pt"})
        change = {"model": str(model)}
    with pytest.raises(error, match=message):
        run_all(lora(tmp_path, resume=True, **{"max_steps": 1, "lora_alpha": 8.0, **change}))
    assert digests(tmp_path / "run" / "step-00000001") == before


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"lora_targets": ("c_attn",)}, InputError, "--lora-targets c_attn: this model has no such module; it has q_proj"),
        ({"lora_rank": 500}, UsageError, "--lora-rank 500: the smallest matrix to adapt has rank"),
        ({"model": "adapter"}, InputError, "is an adapter, and training starts from a model"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_created(
    tmp_path: Path, settings: dict[str, Any], error: type, message: str
) -> None:
    if "model" in settings:
        settings = {"model": run_all(lora(tmp_path, max_steps=1, out_dir=tmp_path / "first"))[-1].path}
    with pytest.raises(error, match=message):
        run_all(lora(tmp_path, **settings))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "bad",
    [
        {"lora_rank": 4},
        {"lora_targets": ("q_proj",)},
        {"method": "lora", "resize_vocab": True},
        {"method": "lora", "lora_targets": ("all-linear", "q_proj")},
        {"method": "lora", "lora_targets": (",",)},
        {"method": "lora", "lora_rank": 0},
        {"method": "lora", "lora_dropout": 1.0},
    ],
)
def test_settings_that_contradict_are_usage_errors(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        FinetuneConfig(**bad)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_base_is_frozen_in_memory_too(tmp_path: Path, optimizer: str) -> None:
    """All that the result's merged matrices differ in is of the adapter's rank."""
    path = Path(run_all(lora(tmp_path, optimizer=optimizer))[-1].path)
    base = load_model(tmp_path / "base").model.state_dict()
    merged = load_model(tmp_path / "base", adapter=path).model.state_dict()
    for name, tensor in base.items():
        difference = (merged[name] - tensor).double()
        matrix = name.startswith("layers.") and tensor.ndim == 2
        assert bool(difference.any()) == matrix
        if matrix:
            values = torch.linalg.svdvals(difference)
            assert values[4] < 1e-5 * values[0]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_card_of_every_checkpoint_has_the_scores_of_its_evaluation(tmp_path: Path, method: str) -> None:
    """And so has what is exported from it; the checkpoints stay whole."""
    config = (
        lora(tmp_path, max_steps=4, eval_every=2, save_every=2) if method == "lora" else config_of(tmp_path, eval_every=2, save_every=2)
    )
    evaluations = [
        event for event in run_all(dataclasses.replace(config, max_steps=4, val_data=config.data)) if isinstance(event, EvalDone)
    ]
    for done in evaluations:
        folder = tmp_path / "run" / f"step-{done.step:08d}"
        told = told_by((folder / "README.md").read_text())
        assert told.scores["held-out loss, nats a token"] == pytest.approx(done.loss, rel=1e-5)
        assert told.scores["held-out bits per byte"] == pytest.approx(done.bits_per_byte, rel=1e-5)
        assert told.parent == "base"
        check_manifest(folder, hashes=True)
    assert {done.step for done in evaluations} == {2, 4}
    list(export(ExportConfig(model=str(folder), output=tmp_path / "out", dtype="bf16", verify=False)))
    exported = told_by((tmp_path / "out" / "README.md").read_text())
    assert exported.scores == {f"{name}, of the weights before rounding": value for name, value in told.scores.items()}
    assert exported.data == told.data
    assert exported.parent == "base"


@pytest.mark.slow
def test_a_tiny_model_learns_its_answers_by_heart_and_peft_generates_them(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoTokenizer

    finished = run_all(lora(tmp_path, max_steps=300, lora_dropout=0.0, lora_rank=16, batch_size=4, save_every=0, log_every=100))[-1]
    assert isinstance(finished, Finished)
    model = peft.AutoPeftModelForCausalLM.from_pretrained(finished.path).eval()
    tokenizer = AutoTokenizer.from_pretrained(finished.path)
    assert load_tokenizer(tmp_path / "base", adapter=Path(finished.path)).chat_template is not None
    ours = load_model(tmp_path / "base", adapter=Path(finished.path)).model
    for question, answer in QUESTIONS:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        with torch.no_grad():
            torch.testing.assert_close(ours(prompt), model(prompt).logits, atol=1e-4, rtol=1e-4)
        ids = model.generate(input_ids=prompt, max_new_tokens=60, do_sample=False, attention_mask=torch.ones_like(prompt))
        assert tokenizer.decode(ids[0, prompt.shape[1] :], skip_special_tokens=False).startswith(answer + "<|im_end|>")
