"""Pre-training end to end in one process: it learns, it resumes exactly, and it says what is wrong."""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from llmctl.core.checkpoint import load_model
from llmctl.core.config.pretrain import PretrainConfig
from llmctl.core.data.loader import IGNORE, EvalSource, batch_at
from llmctl.core.data.shards import TokenDataset
from llmctl.core.errors import InputError, Interrupted, LockedError, NonFiniteError, NotFoundError, UsageError, WriteError
from llmctl.core.files import read_json, sha256_file, write_json, write_manifest
from llmctl.core.train import plan as planning
from llmctl.core.train import pretrain as pretraining
from llmctl.core.train import state as checkpoints
from llmctl.core.train.events import CheckpointSaved, EvalDone, Event, Finished, Planned, Resumed, SampleDrawn, StepDone, Warned
from llmctl.core.train.loop import Trainer
from tests.core.train.runs import of, run, stop_after
from tests.tiny_data import make_packed


def fingerprints(step_dir: Path) -> dict[str, str]:
    names = ("model.safetensors", "trainer/optimizer.safetensors", "trainer/rng.safetensors")
    return {name: sha256_file(step_dir / name) for name in names}


def metric_lines(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def test_a_run_learns_saves_evaluates_and_says_so(settings: dict[str, Any]) -> None:
    events = run({**settings, "max_steps": 40, "sample_every": 20, "sample_prompt": "the"})
    (plan,) = of(Planned, events)
    assert events[0] is plan
    assert (plan.num_steps, plan.batch_tokens) == (40, 256)
    steps = of(StepDone, events)
    assert [s.step for s in steps] == list(range(1, 41))
    assert steps[0].loss == pytest.approx(math.log(512), rel=0.05)
    assert steps[-1].loss < 0.6 * steps[0].loss
    assert [s.step for s in of(SampleDrawn, events)] == [20, 40]
    assert of(SampleDrawn, events)[-1].text.startswith("the")
    assert [c.step for c in of(CheckpointSaved, events)] == list(range(4, 41, 4))
    saved_before_evaluated = [type(e) for e in events if isinstance(e, CheckpointSaved | EvalDone) and e.step == 12]
    assert saved_before_evaluated == [CheckpointSaved, EvalDone]
    (done,) = of(Finished, events)
    assert events[-1] is done
    run_dir = settings["out_dir"]
    assert sorted(p.name for p in run_dir.glob("step-*")) == ["step-00000036", "step-00000040"]
    assert read_json(run_dir / "status.json")["state"] == "done"
    assert [line["step"] for line in metric_lines(run_dir, "step")] == list(range(1, 41))
    assert not list(run_dir.glob(".tmp-*"))


def test_the_plan_counts_what_is_then_built_and_seen(settings: dict[str, Any], packed: Path) -> None:
    events = run({**settings, "dry_run": True, "out_dir": None})
    (plan,) = events
    assert isinstance(plan, Planned)
    events = run(settings)
    model = load_model(settings["out_dir"] / "step-00000012").model
    assert plan.num_parameters == sum(p.numel() for p in model.parameters())
    assert plan.learning_rate == pytest.approx(2 * 3e-3)  # a quarter of the width of 256 that 0.003 is for
    assert max(s.learning_rate for s in of(StepDone, events)) == pytest.approx(plan.learning_rate)
    assert plan.num_tokens == of(Finished, events)[0].tokens_seen
    assert plan.data_tokens == TokenDataset.open(packed, "train").num_tokens
    saved = of(CheckpointSaved, events)[-1]
    assert plan.checkpoint_bytes == pytest.approx(saved.num_bytes, rel=0.15)


def test_a_dry_run_creates_nothing(settings: dict[str, Any]) -> None:
    run({**settings, "dry_run": True})
    assert not settings["out_dir"].exists()


def test_held_out_loss_and_bits_per_byte_equal_a_float64_computation(settings: dict[str, Any], packed: Path) -> None:
    done = of(EvalDone, run(settings))[-1]
    model = load_model(settings["out_dir"] / "step-00000012", dtype=torch.float64).model
    dataset = TokenDataset.open(packed, "val")
    source = EvalSource(dataset, 32)
    batch = batch_at(source, 0, source.samples_per_epoch)
    total = F.cross_entropy(model(batch.tokens).view(-1, 512), batch.targets.view(-1), ignore_index=IGNORE, reduction="sum").item()
    ids = dataset.tokens_at(0, dataset.num_tokens)
    text_bytes = len(dataset.tokenizer().decode_bytes(ids[1:].tolist()))
    assert done.num_tokens == dataset.num_tokens - 1
    assert done.loss == pytest.approx(total / done.num_tokens, rel=1e-5)
    assert done.bits_per_byte == pytest.approx(total / math.log(2) / text_bytes, rel=1e-5)


@pytest.mark.parametrize("facts", [{}, {"family": "gpt2"}, {"family": "llama", "dtype": "bf16"}], ids=["qwen3", "gpt2", "llama-bf16"])
def test_transformers_loads_what_was_written(settings: dict[str, Any], facts: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    run({**settings, **facts, "max_steps": 3})
    folder = settings["out_dir"] / "step-00000003"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.randint(0, 512, (2, 32))
    assert theirs.dtype == torch.float32
    torch.testing.assert_close(load_model(folder).model(tokens), theirs(tokens).logits, rtol=0, atol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("the king sees gold")["input_ids"]) == "the king sees gold"


STOPS = [1, 5, 14, 16, 27]
BF16_STOPS = [pytest.param("bf16", stop, marks=[] if stop == 14 else [pytest.mark.slow]) for stop in STOPS]


@pytest.mark.parametrize(("dtype", "questions"), [*(("f32", stop) for stop in STOPS), *BF16_STOPS])
def test_a_stopped_and_resumed_run_equals_an_unbroken_one(
    settings: dict[str, Any], run_once: Callable[..., tuple[list[Event], Path]], dtype: str, questions: int
) -> None:
    settings = {**settings, "dtype": dtype, "epochs": 2.0, "max_steps": None, "batch_size": 16, "save_every": 0, "eval_every": 5}
    events, unbroken = run_once(settings)
    last = f"step-{of(Finished, events)[0].step:08d}"
    with pytest.raises(Interrupted) as caught:
        run(settings, stop=stop_after(questions))
    assert caught.value.exit_code == 143
    assert read_json(settings["out_dir"] / "status.json")["state"] == "interrupted"
    with pytest.raises(Interrupted):
        run({**settings, "resume": True}, stop=stop_after(3))
    events = run({**settings, "resume": True})
    assert of(Resumed, events)
    assert fingerprints(settings["out_dir"] / last) == fingerprints(unbroken / last)
    for kind in ("step", "eval"):
        ours, theirs = (
            [{k: v for k, v in line.items() if k in ("step", "loss", "grad_norm", "first_sample", "bits_per_byte")} for line in lines]
            for lines in (metric_lines(settings["out_dir"], kind), metric_lines(unbroken, kind))
        )
        assert ours == theirs


def test_a_request_to_save_saves_and_goes_on(settings: dict[str, Any]) -> None:
    asked = iter([False, True])
    events = run({**settings, "save_every": 0}, save_requested=lambda: next(asked, False))
    assert [c.step for c in of(CheckpointSaved, events)] == [2, 12]


def test_settings_of_a_resumed_run_must_be_its_own(settings: dict[str, Any], tmp_path: Path) -> None:
    run(settings)
    again = {**settings, "resume": True}
    with pytest.raises(UsageError, match=r"learning_rate: the run has 0\.006, 0\.5 was given.*--allow-change learning_rate"):
        run({**again, "learning_rate": 0.5})
    with pytest.raises(UsageError, match="seed"):
        run({**again, "seed": 3})
    with pytest.raises(UsageError, match="no such setting"):
        run({**again, "allow_change": ("learning_rat",)})
    with pytest.raises(InputError, match=r"other model .*num_layers: the run has 1, 2 was given"):
        run({**again, "depth": 2})
    other = make_packed(tmp_path / "other", num_words=2000, val_words=300, seed=5)
    with pytest.raises(InputError, match="other data"):
        run({**again, "data": other})
    before = fingerprints(settings["out_dir"] / "step-00000012")
    events = run({**again, "max_steps": 14, "learning_rate": 1e-4, "allow_change": ("max_steps", "learning-rate")})
    assert [s.step for s in of(StepDone, events)] == [13, 14]
    assert fingerprints(settings["out_dir"] / "step-00000012") == before


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def stopped(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The settings of a run of 12 steps that was stopped after step 9; checkpoints 8 and 9 are there."""
    settings = {
        "data": packed, "out_dir": tmp_path_factory.mktemp("stopped") / "run", "depth": 1, "seq_len": 32, "batch_size": 8, "max_steps": 12,
        "save_every": 4, "eval_every": 0, "sample_every": 0, "threads": 1, "dtype": "f32", "device": "cpu",
    }  # fmt: skip
    with pytest.raises(Interrupted):
        run(settings, stop=stop_after(2 * 9))
    assert [p.name for p in checkpoints.step_folders(settings["out_dir"])] == ["step-00000008", "step-00000009"]
    return settings


HARMS: dict[str, Callable[[Path], Any]] = {
    "flip": flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "delete": Path.unlink,
}


@pytest.mark.parametrize("harm", HARMS)
def test_every_damage_of_a_checkpoint_is_named_and_the_one_before_it_taken(stopped: dict[str, Any], tmp_path: Path, harm: str) -> None:
    names = [p.relative_to(stopped["out_dir"] / "step-00000009") for p in (stopped["out_dir"] / "step-00000009").rglob("*") if p.is_file()]
    names.remove(Path("README.md"))  # the card is written again when scores come; nothing reads it back
    assert Path("trainer/state.json") in names
    for number, name in enumerate(names):
        copy = tmp_path / str(number)
        shutil.copytree(stopped["out_dir"], copy)
        HARMS[harm](copy / "step-00000009" / name)
        found, (warning,) = checkpoints.newest_good(copy)
        assert found is not None
        assert found.state.step == 8
        assert name.name in warning
        with pytest.raises(InputError, match=name.name):
            checkpoints.open_checkpoint(copy / "step-00000009")


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(stopped: dict[str, Any], tmp_path: Path) -> None:
    settings = {**stopped, "out_dir": tmp_path / "run"}
    shutil.copytree(stopped["out_dir"], settings["out_dir"])
    flip(settings["out_dir"] / "step-00000009" / "trainer" / "optimizer.safetensors")
    with pytest.raises(InputError, match=r"optimizer.safetensors: sha256 mismatch"):
        run({**settings, "resume_from": settings["out_dir"] / "step-00000009"})
    events = run({**settings, "resume": True})
    assert any("sha256 mismatch" in w.message and "falling back" in w.message for w in of(Warned, events))
    assert of(Resumed, events)[0].step == 8
    assert [line["step"] for line in metric_lines(settings["out_dir"], "step")] == list(range(1, 13))
    assert (settings["out_dir"] / "unused-step-00000009").is_dir()


def test_only_bad_checkpoints_are_an_error_and_never_a_fresh_start(settings: dict[str, Any]) -> None:
    run(settings)
    for folder in checkpoints.step_folders(settings["out_dir"]):
        flip(folder / "model.safetensors")
    for mode in ("resume", "auto_resume"):
        with pytest.raises(InputError, match="none of the 2 checkpoints is good"):
            run({**settings, mode: True})


def test_resuming_nothing(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        run({**settings, "resume": True})
    with pytest.raises(NotFoundError):
        run({**settings, "resume_from": settings["out_dir"] / "step-00000004"})
    events = run({**settings, "auto_resume": True})
    assert any("starts afresh" in w.message for w in of(Warned, events))
    assert of(Finished, events)


def test_a_used_folder_is_refused_and_left_alone(settings: dict[str, Any], tmp_path: Path) -> None:
    run(settings)
    before = {p: p.stat().st_mtime_ns for p in settings["out_dir"].rglob("*") if p.is_file() and p.name != "run.lock"}
    with pytest.raises(UsageError, match="--resume"):
        run(settings)
    assert before == {p: p.stat().st_mtime_ns for p in settings["out_dir"].rglob("*") if p.is_file() and p.name != "run.lock"}
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="not empty"):
        run({**settings, "out_dir": foreign})
    assert [p.name for p in foreign.iterdir()] == ["thesis.tex"]


def test_two_runs_never_share_a_folder(settings: dict[str, Any]) -> None:
    events = pretraining.train(PretrainConfig(**settings))
    next(e for e in events if isinstance(e, StepDone))
    for mode in ({}, {"resume": True}, {"auto_resume": True}):
        with pytest.raises(LockedError, match="pid"):
            run({**settings, **mode})
    events.close()  # type: ignore[attr-defined]
    assert read_json(settings["out_dir"] / "status.json")["state"] == "interrupted"


def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_the_last_good_step(settings: dict[str, Any]) -> None:
    with pytest.raises(NonFiniteError, match=r"step \d+: .* not finite; the last good step is \d+"):
        run({**settings, "learning_rate": 1e9, "muon_learning_rate": 1e9, "max_steps": 50, "save_every": 1})
    assert read_json(settings["out_dir"] / "status.json")["state"] == "failed"
    for folder in checkpoints.step_folders(settings["out_dir"]):
        tensors = load_model(folder).model.state_dict()
        assert all(t.isfinite().all() for t in tensors.values())


def poison(monkeypatch: pytest.MonkeyPatch, *, micro_batches: set[int]) -> None:
    """Put an infinity into the gradient after the given micro-batches, counted from 0."""
    original, count = pretraining.NextToken.loss, 0

    def loss(self: Any, model: Any, batch: Any, *, total_weight: float) -> torch.Tensor:
        nonlocal count
        result = original(self, model, batch, total_weight=total_weight)
        count += 1
        return result + float("inf") * model.final_norm.weight[0] * 0.0 if count - 1 in micro_batches else result

    monkeypatch.setattr(pretraining.NextToken, "loss", loss)


def test_one_bad_micro_batch_is_found_and_can_be_skipped(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, micro_batches={5, 9})
    with pytest.raises(NonFiniteError, match="last good step is 2"):
        run(settings)
    shutil.rmtree(settings["out_dir"])
    monkeypatch.undo()
    poison(monkeypatch, micro_batches={5, 9})
    events = run({**settings, "nonfinite": "skip:2"})
    assert [s.step for s in of(StepDone, events) if s.skipped] == [3, 5]
    assert of(Finished, events)[0].skipped_steps == 2
    assert [line["step"] for line in metric_lines(settings["out_dir"], "step") if line["skipped"]] == [3, 5]
    shutil.rmtree(settings["out_dir"])
    monkeypatch.undo()
    poison(monkeypatch, micro_batches={5, 9})
    with pytest.raises(NonFiniteError, match="after 1 skipped"):
        run({**settings, "nonfinite": "skip:1"})


def test_nan_in_a_checkpoint_stops_the_first_step(settings: dict[str, Any]) -> None:
    from safetensors.torch import load_file, save_file

    run(settings)
    folder = settings["out_dir"] / "step-00000012"
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "manifest.json").unlink()
    write_manifest(folder)
    with pytest.raises(NonFiniteError, match="step 13"):
        run({**settings, "resume": True, "max_steps": 20, "allow_change": ("max_steps",)})


def test_other_versions_only_cost_bit_identity(settings: dict[str, Any]) -> None:
    with pytest.raises(Interrupted):
        run(settings, stop=stop_after(7))
    (folder,) = checkpoints.step_folders(settings["out_dir"])
    state = read_json(folder / "trainer" / "state.json")
    write_json(folder / "trainer" / "state.json", {**state, "torch_version": "1.0", "threads": 99, "added_later": 1})
    (folder / "manifest.json").unlink()
    write_manifest(folder)
    events = run({**settings, "resume": True})
    assert any("bit-identity" in w.message and "torch 1.0 then" in w.message for w in of(Warned, events))


def test_losing_the_log_stops_nothing_and_is_said_once(settings: dict[str, Any]) -> None:
    events: list[Event] = []
    for event in pretraining.train(PretrainConfig(**settings)):
        events.append(event)
        if isinstance(event, StepDone) and event.step in (3, 6):
            (settings["out_dir"] / "metrics.jsonl").unlink()
    assert sum("was deleted" in w.message for w in of(Warned, events)) == 1
    assert of(Finished, events)


def test_room_for_checkpoints_is_looked_at_before_the_first_step(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(settings["data"])
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=1_300_000))
    events = run(settings)
    planned, warned = (next(i for i, e in enumerate(events) if isinstance(e, kind)) for kind in (Planned, Warned))
    assert planned < warned < next(i for i, e in enumerate(events) if isinstance(e, StepDone))
    assert "two checkpoints need" in of(Warned, events)[0].message


def fill_disk(monkeypatch: pytest.MonkeyPatch, *, saves: set[int]) -> None:
    """Let the disk be full at the given saves, counted from 0."""
    import safetensors.torch

    original, count = safetensors.torch.save_file, 0

    def save_file(tensors: Any, path: Any, *rest: Any, **more: Any) -> None:
        nonlocal count
        if str(path).endswith("optimizer.safetensors"):
            count += 1
            if count - 1 in saves:
                Path(path).write_bytes(b"half")
                raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")
        original(tensors, path, *rest, **more)

    monkeypatch.setattr(safetensors.torch, "save_file", save_file)


def test_a_full_disk_keeps_the_old_checkpoints_and_leaves_no_rest(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    fill_disk(monkeypatch, saves={1})
    with pytest.raises(WriteError, match=r"step-00000008: no space left \([\d,]+ bytes needed, [\d,]+ free\).*then go on with --resume"):
        run(settings)
    assert [p.name for p in checkpoints.step_folders(settings["out_dir"])] == ["step-00000004"]
    assert not list(settings["out_dir"].glob(".tmp-*"))
    monkeypatch.undo()
    assert of(Resumed, run({**settings, "resume": True}))[0].step == 4


def test_on_full_wait_tries_again(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmctl.core.train.saving._FULL_DISK_POLLS", 0)
    fill_disk(monkeypatch, saves={1, 2})
    events = run({**settings, "on_full": "wait"})
    assert sum("waiting for room" in w.message for w in of(Warned, events)) == 2
    assert [c.step for c in of(CheckpointSaved, events)] == [4, 8, 12]


def test_an_evaluation_that_fails_finds_the_final_weights_saved(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*_: Any, **__: Any) -> None:
        raise MemoryError("too large")

    monkeypatch.setattr("llmctl.core.train.loop.evaluate", explode)
    with pytest.raises(MemoryError):
        run({**settings, "eval_every": 0})
    assert checkpoints.open_checkpoint(settings["out_dir"] / "step-00000012").state.step == 12


@pytest.mark.parametrize(
    ("change", "message"), [({"seq_len": 100_000}, "one sequence needs"), ({"batch_size": 4096}, "fewer than --batch-size")]
)
def test_too_little_data_is_an_error(settings: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run({**settings, "micro_batch_size": None, **change})
    assert not settings["out_dir"].exists()


def test_a_changed_shard_is_named_at_the_start_and_in_the_middle(settings: dict[str, Any], packed: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(packed, copy)
    settings = {**settings, "data": copy}
    shard = copy / "train-00000.tokens"
    events = pretraining.train(PretrainConfig(**settings))
    next(e for e in events if isinstance(e, CheckpointSaved))
    with open(shard, "ab") as file:
        file.write(b"more")
    with pytest.raises(InputError, match=shard.name):
        list(events)
    with pytest.raises(InputError, match=shard.name):
        run({**settings, "resume": True})
    shutil.copy(packed / shard.name, shard)
    assert of(Finished, run({**settings, "resume": True}))
    flip(shard)
    with pytest.raises(InputError, match=shard.name):
        run({**settings, "out_dir": tmp_path / "other"})


def test_going_on_from_a_models_weights(settings: dict[str, Any], tmp_path: Path) -> None:
    run(settings)
    base = settings["out_dir"] / "step-00000012"
    more = {
        **settings,
        "depth": None,
        "model": str(base),
        "out_dir": tmp_path / "more",
        "learning_rate": 1e-12,
        "muon_learning_rate": 1e-12,
    }
    run({**more, "max_steps": 2})
    ours, theirs = (load_model(p).model.state_dict() for p in (tmp_path / "more" / "step-00000002", base))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-8)


def test_an_architecture_from_a_config_file(settings: dict[str, Any], tmp_path: Path) -> None:
    run({**settings, "max_steps": 1})
    config = json.loads((settings["out_dir"] / "step-00000001" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    events = run({**settings, "depth": None, "model_config": tmp_path / "config.json", "out_dir": tmp_path / "other", "max_steps": 1})
    assert of(Planned, events)[0].num_layers == 3


def test_a_budget_of_time_becomes_steps_once(settings: dict[str, Any]) -> None:
    timed = {**settings, "max_steps": None, "max_time": "1s", "save_every": 3}

    events = pretraining.train(PretrainConfig(**timed))
    plan = next(e for e in events if isinstance(e, Planned))
    assert plan.num_steps > 3
    next(e for e in events if isinstance(e, CheckpointSaved))
    events.close()  # type: ignore[attr-defined]
    again = next(e for e in pretraining.train(PretrainConfig(**timed, resume=True)) if isinstance(e, Planned))
    assert again.num_steps == plan.num_steps


def test_budgets_and_their_words() -> None:
    with pytest.raises(UsageError, match="--max-steps and --epochs"):
        PretrainConfig(max_steps=3, epochs=1.0)
    with pytest.raises(UsageError, match="--max-time"):
        PretrainConfig(max_time="soon")
    with pytest.raises(UsageError, match="--nonfinite"):
        PretrainConfig(nonfinite="skip")
    with pytest.raises(UsageError, match="does not divide"):
        PretrainConfig(batch_size=8, micro_batch_size=3)


def test_the_state_holds_numbers_only(settings: dict[str, Any]) -> None:
    run({**settings, "max_steps": 1})
    state = checkpoints.open_checkpoint(settings["out_dir"] / "step-00000001").state
    assert json.loads(json.dumps(dataclasses.asdict(state))) == dataclasses.asdict(state)


class Deferring(Trainer):
    """A Trainer that looks at losses as it does on an accelerator."""

    def __init__(self, job: Any) -> None:
        super().__init__(job)
        self._look_every = 5


def test_looking_at_losses_once_an_interval_changes_nothing_but_the_moment(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = run({**settings, "out_dir": tmp_path / "at once"})
    monkeypatch.setattr(planning, "Trainer", Deferring)
    later = run(settings)
    order = [(type(e).__name__, getattr(e, "step", None)) for e in at_once]
    assert [(type(e).__name__, getattr(e, "step", None)) for e in later] == order
    assert [s.loss for s in of(StepDone, later)] == [s.loss for s in of(StepDone, at_once)]
    assert fingerprints(settings["out_dir"] / "step-00000012") == fingerprints(tmp_path / "at once" / "step-00000012")


def test_a_bad_step_found_later_is_named_and_never_saved(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "Trainer", Deferring)
    poison(monkeypatch, micro_batches={2 * 5 + 1})  # the sixth step; the eighth would be saved
    with pytest.raises(NonFiniteError, match=r"step 6: .* the last good step is 5, the last checkpoint is step 4"):
        run({**settings, "eval_every": 0})
    assert [line["step"] for line in metric_lines(settings["out_dir"], "step")] == [1, 2, 3, 4, 5]
    assert [p.name for p in checkpoints.step_folders(settings["out_dir"])] == ["step-00000004"]
