"""What a run may do besides stepping: average, drop, skip, go back, make do with less memory. Each with what it must equal."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmctl.core.checkpoint import load_model
from llmctl.core.data.loader import EvalSource
from llmctl.core.data.shards import TokenDataset
from llmctl.core.errors import Interrupted, LlmctlError, NonFiniteError
from llmctl.core.files import read_json, sha256_file
from llmctl.core.train import pretrain as pretraining
from llmctl.core.train.evaluation import HeldOut, evaluate
from llmctl.core.train.events import EvalDone, Event, Finished, Profiled, StepDone, Warned
from llmctl.core.train.plan import compile_pays
from llmctl.core.train.spikes import Spikes
from tests.core.train.runs import of, run, stop_after

EVERYTHING = {"label_smoothing": 0.1, "z_loss": 1e-3, "dropout": 0.1, "ema": 0.9, "on_spike": "rewind", "warmup_steps": 3}


def fingerprints(step_dir: Path) -> dict[str, str]:
    return {str(p.relative_to(step_dir)): sha256_file(p) for p in sorted(step_dir.rglob("*.safetensors"))}


def logged(run_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith("_s") and k not in ("tokens_per_second", "peak_share")} for line in lines]


@pytest.mark.parametrize("dtype", ["f32", pytest.param("bf16", marks=pytest.mark.slow)])  # which test_pretrain.py tries for all
@pytest.mark.parametrize("questions", [2, 6, 17, 21, 38])
def test_with_everything_on_a_stopped_and_resumed_run_equals_an_unbroken_one(
    settings: dict[str, Any], run_once: Callable[..., tuple[list[Event], Path]], dtype: str, questions: int
) -> None:
    """Stopped in the warm-up, in the middle of an accumulation, in an evaluation, beside a save, in the second epoch; and again."""
    settings = {**settings, **EVERYTHING, "dtype": dtype, "epochs": 2.0, "max_steps": None}
    settings |= {"batch_size": 16, "save_every": 5, "eval_every": 4}
    events, unbroken = run_once(settings)
    last = f"step-{of(Finished, events)[0].step:08d}"
    for count in (questions, 3):
        with pytest.raises(Interrupted):
            run({**settings, "auto_resume": True}, stop=stop_after(count))
    run({**settings, "resume": True})
    assert fingerprints(settings["out_dir"] / last) == fingerprints(unbroken / last)
    assert logged(settings["out_dir"]) == logged(unbroken)


def test_each_of_them_changes_the_run(settings: dict[str, Any], tmp_path: Path) -> None:
    settings = {**settings, "max_steps": 2, "save_every": 0, "eval_every": 0}
    results = {}
    for name in ("", "label_smoothing", "z_loss", "dropout"):
        more = {name: EVERYTHING[name]} if name else {}
        run({**settings, **more, "out_dir": tmp_path / (name or "plain")})
        results[name] = fingerprints(tmp_path / (name or "plain") / "step-00000002")["model.safetensors"]
    assert len(set(results.values())) == 4


def test_dropout_is_the_same_in_any_micro_batches(settings: dict[str, Any], tmp_path: Path) -> None:
    losses = []
    for micro in (8, 2, 1):
        events = run({**settings, "dropout": 0.2, "optimizer": "adamw", "micro_batch_size": micro, "out_dir": tmp_path / str(micro)})
        losses.append(torch.tensor([s.loss for s in of(StepDone, events)]))
    for other in losses[1:]:
        torch.testing.assert_close(other, losses[0], rtol=1e-4, atol=0)


def test_gradient_checkpointing_changes_no_bit(settings: dict[str, Any], tmp_path: Path) -> None:
    settings = {**settings, "dropout": 0.1, "depth": 2, "max_steps": 4}
    run({**settings, "out_dir": tmp_path / "kept"})
    run({**settings, "gradient_checkpointing": True})
    assert fingerprints(settings["out_dir"] / "step-00000004") == fingerprints(tmp_path / "kept" / "step-00000004")


def test_the_moving_average_is_that_of_the_saved_weights_and_is_evaluated(settings: dict[str, Any], packed: Path) -> None:
    events = run({**settings, "ema": 0.5, "save_every": 1, "keep_last": 20})
    average: dict[str, torch.Tensor] = {}
    model = pretraining.Decoder(load_model(settings["out_dir"] / "step-00000001").model.config)
    model.init_weights(torch.Generator().manual_seed(0))
    average = {name: tensor.double() for name, tensor in model.state_dict().items()}
    for step in range(1, 13):
        decay = min(0.5, step / (9 + step))
        weights = load_model(settings["out_dir"] / f"step-{step:08d}").model.state_dict()
        average = {name: decay * tensor + (1 - decay) * weights[name].double() for name, tensor in average.items()}
    found = load_model(settings["out_dir"] / "step-00000012" / "ema").model
    for name, tensor in found.state_dict().items():
        torch.testing.assert_close(tensor.double(), average[name], rtol=1e-5, atol=1e-6)
    plain, averaged = of(EvalDone, events)[-2:]
    assert (plain.averaged, averaged.averaged) == (False, True)
    held_out = HeldOut(EvalSource(TokenDataset.open(packed, "val"), 32), 4)
    for done, folder in ((plain, "step-00000012"), (averaged, "step-00000012/ema")):
        again = evaluate(load_model(settings["out_dir"] / folder).model, held_out, max_tokens=1 << 20, stop=lambda: None)
        assert done.loss == pytest.approx(again.loss, rel=1e-6)


def crowd(monkeypatch: pytest.MonkeyPatch, error: BaseException, *, most_rows: int) -> None:
    """Let memory be out beyond so many rows at a time."""
    original = pretraining.NextToken.loss

    def loss(self: Any, model: Any, batch: Any, *, total_weight: float) -> torch.Tensor:
        if batch.tokens.size(0) > most_rows:
            raise error
        return original(self, model, batch, total_weight=total_weight)

    monkeypatch.setattr(pretraining.NextToken, "loss", loss)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), MemoryError()],
    ids=["accelerator", "cpu", "python"],
)
def test_out_of_memory_halves_the_micro_batch_and_keeps_the_batch(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    run({**settings, "micro_batch_size": 2, "out_dir": tmp_path / "small"})
    crowd(monkeypatch, error, most_rows=2)
    events = run({**settings, "micro_batch_size": 8})
    assert [w.message[:46] for w in of(Warned, events)] == ["out of memory with micro-batches of 4 sequence"]
    assert fingerprints(settings["out_dir"] / "step-00000012") == fingerprints(tmp_path / "small" / "step-00000012")


def test_out_of_memory_with_one_sequence_is_an_error(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    crowd(monkeypatch, MemoryError("no room"), most_rows=0)
    with pytest.raises(LlmctlError, match=r"one sequence at a time \(no room\); give --gradient-checkpointing") as caught:
        run(settings)
    assert caught.value.exit_code == 1
    assert read_json(settings["out_dir"] / "status.json")["state"] == "failed"


def test_other_errors_of_torch_pass(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    crowd(monkeypatch, RuntimeError("shapes cannot be multiplied"), most_rows=0)
    with pytest.raises(RuntimeError, match="shapes"):
        run(settings)


def spoil(monkeypatch: pytest.MonkeyPatch, *, samples: range) -> None:
    """Let the loss of micro-batches that begin with these samples be far too high."""
    original = pretraining.NextToken.loss

    def loss(self: Any, model: Any, batch: Any, *, total_weight: float) -> torch.Tensor:
        result = original(self, model, batch, total_weight=total_weight)
        return result * 20 if batch.first_sample in samples else result

    monkeypatch.setattr(pretraining.NextToken, "loss", loss)


def test_a_spike_is_gone_back_from_and_its_data_left_out(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**settings, "max_steps": 40, "on_spike": "rewind", "save_every": 10}
    spoil(monkeypatch, samples=range(8 * 33, 8 * 34))  # those of step 34
    events = run({**settings, "out_dir": tmp_path / "unbroken"})
    (warning,) = of(Warned, events)
    assert warning.message.startswith("step 34: loss ")
    assert "back to step 30, and on without the data of the steps up to 34" in warning.message
    steps = [(s.step, s.first_sample) for s in of(StepDone, events)]
    assert steps[:34] == [(step, 8 * (step - 1)) for step in range(1, 35)]
    assert steps[34:] == [(step, 8 * (step + 3)) for step in range(31, 41)]
    lines = [line for line in logged(tmp_path / "unbroken") if line["kind"] == "step"]
    assert [line["step"] for line in lines] == list(range(1, 41))
    for questions in (3 * 31, 3 * 37):  # before and after going back
        again = {**settings, "out_dir": tmp_path / str(questions)}
        with pytest.raises(Interrupted):
            run(again, stop=stop_after(questions))
        run({**again, "resume": True})
        assert fingerprints(again["out_dir"] / "step-00000040") == fingerprints(tmp_path / "unbroken" / "step-00000040")
    monkeypatch.undo()
    events = run({**settings, "on_spike": "ignore"})
    assert of(Finished, events)


def test_spikes_that_go_on_end_the_run(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, samples=range(8 * 33, 8 * 300))
    with pytest.raises(NonFiniteError, match=r"is a spike.*has gone back 3 times from there"):
        run({**settings, "max_steps": 60, "on_spike": "rewind", "save_every": 30, "epochs": None})
    spoil(monkeypatch, samples=range(8 * 25, 8 * 26))
    with pytest.raises(NonFiniteError, match="no checkpoint to go back to"):
        run({**settings, "max_steps": 60, "on_spike": "rewind", "save_every": 0, "out_dir": settings["out_dir"].parent / "other"})


def test_what_a_spike_is() -> None:
    falling = Spikes()
    assert not any(falling.is_one(8 * math.exp(-step / 20) + 0.2 * math.sin(step)) for step in range(200))
    steady = Spikes([2.0 + 0.01 * (step % 7) for step in range(60)])
    assert len(steady.recent) == 50
    assert not steady.is_one(2.15)
    assert steady.is_one(2.5)
    assert steady.is_one(2.5), "a spike does not make the next one usual"
    assert not Spikes([1.0] * 19).is_one(100.0)
    assert Spikes([1.0] * 20).is_one(100.0)


def test_a_profile_covers_the_run_and_is_written_when_it_is_stopped_too(settings: dict[str, Any], tmp_path: Path) -> None:
    events = run({**settings, "profile": True, "sample_every": 6})
    (done,) = of(Profiled, events)
    assert done.num_steps == 9  # of twelve: two to warm up and one whose operators are timed are left out
    assert sum(done.seconds.values()) == pytest.approx(done.elapsed_s, rel=1e-6)
    assert all(done.seconds[name] > 0 for name in ("data", "forward", "backward", "optimizer", "logging", "saving", "evaluation"))
    content = read_json(settings["out_dir"] / "profile.json")
    assert content["step_peak_share"] == done.step_peak_share
    assert {"aten.mm"} & {row["operator"] for row in content["operators_of_one_step"]}
    with pytest.raises(Interrupted):
        run({**settings, "profile": True, "eval_every": 0, "out_dir": tmp_path / "stopped"}, stop=stop_after(3 * 8))
    assert read_json(tmp_path / "stopped" / "profile.json")["num_steps"] == 5


def test_compiling_is_left_to_long_runs_on_accelerators() -> None:
    assert not compile_pays(torch.device("cpu"), expected_s=1e6)
    assert not compile_pays(torch.device("cuda"), expected_s=60)
    assert compile_pays(torch.device("cuda"), expected_s=3600)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_a_compiled_run_resumes_to_the_bit_and_agrees_with_one_that_is_not(settings: dict[str, Any], tmp_path: Path, dtype: str) -> None:
    settings = {**settings, **EVERYTHING, "dtype": dtype, "compile": "on"}
    events = run({**settings, "out_dir": tmp_path / "unbroken"})
    with pytest.raises(Interrupted):
        run(settings, stop=stop_after(3 * 5 + 2))
    run({**settings, "resume": True})
    assert fingerprints(settings["out_dir"] / "step-00000012") == fingerprints(tmp_path / "unbroken" / "step-00000012")
    plain = run({**settings, "compile": "off", "out_dir": tmp_path / "plain"})
    pairs = zip(of(StepDone, events), of(StepDone, plain), strict=True)
    assert all(a.loss == pytest.approx(b.loss, rel=1e-4 if dtype == "f32" else 2e-2) for a, b in pairs)
