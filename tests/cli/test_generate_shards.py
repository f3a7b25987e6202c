"""Batches in order, in shards, and joined: against the same job in one piece."""

import json
from pathlib import Path
from typing import Any

import pytest

from llmctl.cli.generate_batch import torchrun_shard
from tests.cli.generate_tools import Llmctl

JOB = ("-n", 5, "--seed", 11, "--dtype", "float32")


def write_rows(path: Path, count: int) -> Path:
    rows = [json.dumps({"id": f"r{i}", "prompt": f"tale {i} " + "and so on " * (i % 5), "max_tokens": 2 + i * 3 % 7}) for i in range(count)]
    path.write_text("\n\n".join(rows))
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_ordered_results_are_the_same_in_the_order_of_the_rows(llmctl: Llmctl, model: Path, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "in.jsonl", 12)
    lines = file.read_text().split("\n\n")
    lines[4] = '{"id": "bad", "prompt": ""}'
    file.write_text("\n".join(lines))
    base = ("-m", model, "-i", file, *JOB, "-b", 4)
    plain, found = llmctl(*base), llmctl(*base, "--ordered")
    assert plain.code == found.code == 3
    ids = [row["id"] for row in found.rows]
    assert ids == [json.loads(line)["id"] for line in lines]
    assert [row["id"] for row in plain.rows] != ids, "the rows finish in their order anyway, so nothing was tested"
    assert sorted(found.bytes.splitlines()) == sorted(plain.bytes.splitlines())
    out = tmp_path / "out.jsonl"
    assert llmctl(*base, "--ordered", "-o", out).code == 3
    assert [row["id"] for row in read_rows(out)] == [id for id in ids if id != "bad"]


def test_shards_joined_are_the_whole_job(llmctl: Llmctl, model: Path, tmp_path: Path) -> None:
    file, whole, out = write_rows(tmp_path / "in.jsonl", 10), tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    base = ("-m", model, "-i", file, *JOB, "-b", 8, "--num-samples", 2)
    assert llmctl(*base, "-o", whole, "--ordered").code == 0
    for shard in ("1/3", "3/3"):
        assert llmctl(*base, "-o", out, "--shard", shard).code == 0
    refused = llmctl("--merge", "-o", out)
    assert refused.code == 10
    assert "run --shard 2/3" in refused.last
    assert llmctl(*base, "-o", out, "--shard", "2/3").code == 0
    assert [len(read_rows(tmp_path / f"out.shard-{i}-of-3.jsonl")) for i in (1, 2, 3)] == [8, 6, 6]
    lines = [[row["line"] for row in read_rows(tmp_path / f"out.shard-{i}-of-3.jsonl")] for i in (1, 2, 3)]
    assert any(sorted(some) != some for some in lines), "the rows finish in their order anyway, so nothing was tested"
    joined = llmctl("--merge", "-o", out)
    assert (joined.code, joined.err) == (0, f"{out}: 20 results of 3 shards\n")
    assert out.read_bytes() == whole.read_bytes()
    again = llmctl(*base, "-o", out)
    assert again.code == 0, "the joined file is that of the whole job, which has nothing left to do"
    assert "20 results" in again.err
    assert llmctl("--merge", "-o", out).code == 2
    assert llmctl("--merge", "-o", out, "--overwrite").code == 0


def test_a_merge_refuses_what_is_not_whole_or_not_of_one_job(llmctl: Llmctl, model: Path, tmp_path: Path) -> None:
    file, out = write_rows(tmp_path / "in.jsonl", 4), tmp_path / "out.jsonl"
    first, second = (tmp_path / f"out.shard-{i}-of-2.jsonl" for i in (1, 2))
    base = ("-m", model, "-i", file, *JOB, "-o", out)
    for shard in ("1/2", "2/2"):
        assert llmctl(*base, "--shard", shard).code == 0
    good = second.read_bytes()
    for content, words in (
        (good.replace(b', "line": 7', b""), "line 2 is not a whole result row of a shard"),
        (good[:-5], "line 2 is not a whole result row"),
        (good.splitlines(keepends=True)[0], "1 of its 2 results are missing"),
        (first.read_bytes(), "has been used before"),
    ):
        second.write_bytes(content)
        refused = llmctl("--merge", "-o", out)
        assert (refused.code, words in refused.last) == (4, True), refused.err
        assert not out.exists()
    assert llmctl(*base, "--shard", "2/2", "--overwrite", "--temp", 0.5).code == 0
    refused = llmctl("--merge", "-o", out)
    assert (refused.code, "temperature differ" in refused.last) == (4, True), refused.err
    assert llmctl("--merge", "-o", tmp_path / "none.jsonl").code == 10
    assert not list(tmp_path.glob(".tmp-*"))


def test_failed_rows_of_shards_are_listed_together(llmctl: Llmctl, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n{"prompt": ""}\nnonsense\n{"prompt": "b"}\n')
    base = ("-m", model, "-i", tmp_path / "in.jsonl", *JOB, "-o", out, "--num-samples", 2)
    assert [llmctl(*base, "--shard", shard).code for shard in ("1/2", "2/2")] == [3, 3]
    joined = llmctl("--merge", "-o", out)
    assert joined.code == 3
    assert [(row["id"], row["sample"]) for row in read_rows(out)] == [(1, 0), (1, 1), (4, 0), (4, 1)]
    assert sorted(row["line"] for row in read_rows(tmp_path / "out.errors.jsonl")) == [2, 3]


def test_ranks_of_torchrun_take_their_shards() -> None:
    assert torchrun_shard({"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "4"}) == (2, 4)
    assert torchrun_shard({"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "1"}) is None
    assert torchrun_shard({"RANK": "1", "WORLD_SIZE": "4"}) is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-i", "x", "--shard", "0/2", "--seed", "1"], "--shard 0/2: I/N is wanted"),
        (["-i", "x", "--shard", "3/2", "--seed", "1"], "--shard 3/2"),
        (["-i", "x", "--shard", "1/2"], "--shard needs --seed"),
        (["x", "--shard", "1/2"], "--shard needs --input"),
        (["x", "--ordered"], "--ordered needs --input"),
        (["--merge"], "--merge needs --output"),
        (["--merge", "-i", "x", "-o", "y"], "--merge does not go with --input"),
    ],
)
def test_mistakes_are_told(llmctl: Llmctl, arguments: list[str], words: str) -> None:
    found = llmctl(*arguments)
    assert (found.code, found.bytes) == (2, b"")
    assert words in found.last
