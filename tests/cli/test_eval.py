"""`llmctl eval` as a user meets it: output, files, gates, exit codes, kills."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llmctl.cli.main import run
from tests.cli.test_boundary import environment
from tests.core.evals.tiny import SENTENCES, write_model, write_rows, write_tasks


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model's folder."""
    return str(write_model(tmp_path_factory.mktemp("model")))


class Place:
    """A folder with two tasks and a text, and the command run in this process on them."""

    def __init__(self, folder: Path, model: str, capfd: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self._model, self._capfd = model, capfd
        self.animals, self.words = (str(path) for path in write_tasks(folder))
        self.text = folder / "a.txt"
        self.text.write_text(" ".join(SENTENCES), encoding="utf-8")
        self.out = self.err = ""

    def __call__(self, *arguments: object, model: str | None = None) -> int:
        """The exit code of `llmctl eval ARGUMENTS`; stdout and stderr lie in `out` and `err`."""
        fixed = ["--model", model or self._model, "--device", "cpu", "--cache-dir", str(self.folder / "cache")]
        code = run(["eval", *map(str, arguments), *fixed])
        self.out, self.err = self._capfd.readouterr()
        return code

    @property
    def last_error(self) -> str:
        """The last line on stderr."""
        return self.err.splitlines()[-1] if self.err else ""

    def fails(self, code: int, *arguments: object, match: str, model: str | None = None) -> None:
        """Ends with `code`, empty stdout, and one error line that matches."""
        assert self(*arguments, model=model) == code, self.err
        assert self.last_error.startswith("llmctl: error: ")
        assert re.search(match, self.last_error), self.last_error
        assert "Traceback" not in self.err
        assert self.out == ""


@pytest.fixture
def llmctl_eval(tmp_path: Path, model: str, capfd: pytest.CaptureFixture[str]) -> Place:
    """The command on a folder of its own."""
    return Place(tmp_path, model, capfd)


def test_a_pipe_gets_tab_separated_lines_and_nothing_else(llmctl_eval: Place) -> None:
    assert llmctl_eval("--tasks", f"{llmctl_eval.animals},{llmctl_eval.words}", llmctl_eval.text) == 0
    rows = [line.split("\t") for line in llmctl_eval.out.splitlines()]
    assert [row[:2] for row in rows] == [
        [str(llmctl_eval.text), "perplexity"],
        [str(llmctl_eval.text), "bits_per_byte"],
        [str(llmctl_eval.text), "nats_per_token"],
        [str(llmctl_eval.text), "definition"],
        ["animals", "acc"],
        ["animals", "acc_norm"],
        ["animals", "acc_bytes"],
        ["words", "acc"],
        ["words", "perplexity"],
    ]
    assert all(re.fullmatch(r"[\d.e+-]+", row[2]) for row in rows if row[1] != "definition")
    assert "context 64, stride 64" in rows[3][2]
    assert "no BOS" in rows[3][2]
    assert "\x1b" not in llmctl_eval.out + llmctl_eval.err


def test_json_gives_one_object_a_line(llmctl_eval: Place) -> None:
    assert llmctl_eval("--tasks", llmctl_eval.animals, llmctl_eval.text, "--json") == 0
    events = [json.loads(line) for line in llmctl_eval.out.splitlines()]
    assert [event["event"] for event in events] == ["ModelReady", "Planned", "TextScored", "Planned", "TaskScored"]
    assert events[-1]["metrics"][0]["name"] == "acc"


def test_results_and_items_are_written_whole(llmctl_eval: Place) -> None:
    output, log = llmctl_eval.folder / "r.json", llmctl_eval.folder / "items.jsonl"
    assert llmctl_eval("--tasks", llmctl_eval.animals, "--output", output, "--log-samples", log, "--limit", 6) == 0
    document = json.loads(output.read_text())
    result = document["results"]["animals"]
    assert result["num_items"] == 6
    assert set(result["metrics"]) == {"acc", "acc_norm", "acc_bytes"}
    assert document["model"]["num_parameters"] > 0
    assert document["settings"]["limit"] == 6
    items = [json.loads(line) for line in log.read_text().splitlines()]
    assert [item["index"] for item in items] == list(range(6))
    assert sum(item["values"]["acc"] for item in items) / 6 == result["metrics"]["acc"]["value"]
    assert all(len(item["log_likelihoods"]) == len(item["choices"]) for item in items)
    assert not list(llmctl_eval.folder.glob(".tmp-*"))


@pytest.mark.parametrize("name", [b"odd \xff name.txt", b"two\nlines.txt", "狐狸.txt".encode(), b"x" * 251 + b".txt"])
def test_odd_file_names_reach_the_results(llmctl_eval: Place, name: bytes) -> None:
    path = llmctl_eval.folder / os.fsdecode(name)
    path.write_text("a dog and a fox")
    assert llmctl_eval(path, "--output", llmctl_eval.folder / "r.json") == 0
    assert len(llmctl_eval.out.splitlines()) == 4
    (result,) = json.loads((llmctl_eval.folder / "r.json").read_text(encoding="utf-8"))["results"].values()
    assert result["num_documents"] == 1


@pytest.mark.parametrize("width", [1, 40, 200])
def test_the_table_fits_any_terminal(llmctl_eval: Place, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmctl.cli.streams import _Out

    monkeypatch.setattr(_Out, "is_terminal", True)
    monkeypatch.setenv("COLUMNS", str(width))
    assert llmctl_eval("--tasks", llmctl_eval.words, llmctl_eval.text, "--num-fewshot", "1") == 0
    assert "\x1b" not in llmctl_eval.out
    if width == 200:
        assert re.search(r"words +acc +0\.\d{4}", llmctl_eval.out)
        assert "1 examples before each question" in llmctl_eval.out
        assert "context 64, stride 64" in llmctl_eval.out


def test_output_to_stdout_is_the_document_alone(llmctl_eval: Place) -> None:
    assert llmctl_eval(llmctl_eval.text, "--output", "-") == 0
    assert str(llmctl_eval.text) in json.loads(llmctl_eval.out)["results"]


@pytest.mark.parametrize("flag", ["--output", "--log-samples"])
def test_an_existing_file_is_kept_unless_overwrite(llmctl_eval: Place, flag: str) -> None:
    path = llmctl_eval.folder / "there"
    path.write_text("precious")
    llmctl_eval.fails(2, "--tasks", llmctl_eval.animals, flag, path, match=f"{flag} .*exists already.*--overwrite")
    assert path.read_text() == "precious"
    assert llmctl_eval("--tasks", llmctl_eval.animals, flag, path, "--overwrite") == 0
    assert path.read_text() != "precious"


def test_output_that_cannot_be_is_told_before_any_work(llmctl_eval: Place) -> None:
    llmctl_eval.fails(2, llmctl_eval.text, "-o", llmctl_eval.folder / "no" / "r.json", match="parent folder", model="/no/model")
    llmctl_eval.fails(2, llmctl_eval.text, "-o", llmctl_eval.folder, match="is a folder", model="/no/model")


def test_gates_decide_the_exit_code_after_the_results_are_out(llmctl_eval: Place) -> None:
    output = llmctl_eval.folder / "r.json"
    assert llmctl_eval("--tasks", llmctl_eval.animals, "--fail-under", "acc=0.0") == 0
    assert llmctl_eval("--tasks", llmctl_eval.animals, "--fail-under", "animals.acc=1.5", "-o", output) == 7
    assert "animals.acc is" in llmctl_eval.last_error
    assert output.exists()
    assert llmctl_eval.out
    assert llmctl_eval(llmctl_eval.text, "--fail-under", "bits_per_byte=0.01") == 7
    assert llmctl_eval(llmctl_eval.text, "--fail-under", "perplexity=1e300") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to evaluate"),
        (["--tasks", "helaswag", "--data", "."], "did you mean 'hellaswag'"),
        (["--tasks", "piqa"], "--data DIR"),
        (["--tasks", "piqa,piqa", "--data", "."], "named twice"),
        (["x.txt", "--fail-under", "acc"], "METRIC=VALUE"),
        (["x.txt", "--fail-under", "acc=nan"], "METRIC=VALUE"),
        (["x.txt", "--stride", "9", "--seq-len", "8"], "--stride 9"),
        (["x.txt", "--limit", "0"], "--limit"),
        (["x.txt", "--log-samples", "f"], "--log-samples"),
        (["x.txt", "--batch-size", "0"], "--batch-size"),
        (["x.txt", "--bos", "maybe"], "--bos"),
        (["x.txt", "--no-such-flag"], "no-such-flag"),
    ],
)
def test_a_usage_error_is_exit_2_and_creates_nothing(llmctl_eval: Place, arguments: list[str], message: str) -> None:
    before = sorted(llmctl_eval.folder.iterdir())
    llmctl_eval.fails(2, *arguments, match=message)
    assert sorted(llmctl_eval.folder.iterdir()) == before


def test_what_is_missing_is_exit_10(llmctl_eval: Place) -> None:
    llmctl_eval.fails(10, llmctl_eval.folder / "no.txt", match=r"no\.txt")
    llmctl_eval.fails(10, "--tasks", llmctl_eval.folder / "no.toml", match=r"no\.toml")
    llmctl_eval.fails(10, "--tasks", "hellaswag", "--data", llmctl_eval.folder, match="hellaswag_val")
    llmctl_eval.fails(10, llmctl_eval.text, match="no-model", model="no-model")


def test_what_is_empty_or_broken_is_exit_4(llmctl_eval: Place) -> None:
    (llmctl_eval.folder / "empty.toml").touch()
    llmctl_eval.fails(4, "--tasks", llmctl_eval.folder / "empty.toml", match=r"empty\.toml: the task file is empty")
    (llmctl_eval.folder / "empty.txt").touch()
    llmctl_eval.fails(4, llmctl_eval.folder / "empty.txt", match=r"empty\.txt: nothing to score")
    (llmctl_eval.folder / "animals.jsonl").write_text("")
    llmctl_eval.fails(4, "--tasks", llmctl_eval.animals, match=r"animals\.jsonl: no rows")
    (llmctl_eval.folder / "animals.jsonl").write_text('{"q": 1}\n{"q"')
    llmctl_eval.fails(4, "--tasks", llmctl_eval.animals, match=r"animals\.jsonl:2: not valid JSON")


def test_weights_with_nan_are_exit_6_and_leave_no_results(llmctl_eval: Place) -> None:
    poisoned = str(write_model(llmctl_eval.folder / "poisoned", poison=True))
    output = llmctl_eval.folder / "r.json"
    llmctl_eval.fails(6, llmctl_eval.text, "-o", output, match="not finite", model=poisoned)
    llmctl_eval.fails(6, "--tasks", llmctl_eval.animals, "-o", output, match="not finite", model=poisoned)
    assert not output.exists()


def test_another_models_tokenizer_is_refused(llmctl_eval: Place) -> None:
    from tests.core.data.chat_tokenizers import byte_tokenizer

    big = llmctl_eval.folder / "tokenizer"
    big.mkdir()
    byte_tokenizer(tuple(f"<|extra_{number}|>" for number in range(40))).save(big)
    llmctl_eval.fails(4, llmctl_eval.text, "--tokenizer", big, match="--tokenizer .*tokenizer has 3\\d\\d ids")


def test_a_cache_that_cannot_be_written_is_a_warning(llmctl_eval: Place) -> None:
    (llmctl_eval.folder / "cache").write_text("a file")
    assert llmctl_eval("--tasks", llmctl_eval.animals) == 0
    assert "warning: finished scores could not be kept" in llmctl_eval.err


def test_a_closed_stdin_is_a_usage_error(llmctl_eval: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    llmctl_eval.fails(2, "-", match="stdin is closed", model="no-model")


def test_quiet_says_nothing_but_results(llmctl_eval: Place) -> None:
    assert llmctl_eval(llmctl_eval.text, "--quiet") == 0
    assert llmctl_eval.err == ""


def test_the_help_names_the_tasks_and_imports_no_torch() -> None:
    code = "import sys; from llmctl.cli.main import run; run(['eval', '--help']); assert not {'torch', 'rich'} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "hellaswag, piqa and lambada_openai" in done.stdout


def _command(model: str, folder: Path, *arguments: str) -> dict[str, Any]:
    tasks = f"{folder / 'animals.toml'},{folder / 'words.toml'}"
    line = ["--tasks", tasks, "--model", model, "--device", "cpu", "--threads", "1", "--batch-size", "4", "--json", "--overwrite"]
    return {
        "args": [sys.executable, "-m", "llmctl", "eval", *line, "--cache-dir", str(folder / "cache"), *arguments],
        "env": environment(),
        "cwd": folder,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
    }


def _scores(stdout: bytes) -> list[Any]:
    events = [json.loads(line) for line in stdout.splitlines()]
    return [[event["name"], event["metrics"], event["num_items"]] for event in events if event["event"] == "TaskScored"]


def test_stdin_is_a_text(model: str, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "llmctl", "eval", "-", "--model", model, "--device", "cpu", "--no-cache"]
    done = subprocess.run(line, env=environment(), input=b"a dog\n", capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"stdin\tperplexity\t")


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_at_any_moment_the_same_command_ends_with_the_same_scores(model: str, tmp_path: Path, how: signal.Signals) -> None:
    write_tasks(tmp_path, num_items=400)
    whole = subprocess.run(**_command(model, tmp_path, "--no-cache"), check=False)
    assert whole.returncode == 0, whole.stderr
    num_reused, ended = [], 0
    for _ in range(6):
        process = subprocess.Popen(**_command(model, tmp_path, "--output", "r.json", "--log-samples", "items.jsonl"))
        deadline = time.monotonic() + 600
        cache = tmp_path / "cache"
        before = sum(path.stat().st_size for path in cache.glob("*.jsonl")) if cache.exists() else 0
        while process.poll() is None and time.monotonic() < deadline:
            files = list(cache.glob("*.jsonl")) if cache.exists() else []
            if sum(path.stat().st_size for path in files) > before + 2000:
                break
            time.sleep(0.002)
        process.send_signal(how)
        _, stderr = process.communicate(timeout=600)
        if process.returncode == 0:
            break
        ended += 1
        assert process.returncode in (-how, 128 + how)
        assert b"Traceback" not in stderr
        assert not (tmp_path / "r.json").exists()
    assert ended
    last = subprocess.run(**_command(model, tmp_path, "--output", "r.json", "--log-samples", "items.jsonl"), check=False)
    assert last.returncode == 0, last.stderr
    assert _scores(last.stdout) == _scores(whole.stdout)
    num_reused = [json.loads(line).get("num_reused", 0) for line in last.stdout.splitlines()]
    assert max(num_reused) > 0
    items = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    assert sorted((item["task"], item["index"]) for item in items) == sorted((t, i) for t in ("animals", "words") for i in range(400))


def test_a_folder_of_token_shards_is_one_stream(llmctl_eval: Place, model: str) -> None:
    rows = write_rows(
        llmctl_eval.folder / "docs.jsonl", [{"text": f"{sentence} {number}"} for number in range(40) for sentence in SENTENCES]
    )
    packed = llmctl_eval.folder / "packed"
    done = run(["tokenize", "pack", str(rows), "--tokenizer", model, "--out-dir", str(packed), "--val-fraction", "0.2", "--workers", "1"])
    assert done == 0
    llmctl_eval("--help")
    assert llmctl_eval(packed, "--output", "-") == 0
    ((name, result),) = json.loads(llmctl_eval.out)["results"].items()
    assert name == f"{packed} (val)"
    from llmctl.core.data.shards import TokenDataset

    dataset = TokenDataset.open(packed, "val")
    assert result["num_tokens"] == dataset.num_tokens
    assert result["num_scored_tokens"] == dataset.num_tokens - 1
    assert dataset.num_bytes - 4 <= result["num_scored_bytes"] <= dataset.num_bytes
    assert "packed documents" in result["definition"]
    other = str(write_model(llmctl_eval.folder / "other"))
    from tests.core.data.chat_tokenizers import byte_tokenizer

    byte_tokenizer(("<|end|>",)).save(Path(other))
    llmctl_eval.fails(4, packed, match="packed with another tokenizer", model=other)
