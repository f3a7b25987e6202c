"""`llmctl generate` as people run it: prompts, streams, exit codes, batches that are killed. Rows G01-G20 and A05-A12 of the faults."""

import json
import os
import pty
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.generate_tools import Result
from tests.cli.tiny_model import TEMPLATE, make_model
from tests.cli.waiting import catches, wait_for

PROGRAM = [sys.executable, "-m", "llmctl", "generate"]
ROOT = Path(__file__).parents[2]


def shell(*arguments: object, **options: Any) -> "subprocess.Popen[bytes]":
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen([*PROGRAM, *map(str, arguments)], env=env, **options)


# one prompt


def test_greedy_text_is_the_same_on_each_way_in(llmctl: Callable[..., Result], model: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("Once upon\n")
    base = ("-m", model, "-n", 12, "-t", 0)
    expected = llmctl(*base, "Once upon")
    assert expected.code == 0
    assert expected.bytes.endswith(b"\n")
    for arguments, stdin in (
        (("--prompt", "Once upon"), None),
        (("-f", file), None),
        ((), b"Once upon\n"),
        (("-",), b"Once upon\r\n"),
        (("-f", "-"), b"Once upon"),
        (("-f", "-", "upon"), b"Once"),
        (("upon",), b"Once\n"),
        (("upon", "-f", tmp_path / "once"), None),
    ):
        (tmp_path / "once").write_text("Once")
        found = llmctl(*base, *arguments, stdin=stdin)
        assert (found.code, found.bytes) == (0, expected.bytes), arguments


def test_the_model_comes_from_the_environment(llmctl: Callable[..., Result], model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMCTL_MODEL", str(model))
    assert llmctl("x", "-n", 3).code == 0


def test_json_tells_everything(llmctl: Callable[..., Result], model: Path) -> None:
    found = llmctl("-m", model, "Once", "-n", 9, "--seed", 5, "--json", "--num-samples", 3, "--top-k", 50)
    assert [row["sample"] for row in found.rows] == [0, 1, 2]
    assert len({row["text"] for row in found.rows}) == 3
    for row in found.rows:
        assert (row["id"], row["finish"], row["num_prompt_tokens"], row["num_new_tokens"], row["seed"]) == (1, "length", 4, 9, 5)
        assert len(row["token_ids"]) == 9
    alone = llmctl("-m", model, "Once", "-n", 9, "--seed", 5, "--json", "--top-k", 50)
    assert alone.rows[0]["token_ids"] == found.rows[0]["token_ids"]
    assert llmctl("-m", model, "Once", "-n", 9, "--seed", 6, "--json", "--top-k", 50).rows[0]["token_ids"] != alone.rows[0]["token_ids"]


def test_a_drawn_seed_is_printed_and_gives_the_text_again(llmctl: Callable[..., Result], model: Path) -> None:
    first = llmctl("-m", model, "Once", "-n", 20)
    seed = first.err.split("seed ")[1].split()[0]
    assert llmctl("-m", model, "Once", "-n", 20, "--seed", seed).bytes == first.bytes
    assert "seed" not in llmctl("-m", model, "Once", "-n", 3, "-t", 0).err


def test_samples_are_separated_and_echo_repeats_the_prompt(llmctl: Callable[..., Result], model: Path) -> None:
    rows = llmctl("-m", model, "Once", "-n", 9, "--seed", 5, "--num-samples", 3, "--json").rows
    texts = ["Once" + row["text"] + ("" if row["text"].endswith("\n") else "\n") for row in rows]
    found = llmctl("-m", model, "Once", "-n", 9, "--seed", 5, "--num-samples", 3, "--echo")
    assert found.out == "---\n".join(texts)


def test_stop_strings_and_special_tokens(llmctl: Callable[..., Result], model: Path) -> None:
    text = llmctl("-m", model, "Once", "-n", 30, "-t", 0, "--json").rows[0]["text"]
    stop = text[3:6]
    row = llmctl("-m", model, "Once", "-n", 30, "-t", 0, "--json", "--stop", "never", "--stop", stop).rows[0]
    assert (row["text"], row["finish"], row["stop"]) == (text[: text.index(stop)], "stop", stop)


def test_chat_template_unless_raw(llmctl: Callable[..., Result], chat_model: Path) -> None:
    rendered = "<|im_start|>system\nbrief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    base = ("-m", chat_model, "-n", 12, "-t", 0, "--json")
    chat = llmctl(*base, "hi", "--system", "brief")
    raw = llmctl(*base, rendered, "--raw", "--allow-special")
    assert chat.rows[0]["token_ids"] == raw.rows[0]["token_ids"]
    assert llmctl(*base, "hi", "--raw").rows[0]["num_prompt_tokens"] == 2


def test_chat_template_file_and_missing_template(llmctl: Callable[..., Result], model: Path, tmp_path: Path) -> None:
    refused = llmctl("-m", model, "hi", "--chat")
    assert refused.code == 4
    assert "--chat-template" in refused.last
    file = tmp_path / "template.jinja"
    file.write_text(TEMPLATE)
    assert llmctl("-m", model, "hi", "--chat-template", file, "-n", 2, "--json").rows[0]["num_prompt_tokens"] > 10


def test_beams_equal_transformers(llmctl: Callable[..., Result], model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    ids = torch.tensor([list(llmctl_ids(model, "Once upon"))])
    theirs = AutoModelForCausalLM.from_pretrained(model).generate(
        ids, attention_mask=torch.ones_like(ids), num_beams=3, num_return_sequences=2, max_new_tokens=10, do_sample=False, pad_token_id=256
    )
    rows = llmctl("-m", model, "Once upon", "-n", 10, "--num-beams", 3, "--num-samples", 2, "--json", "--dtype", "float32").rows
    for row, expected in zip(rows, theirs[:, ids.shape[1] :].tolist(), strict=True):
        assert row["token_ids"] == expected[: len(row["token_ids"])]


def llmctl_ids(model: Path, text: str) -> list[int]:
    from llmctl.core.tokenizer import Tokenizer

    return Tokenizer.load(model).encode(text)


def test_truncation_warns_with_counts(llmctl: Callable[..., Result], model: Path) -> None:
    found = llmctl("-m", model, "x" * 300, "-n", 56, "-t", 0, "--json", "--truncate", "left")
    assert found.code == 0
    assert found.rows[0]["num_prompt_tokens"] == 200
    assert "300 tokens was cut to 200 on the left" in found.err
    refused = llmctl("-m", model, "x" * 300, "-n", 56)
    assert refused.code == 4
    assert "300 prompt tokens and 56 new ones exceed the model's context of 256" in refused.last


@pytest.mark.parametrize(
    ("arguments", "stdin", "code", "words"),
    [
        (["-t", "-1", "x"], None, 2, "--temperature"),
        (["-t", "nan", "x"], None, 2, "--temperature"),
        (["-t", "inf", "x"], None, 2, "--temperature"),
        (["--top-p", "0", "x"], None, 2, "--top-p"),
        (["--top-p", "1.01", "x"], None, 2, "--top-p"),
        (["-n", "0", "x"], None, 2, "--max-new-tokens"),
        (["--top-k", "0", "x"], None, 2, "--top-k"),
        (["--stop", "", "x"], None, 2, "--stop"),
        (["x", "--prompt", "y"], None, 2, "--prompt"),
        (["x", "--raw", "--system", "y"], None, 2, "--system"),
        (["x", "-o", "out.jsonl"], None, 2, "--output needs --input"),
        (["x", "-i", "in.jsonl"], None, 2, "PROMPT does not go with --input"),
        (["x", "--num-beams", "2", "-t", "1"], None, 2, "--temperature does not go with --num-beams"),
        (["x", "--num-beams", "2", "--num-samples", "3"], None, 2, "--num-samples 3"),
        (["x", "y"], None, 2, "unexpected extra argument"),
        ([""], None, 2, "empty"),
        ([], b"", 2, "the prompt is empty"),
        (["-"], b"\n", 2, "the prompt is empty"),
        ([], b"x" * 10_000_000, 4, "more than 4,194,304 bytes"),
        ([], b"ab\xff\xfe", 4, "stdin: not valid UTF-8 at byte 2"),
        (["-f", "no.txt"], None, 10, "--prompt-file no.txt: no such file"),
        (["-f", "."], None, 2, "--prompt-file"),
        (["x", "-m", "no-such-model"], None, 10, "no-such-model"),
        (["x", "--device", "gpu"], None, 2, "--device"),
    ],
)
def test_mistakes_are_one_line(
    llmctl: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    stdin: bytes | None,
    code: int,
    words: str,
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    found = llmctl(*arguments, stdin=stdin)
    assert (found.code, found.bytes) == (code, b""), found.err
    assert found.last.startswith("llmctl: error: ")
    assert words in found.last
    assert list((tmp_path / "work").iterdir()) == []


def test_nul_bytes_and_any_character_are_text(llmctl: Callable[..., Result], model: Path) -> None:
    row = llmctl("-m", model, "-n", 2, "--json", "--echo", stdin="a\0b 你好 🙂".encode()).rows[0]
    assert row["prompt"] == "a\0b 你好 🙂"
    assert row["num_prompt_tokens"] == len("a\0b 你好 🙂".encode())


def test_weights_that_give_nan_stop_with_6(llmctl: Callable[..., Result], model: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    found = llmctl("-m", broken, "x", "-n", 3)
    assert (found.code, found.bytes) == (6, b"")
    assert "NaN or infinity at token 0" in found.last
    beams = llmctl("-m", broken, "x", "-n", 3, "--num-beams", 2)
    assert (beams.code, beams.bytes) == (6, b"")


@pytest.mark.skipif(sys.platform != "linux", reason="macOS has no such sockets")
def test_the_streamed_bytes_are_whole_characters_and_come_as_they_are_made(model: Path) -> None:
    """A reader may come between any two tokens; a random byte model makes broken UTF-8 all the time."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # keeps one write apart from the next, as a pipe does not
    with ours, theirs:
        job = shell("-m", model, "Once", "-n", 200, "--seed", 1, stdout=theirs.fileno())
        theirs.close()
        pieces = []
        while piece := ours.recv(4096):
            piece.decode("utf-8")
            pieces.append(piece)
    assert job.wait() == 0
    assert len(pieces) > 1, "the text came in one piece"


def test_a_reader_that_goes_away_ends_it_silently(model: Path) -> None:
    command = f"printf 'Once' | {' '.join(PROGRAM)} -m {model} -n 200 --seed 1 -q | head -c 20; echo ${{PIPESTATUS[1]}}"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, timeout=240)
    assert done.stderr == b""
    assert done.stdout.endswith(b"141\n") or done.stdout.endswith(b"141")


def test_full_and_closed_stdout(model: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for redirection, words in ((">/dev/full", b"cannot write to stdout: no space left"), (">&-", b"stdout: it is closed")):
        command = f"{' '.join(PROGRAM)} -m {model} x -n 5 {redirection} </dev/null"
        done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, timeout=240)
        assert done.returncode == 5, done.stderr
        assert words in done.stderr.splitlines()[-1]
        assert b"Traceback" not in done.stderr


def test_closed_stdin_and_a_terminal_without_a_prompt() -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", f"{' '.join(PROGRAM)} <&-"], env=env, capture_output=True, timeout=240)
    assert done.returncode == 2
    assert b"stdin is closed" in done.stderr
    keyboard, terminal = pty.openpty()
    job = shell(stdin=terminal)
    _, err = job.communicate(timeout=240)
    assert job.returncode == 2
    assert b"no prompt" in err
    os.close(keyboard)
    os.close(terminal)


@pytest.mark.parametrize("as_json", [False, True])
def test_an_interrupt_keeps_the_partial_text(model: Path, as_json: bool, tmp_path: Path) -> None:
    slow = make_model(tmp_path / "slow", context=8192)
    # the native executor, or an early end of the text, might be faster than the signal
    job = shell("-m", slow, "--executor", "torch", "Once", "--ignore-eos", "-n", 8000, *(["--json"] if as_json else []))
    assert job.stdout is not None
    assert job.stderr is not None
    assert job.stderr.readline().startswith(b"seed")
    first = b"" if as_json else os.read(job.stdout.fileno(), 1)
    wait_for(lambda: catches(job, signal.SIGTERM), job)  # it has begun
    job.send_signal(signal.SIGINT)
    rest, err = job.communicate(timeout=240)
    assert job.returncode == -signal.SIGINT
    assert b"Traceback" not in err
    assert b"interrupted" in err
    assert (first + rest).endswith(b"\n")
    if as_json:
        assert json.loads(rest)["finish"] == "interrupted"


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="sees the import of torch in /proc")
def test_an_interrupt_while_loading_ends_at_once(model: Path) -> None:
    job = shell("x", "-m", model, "--executor", "torch")
    loaded = Path(f"/proc/{job.pid}/maps")
    while job.poll() is None and "libtorch" not in loaded.read_text():
        time.sleep(0.005)
    job.send_signal(signal.SIGINT)
    out, err = job.communicate(timeout=240)
    assert (job.returncode, out) == (-signal.SIGINT, b"")
    assert err.splitlines() == [b"llmctl: error: interrupted"]


# batches


def write_rows(path: Path, count: int, **more: object) -> Path:
    rows = [{"id": f"r{i}", "prompt": f"tale number {i} " + "and so on " * (i % 5), **more} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_batch_gives_each_row_the_text_it_has_alone(llmctl: Callable[..., Result], chat_model: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"id": "a", "prompt": "one", "n": [1, {"x": None}]},
        {"prompt": "two two", "temperature": 0},
        {"id": 7, "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "three"}], "max_tokens": 4},
        {"id": "s", "prompt": "four", "seed": 99, "top_k": 5, "stop": ["e"]},
    ]
    file = tmp_path / "in.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    found = llmctl("-m", chat_model, "-i", file, "-n", 8, "--seed", 3)
    assert found.code == 0
    results = {row["id"]: row for row in found.rows}
    assert set(results) == {"a", 2, 7, "s"}
    assert results["a"]["n"] == [1, {"x": None}]
    assert results[7]["num_new_tokens"] <= 4
    assert (results[2]["seed"], results["s"]["seed"]) == (None, 99)
    for index in range(4):
        single = tmp_path / "single.jsonl"
        single.write_text(json.dumps({"id": index + 1, **rows[index]}))
        alone = llmctl("-m", chat_model, "-i", single, "-n", 8, "--seed", 3, "-b", 1).rows[0]
        assert alone == results[alone["id"]]
    piped = llmctl("-m", chat_model, "-i", "-", "-n", 8, "--seed", 3, stdin=file.read_bytes())
    assert sorted(piped.bytes.splitlines()) == sorted(found.bytes.splitlines())


def test_a_row_and_a_single_prompt_of_its_id_are_the_same_text(llmctl: Callable[..., Result], model: Path) -> None:
    single = llmctl("-m", model, "Once", "-n", 9, "--seed", 5, "--json").rows[0]
    row = llmctl("-m", model, "-i", "-", "-n", 9, "--seed", 5, stdin=b'{"prompt": "Once"}').rows[0]
    assert row["text"] == single["text"]


def test_bad_rows_are_listed_and_the_others_done(llmctl: Callable[..., Result], model: Path, tmp_path: Path) -> None:
    file, out = write_rows(tmp_path / "in.jsonl", 20), tmp_path / "out.jsonl"
    lines = file.read_bytes().splitlines()
    lines[3] = json.dumps({"id": "long", "prompt": "x" * 300}).encode()
    lines[7] = b'{"id": "empty", "prompt": ""}'
    lines[9] = b"{bad json"
    lines[11] = b'{"id": "utf", "prompt": "\xff"}'
    lines[13] = b'{"id": "hot", "prompt": "x", "temperature": -1}'
    lines[15] = lines[14]
    lines.insert(5, b"")
    file.write_bytes(b"\n".join(lines))
    found = llmctl("-m", model, "-i", file, "-o", out, "-n", 4)
    assert found.code == 3
    assert found.last == f"llmctl: error: 6 of 20 rows failed; {tmp_path / 'out.errors.jsonl'} lists them"
    assert found.bytes == b""
    errors = {row["id"]: (row["line"], row["error"]) for row in read_rows(tmp_path / "out.errors.jsonl")}
    assert set(errors) == {"long", "empty", 11, 13, "hot", "r14"}
    assert errors["long"][1].startswith("line 4: 300 prompt tokens")
    assert "empty" in errors["empty"][1]
    assert errors[11] == (11, errors[11][1])
    assert "used before" in errors["r14"][1]
    assert len(read_rows(out)) == 14
    again = llmctl("-m", model, "-i", file, "-o", out, "-n", 4)
    assert again.code == 3
    assert len(read_rows(out)) == 14


def test_on_stdout_bad_rows_are_rows_too(llmctl: Callable[..., Result], model: Path) -> None:
    found = llmctl("-m", model, "-i", "-", "-n", 3, stdin=b'{"prompt": "x", "tag": 1}\n{"id": "e", "prompt": "", "tag": 2}\n')
    assert found.code == 3
    rows = {row["id"]: row for row in found.rows}
    assert rows["e"]["tag"] == 2
    assert "empty" in rows["e"]["error"]
    assert "text" not in rows["e"]
    assert rows[1]["tag"] == 1


def test_when_all_rows_fail_it_is_no_success(llmctl: Callable[..., Result], model: Path, tmp_path: Path) -> None:
    found = llmctl("-m", model, "-i", "-", "-o", tmp_path / "o.jsonl", stdin=b'{"prompt": ""}\nnope\n')
    assert found.code == 1
    assert "all 2 rows failed; the first: line 1: the prompt is empty" in found.last
    assert llmctl("-m", model, "-i", "-", stdin=b"\n\n").code == 4


def test_another_job_is_refused_and_the_same_goes_on(llmctl: Callable[..., Result], model: Path, chat_model: Path, tmp_path: Path) -> None:
    file, out = write_rows(tmp_path / "in.jsonl", 5), tmp_path / "out.jsonl"
    base = ("-i", file, "-o", out, "-n", 4)
    first = llmctl("-m", model, *base)
    assert first.code == 0
    before = out.read_bytes()
    for change, named in (
        (("-t", 0.123), "temperature"),
        (("--stop", "x"), "stop"),
        (("--seed", 1), "seed"),
        (("--dtype", "bf16"), "dtype"),
    ):
        refused = llmctl("-m", model, *base, *change)
        assert (refused.code, named in refused.last) == (4, True), refused.err
    other = make_model(tmp_path / "other", seed=9)
    refused = llmctl("-m", other, *base)
    assert refused.code == 4
    assert "model" in refused.last
    again = llmctl("-m", model, *base)
    assert again.code == 0
    assert "5 results" in again.err
    assert out.read_bytes() == before
    file.write_text(file.read_text() + '{"id": "new", "prompt": "x"}\n')
    refused = llmctl("-m", model, *base)
    assert refused.code == 4
    assert "input" in refused.last
    assert out.read_bytes() == before
    assert llmctl("-m", model, *base, "--overwrite").code == 0
    assert len(read_rows(out)) == 6


def test_a_torn_row_is_made_again(llmctl: Callable[..., Result], model: Path, tmp_path: Path) -> None:
    file, out = write_rows(tmp_path / "in.jsonl", 5), tmp_path / "out.jsonl"
    base = ("-m", model, "-i", file, "-o", out, "-n", 4)
    assert llmctl(*base).code == 0
    whole = sorted(out.read_bytes().splitlines())
    out.write_bytes(out.read_bytes()[:-9])
    found = llmctl(*base)
    assert found.code == 0
    assert "cut off" in found.err
    assert sorted(out.read_bytes().splitlines()) == whole


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["-o", "."], 2, "is a folder"),
        (["-o", "no/out.jsonl"], 2, "does not exist"),
        (["-o", "in.jsonl"], 2, "is the input file"),
        (["-o", "/dev/null"], 2, "not a regular file"),
        (["-o", "out.jsonl", "-i", "none.jsonl"], 10, "--input none.jsonl"),
        (["-o", "out.jsonl", "-i", "."], 2, "is a folder"),
        (["--overwrite"], 2, "--overwrite needs --output"),
        (["-o", "old.jsonl"], 4, "no old.jsonl.run.json says what made it"),
    ],
)
def test_places_are_checked(
    llmctl: Callable[..., Result], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, words: str
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    write_rows(work / "in.jsonl", 2)
    (work / "old.jsonl").write_text('{"id": 1}\n')
    before = {p: p.read_bytes() for p in work.iterdir()}
    found = llmctl("-m", model, *([] if "-i" in arguments else ["-i", "in.jsonl"]), *arguments)
    assert found.code == code, found.err
    assert words in found.last
    assert {p: p.read_bytes() for p in work.iterdir()} == before


def test_two_jobs_on_one_output(llmctl: Callable[..., Result], model: Path, tmp_path: Path) -> None:
    from llmctl.core.infer.results import ResultFile

    file, out = write_rows(tmp_path / "in.jsonl", 2), tmp_path / "out.jsonl"
    with ResultFile(out):
        found = llmctl("-m", model, "-i", file, "-o", out, "-n", 2)
    assert found.code == 11
    assert str(out) in found.last


def wait_for_rows(job: "subprocess.Popen[bytes]", path: Path, count: int) -> None:
    """Until the file has so many lines, or the job has ended."""
    while job.poll() is None and not (path.exists() and path.read_bytes().count(b"\n") >= count):
        time.sleep(0.005)


def test_killed_and_started_again_gives_what_an_unbroken_run_gives(llmctl: Callable[..., Result], model: Path, tmp_path: Path) -> None:
    file, out, whole = write_rows(tmp_path / "in.jsonl", 200), tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    base = ("-m", model, "-i", file, "-n", 24, "--seed", 11)
    assert llmctl(*base, "-o", whole).code == 0
    for count in (1, 60, 150):
        job = shell(*base, "-o", out)
        wait_for_rows(job, out, count)
        job.kill()
        job.communicate()
    found = llmctl(*base, "-o", out)
    assert found.code == 0
    assert len(out.read_bytes().splitlines()) == 200
    assert sorted(out.read_bytes().splitlines()) == sorted(whole.read_bytes().splitlines())
    assert not list(tmp_path.glob(".tmp-*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_finished_rows_and_says_how_to_go_on(model: Path, tmp_path: Path, number: signal.Signals) -> None:
    file, out = write_rows(tmp_path / "in.jsonl", 10_000), tmp_path / "out.jsonl"  # more than any machine does while the test looks away
    job = shell("-m", model, "-i", file, "-o", out, "-n", 64)
    wait_for_rows(job, out, 10)
    job.send_signal(number)
    _, err = job.communicate(timeout=240)
    assert job.returncode == -number
    assert b"run the same command to go on" in err.splitlines()[-1]
    assert 10 <= len(read_rows(out)) < 10_000


def test_a_full_disk_keeps_what_is_done(model: Path, tmp_path: Path, llmctl: Callable[..., Result]) -> None:
    file, out = write_rows(tmp_path / "in.jsonl", 60), tmp_path / "out.jsonl"
    command = ["prlimit", "--fsize=4096", *PROGRAM, "-m", model, "-i", file, "-o", out, "-n", 4, "-t", 0]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(list(map(str, command)), env=env, capture_output=True, timeout=240, stdin=subprocess.DEVNULL)
    assert done.returncode == 5, done.stderr
    assert b"cannot write" in done.stderr.splitlines()[-1]
    assert len(read_rows(out)) > 5
    assert llmctl("-m", model, "-i", file, "-o", out, "-n", 4, "-t", 0).code == 0
    assert len({row["id"] for row in read_rows(out)}) == len(read_rows(out)) == 60


def test_as_a_filter_each_row_is_answered_before_the_next_is_sent(model: Path) -> None:
    job = shell("-m", model, "-i", "-", "-n", 4, stdin=subprocess.PIPE)
    assert job.stdin is not None
    assert job.stdout is not None
    for number in range(3):
        job.stdin.write(json.dumps({"id": number, "prompt": "x"}).encode() + b"\n")
        job.stdin.flush()
        assert json.loads(job.stdout.readline())["id"] == number
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=240) == -signal.SIGTERM
    job.stdin.close()


def test_no_transformers_and_no_rich_on_the_way_to_a_text(model: Path) -> None:
    program = (
        "import sys; from llmctl.cli.main import run; code = run(sys.argv[1:]); "
        "print([m for m in ('transformers', 'rich', 'jinja2') if m in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, "generate", "-m", str(model), "x", "-n", "2"]
    done = subprocess.run(command, env=env, capture_output=True, timeout=240, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == b"[]"


def test_a_model_that_is_not_there_is_told_before_torch_is_imported() -> None:
    program = (
        "import sys; from llmctl.cli.main import run; code = run(sys.argv[1:]); "
        "print('torch' in sys.modules, file=sys.stderr); sys.exit(code)"
    )
    command = [sys.executable, "-c", program, "generate", "-m", "no-such-model", "x"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, timeout=240, stdin=subprocess.DEVNULL)
    assert done.returncode == 10, done.stderr
    assert done.stderr.splitlines()[-1] == b"False"
