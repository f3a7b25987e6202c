"""pretrain on several corpora: the plan, the card, the resume, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from llmctl.core.config.pretrain import PretrainConfig
from llmctl.core.errors import InputError
from llmctl.core.train.events import EvalDone, Event, Planned
from llmctl.core.train.pretrain import train
from tests.tiny_data import make_packed

from .runs import stop_after
from .test_pretrain import fingerprints


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("mixture")
    return make_packed(folder / "a"), make_packed(folder / "b", num_words=2000, seed=5)


def run(two: tuple[Path, Path], out_dir: Path, parts: tuple[float, float] = (0.75, 0.25), stop: Any = None, **options: Any) -> list[Event]:
    data = tuple(Path(f"{path}={part}") for path, part in zip(two, parts, strict=True))
    small = {"depth": 1, "seq_len": 32, "batch_size": 4, "max_steps": 12, "save_every": 4, "eval_every": 6, "sample_every": 0, "threads": 1}
    return list(train(PretrainConfig(data=data, out_dir=out_dir, **{**small, **options}), stop=stop or (lambda: None)))


def test_the_plan_the_card_and_the_resume(two: tuple[Path, Path], tmp_path: Path) -> None:
    events = run(two, tmp_path / "whole")
    (plan,) = [event for event in events if isinstance(event, Planned)]
    assert [(use.name, use.share, use.num_tokens) for use in plan.sources] == [("a", 0.75, 36 * 32), ("b", 0.25, 12 * 32)]
    assert plan.data_tokens == sum(use.data_tokens for use in plan.sources)
    assert any(isinstance(event, EvalDone) for event in events), "their validation splits are evaluated together"
    card = (tmp_path / "whole" / "step-00000012" / "README.md").read_text()
    assert "a (75.00%)" in card
    assert "b (25.00%)" in card
    with pytest.raises(Exception, match=r"stopped|interrupt"):
        run(two, tmp_path / "broken", stop=stop_after(7))
    with pytest.raises(InputError, match="data"):
        run(two, tmp_path / "broken", parts=(0.5, 0.5), resume=True)
    run(two, tmp_path / "broken", resume=True)
    assert fingerprints(tmp_path / "broken" / "step-00000012") == fingerprints(tmp_path / "whole" / "step-00000012")


def test_a_run_stored_when_data_was_one_folder_goes_on(two: tuple[Path, Path], tmp_path: Path) -> None:
    from llmctl.core.config.resolve import resolve

    (tmp_path / "run.toml").write_text(f"data = {json.dumps(str(two[0]))}\n")
    found = resolve(PretrainConfig, command="pretrain", flags={}, config_file=tmp_path / "run.toml", environ={})
    assert found.config.data == (two[0],) == PretrainConfig(data=two[0]).data


def test_corpora_of_different_tokenizers_are_refused(two: tuple[Path, Path], tmp_path: Path) -> None:
    other = make_packed(tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["tokenizer_fingerprint"] = "0" * 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="tokenizer"):
        run((two[0], other), tmp_path / "out")
    assert not (tmp_path / "out").exists()
