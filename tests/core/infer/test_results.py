"""The result file: torn tails, other jobs, locks, full disks."""

import json
import os
import resource
import signal
from pathlib import Path

import pytest

from llmctl.core.errors import InputError, LockedError, UsageError, WriteError
from llmctl.core.infer.results import ResultFile, result_key

JOB = {"model": "m", "temperature": 0.5, "stop": ["\n"]}


def fill(path: Path, ids: list[int | str], **options: bool) -> None:
    with ResultFile(path, **options) as results:
        results.begin(JOB, seed=1, drawn_seed=99)
        for id in ids:
            results.append({"id": id, "text": f"text {id} é"})


def test_a_torn_tail_is_cut_and_the_rest_known(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    fill(path, [1, "1", 2])
    whole = path.read_bytes()
    for cut in range(1, len(whole)):
        path.write_bytes(whole[:cut])
        with ResultFile(path) as results:
            results.begin(JOB, seed=1, drawn_seed=99)
            kept = whole[:cut].rfind(b"\n") + 1
            assert path.read_bytes() == whole[:kept]
            assert results.num_torn_bytes == cut - kept
            ids = [json.loads(line)["id"] for line in whole[:kept].splitlines()]
            assert results.done == {result_key(id, 0) for id in ids}


def test_what_is_appended_after_a_cut_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    fill(path, [1, 2])
    path.write_bytes(path.read_bytes()[:-3])
    fill(path, [2])
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == [1, 2]


@pytest.mark.parametrize("tail", [b"\0\0\0\n", b'{"no": "id"}\n', b"null\n"])
def test_a_last_line_that_is_no_result_is_cut_but_one_in_the_middle_is_refused(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "out.jsonl"
    fill(path, [1])
    whole = path.read_bytes()
    path.write_bytes(whole + tail + whole)
    with ResultFile(path) as results, pytest.raises(InputError, match="line 2 is not a result row"):
        results.begin(JOB, seed=1, drawn_seed=99)
    path.write_bytes(whole + tail)
    with ResultFile(path) as results:
        results.begin(JOB, seed=1, drawn_seed=99)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("change", [{"model": "n"}, {"temperature": 0.6}, {"extra": 1}, {"stop": []}])
def test_another_job_is_refused_and_what_differs_is_named(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "out.jsonl"
    fill(path, [1])
    before = path.read_bytes()
    with ResultFile(path) as results, pytest.raises(InputError, match=next(iter(change))):
        results.begin({**JOB, **change}, seed=1, drawn_seed=99)
    assert path.read_bytes() == before


def test_the_seed_that_was_drawn_is_kept_and_another_one_refused(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with ResultFile(path) as results:
        assert results.begin(JOB, seed=None, drawn_seed=41) == 41
        results.append({"id": 1})
    with ResultFile(path) as results:
        assert results.begin(JOB, seed=None, drawn_seed=42) == 41
    with ResultFile(path) as results:
        assert results.begin(JOB, seed=41, drawn_seed=43) == 41
    with ResultFile(path) as results, pytest.raises(InputError, match="seed"):
        results.begin(JOB, seed=7, drawn_seed=44)


def test_a_job_that_left_no_row_may_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    fill(path, [])
    with ResultFile(path) as results:
        results.begin({**JOB, "model": "other"}, seed=2, drawn_seed=99)


def test_a_file_of_somebody_else_is_refused_unless_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text('{"id": 1}\n')
    with ResultFile(path) as results, pytest.raises(InputError, match="--overwrite"):
        results.begin(JOB, seed=1, drawn_seed=99)
    assert path.read_text() == '{"id": 1}\n'
    fill(path, [5], overwrite=True)
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == [5]


def test_the_second_job_is_locked_out_and_the_lock_dies_with_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        ResultFile(path)
        os.write(tell, b".")
        signal.pause()
        os._exit(0)
    os.read(ready, 1)
    with pytest.raises(LockedError, match="another run"):
        ResultFile(path)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    ResultFile(path).close()
    os.close(ready)
    os.close(tell)


def test_overwriting_waits_for_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    fill(path, [1])
    with ResultFile(path), pytest.raises(LockedError):
        ResultFile(path, overwrite=True)
    assert path.read_bytes()


def append_many(results: ResultFile) -> None:
    for id in range(100):
        results.append({"id": id, "text": "x" * 100})


def test_a_full_disk_leaves_whole_rows_and_the_same_command_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with ResultFile(path) as results:
            results.begin(JOB, seed=1, drawn_seed=99)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
            with pytest.raises(WriteError, match="limit"):
                append_many(results)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    num_rows = len([json.loads(line) for line in path.read_text().splitlines()])
    assert num_rows > 20
    with ResultFile(path) as results:
        results.begin(JOB, seed=1, drawn_seed=99)
        assert len(results.done) == num_rows
        assert results.num_torn_bytes == 0


def test_errors_of_an_earlier_run_are_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    for number in range(2):
        with ResultFile(path) as results:
            results.begin(JOB, seed=1, drawn_seed=99)
            results.append_error({"id": number, "error": "x"})
            assert results.errors_path == tmp_path / "out.errors.jsonl"
            assert [json.loads(line)["id"] for line in results.errors_path.read_text().splitlines()] == [number]
    with ResultFile(path) as results:
        results.begin(JOB, seed=1, drawn_seed=99)
    assert not results.errors_path.exists()


def test_text_that_is_no_unicode_is_still_json(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with ResultFile(path) as results:
        results.begin(JOB, seed=1, drawn_seed=99)
        results.append({"id": "\udc80", "text": "\ud800 é"})
    assert json.loads(path.read_bytes()) == {"id": "\udc80", "text": "\ud800 é"}


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--output"):
        ResultFile(tmp_path / "no" / "out.jsonl")
