"""A run folder read back: its numbers, and what is broken in it."""

import json
from pathlib import Path

import pytest

from llmctl.core.errors import InputError, NotFoundError
from llmctl.core.report.record import differences, read_run
from tests.core.report.runs import make_run


def test_columns_are_the_numbers_of_the_log(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "a", losses=[5.0, None, 3.0], settings={"seed": 4}))
    assert run.steps["loss"] == [5.0, None, 3.0]
    assert run.steps["tokens_seen"] == [100.0, 200.0, 300.0]
    assert run.evals["bits_per_byte"] == [1.25]
    assert run.evals["tokens_seen"] == [300.0]
    assert run.evals["elapsed_s"] == [1.5]
    assert [(s.step, s.text) for s in run.samples] == [(3, "once")]
    assert run.settings == {"seed": 4}


def test_evaluations_of_averaged_weights_stand_apart(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", losses=[5.0, 4.0])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "eval", "step": 2, "loss": 2.25, "bits_per_byte": 1.125, "averaged": True}) + "\n")
    run = read_run(folder)
    assert (run.evals["loss"], run.averaged["loss"], run.averaged["tokens_seen"]) == ([2.5], [2.25], [200.0])


def test_a_log_that_a_kill_tore_is_read_without_its_torn_lines(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", losses=[5.0, 4.0])
    whole = (folder / "metrics.jsonl").read_bytes()
    (folder / "metrics.jsonl").write_bytes(b"\xff\xfe\n[1]\n" + b"[" * 50_000 + b"\n" + whole + b'{"kind": "step", "step": 3, "lo')
    run = read_run(folder)
    assert run.steps["loss"] == [5.0, 4.0]
    assert run.num_bad_lines == 4


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such run folder"):
        read_run(tmp_path / "nothing")
    with pytest.raises(NotFoundError, match=r"holds no metrics\.jsonl"):
        read_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"kind": "eval", "step": 1, "loss": 1.0}) + "\n")
    with pytest.raises(InputError, match="no step yet"):
        read_run(tmp_path)


def test_other_files_may_be_missing_or_broken(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", losses=[1.0])
    (folder / "config.toml").write_text("= broken")
    (folder / "plan.json").write_text("[]")
    (folder / "energy.json").write_text('{"starts": 7}')
    run = read_run(folder)
    assert (run.settings, run.plan, run.machine, run.energy) == ({}, {}, {}, ())


def test_only_settings_that_differ_are_told(tmp_path: Path) -> None:
    first = read_run(make_run(tmp_path / "a", losses=[1.0], settings={"seed": 1, "depth": 2, "out_dir": "a"}))
    second = read_run(make_run(tmp_path / "b", losses=[1.0], settings={"seed": 2, "depth": 2, "out_dir": "b", "clip": 1.0}))
    assert differences([first, second]) == [("clip", [None, 1.0]), ("seed", [1, 2])]
