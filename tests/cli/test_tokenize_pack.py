"""`llmctl tokenize pack` and `verify` as a shell sees them: exit codes, one-line errors, signals, full disks, kills."""

import gzip
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from llmctl.core.tokenizer import Tokenizer

from .in_process import Completed, run_here
from .test_boundary import assert_one_error, environment

LLMCTL = [sys.executable, "-m", "llmctl"]


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of the 256 bytes and <|endoftext|>."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    folder = tmp_path_factory.mktemp("tokenizer")
    Tokenizer.from_parts(backend, bos=None, eos="<|endoftext|>", pad=None).save(folder)
    return folder


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "docs.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i} " + "words and more words\n" * 20}) + "\n" for i in range(400)))
    return path


def llmctl(*arguments: Any, prefix: tuple[str, ...] = (), env: dict[str, str] | None = None, **options: Any) -> Completed:
    """Run llmctl, in this process where that makes no difference."""
    if not prefix and not env and not options.keys() - {"input", "cwd"}:
        return run_here([*map(os.fsdecode, (a if isinstance(a, bytes) else str(a) for a in arguments))], env=environment(), **options)
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    if "input" in options:
        del options["stdin"]
    command = [*prefix, *LLMCTL, *(a if isinstance(a, bytes) else str(a) for a in arguments)]
    return subprocess.run(command, env=environment(**(env or {})), timeout=300, check=False, **options)


def pack(*arguments: Any, **options: Any) -> Completed:
    return llmctl("tokenize", "pack", *arguments, **options)


def shards(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.tokens")}


def test_pack_then_verify_then_damage(tmp_path: Path, corpus: Path, tokenizer_dir: Path) -> None:
    out = tmp_path / "out"
    done = pack(corpus, "--tokenizer", tokenizer_dir, "-o", out, "--val-fraction", "0.1", "--shard-tokens", "20000", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["train"]["num_documents"] + result["val"]["num_documents"] == 400
    assert done.stdout.count(b"\n") == 1
    assert b"\x1b" not in done.stdout + done.stderr
    assert "torch" not in loaded_modules("tokenize", "pack", corpus, "--tokenizer", tokenizer_dir, "-o", tmp_path / "other")
    done = llmctl("tokenize", "verify", out)
    assert (done.returncode, done.stdout) == (0, b"")
    assert b"sound" in done.stderr
    path = out / "train-00001.tokens"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    assert_one_error(llmctl("tokenize", "verify", out), 4, "train-00001.tokens", "sha256 mismatch")
    path.write_bytes(data[: len(data) // 2])
    assert_one_error(llmctl("tokenize", "verify", out), 4, "train-00001.tokens", "was cut")
    path.unlink()
    assert_one_error(llmctl("tokenize", "verify", out), 4, "train-00001.tokens", "is missing")
    assert_one_error(llmctl("tokenize", "verify", tmp_path / "nowhere"), 10, "no such folder")
    assert_one_error(llmctl("tokenize", "verify"), 2, "DIR")


def loaded_modules(*arguments: Any) -> set[str]:
    program = (
        "import atexit, json, sys\n"
        "atexit.register(lambda: print(json.dumps(sorted({n.split('.')[0] for n in sys.modules})), file=sys.stderr))\n"
        "from llmctl.cli.main import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", program, *map(str, arguments)], env=environment(), capture_output=True, check=True)
    return set(json.loads(done.stderr.splitlines()[-1]))


def test_usage_errors_create_nothing(tmp_path: Path, corpus: Path, tokenizer_dir: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    wrong: list[tuple[list[Any], str]] = [
        ([corpus, "-o", tmp_path / "out"], "--tokenizer"),
        ([corpus, "--tokenizer", tokenizer_dir], "--out-dir"),
        (["--tokenizer", tokenizer_dir, "-o", tmp_path / "out"], "INPUT"),
        ([corpus, "--tokenizer", tokenizer_dir, "-o", file], "is a file"),
        ([corpus, "--tokenizer", tokenizer_dir, "-o", "/"], "root folder"),
        ([corpus, "--tokenizer", tokenizer_dir, "-o", tmp_path / "no" / "out"], "does not exist"),
        ([corpus, "--tokenizer", tokenizer_dir, "-o", tmp_path / "out", "--val-fraction", "1.5"], "--val-fraction"),
        ([corpus, "--tokenizer", tokenizer_dir, "-o", tmp_path / "out", "--workers", "0"], "--workers"),
        ([corpus, "--tokenizer", tokenizer_dir, "-o", tmp_path / "out", "--separator", "x", "--format", "jsonl"], "--separator"),
        ([corpus, "--tokenizer", tokenizer_dir, "-o", tmp_path / "out", "--val-data", corpus, "--val-by", "tail"], "--val-data"),
    ]
    before = sorted(os.listdir(tmp_path))
    for arguments, part in wrong:
        assert_one_error(pack(*arguments), 2, part)
    assert_one_error(
        pack("-", "--tokenizer", tokenizer_dir, "-o", tmp_path / "out", stdin=None, preexec_fn=lambda: os.close(0)), 2, "stdin is closed"
    )
    assert_one_error(pack(tmp_path / "none.txt", "--tokenizer", tokenizer_dir, "-o", tmp_path / "out"), 10, "none.txt")
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root to become somebody else")
def test_a_folder_that_may_not_be_written_is_refused_first(corpus: Path, tokenizer_dir: Path) -> None:
    with tempfile.TemporaryDirectory() as name:  # not tmp_path, which lies in a folder that nobody else may enter
        place = Path(name)
        place.chmod(0o755)
        text = shutil.copy(corpus, place)
        tokenizer = shutil.copytree(tokenizer_dir, place / "tokenizer")
        for path in (place / "tokenizer", *tokenizer.iterdir(), Path(text)):
            path.chmod(0o755)
        (place / "locked").mkdir(mode=0o555)
        nobody = ("setpriv", "--reuid", "65534", "--clear-groups")
        probe = [*nobody, sys.executable, "-c", f"import llmctl, typer, tokenizers; open({text!r})"]
        readable = subprocess.run(probe, capture_output=True, check=False, cwd="/", env=environment())
        if readable.returncode != 0:
            pytest.skip("another user cannot run this Python, or read this folder")
        done = pack(text, "--tokenizer", tokenizer, "-o", place / "locked" / "out", prefix=nobody, cwd="/")
    assert_one_error(done, 2, "is not writable")


def test_bad_records(tmp_path: Path, tokenizer_dir: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(b'{"text": "good"}\n' * 16 + b'{"text": "\xff"}\n' + b'{"text": "good"}\n')
    out = tmp_path / "out"
    base = (bad, "--tokenizer", tokenizer_dir, "-o", out, "--val-fraction", "0")
    done = pack(*base, "-q")
    assert_one_error(done, 4, "bad.jsonl: line 17:", "--on-error skip")
    assert not out.exists()
    done = pack(*base, "-q", "--on-error", "skip")
    assert_one_error(done, 3, "1 record could not be read and was left out", str(out / "errors.jsonl"))
    assert json.loads((out / "errors.jsonl").read_text())["line"] == 17
    bad.write_bytes(b"nothing\n")
    assert_one_error(pack(*base[:3], "-o", tmp_path / "out2", "-q", "--on-error", "skip"), 1, "every record failed")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "good"}\n' * 1000)[:-20])
    assert_one_error(pack(tmp_path / "cut.jsonl.gz", *base[1:3], "-o", tmp_path / "out3", "-q"), 4, "cut.jsonl.gz", "truncated")
    (tmp_path / "wide.txt").write_text("text", encoding="utf-16")
    assert_one_error(pack(tmp_path / "wide.txt", *base[1:3], "-o", tmp_path / "out3", "-q"), 4, "wide.txt", "UTF-16")


def test_a_line_of_200_mb_in_1_gb_of_memory_is_an_error_and_not_a_kill(tmp_path: Path, tokenizer_dir: Path) -> None:
    path = tmp_path / "long.jsonl"
    with open(path, "wb") as file:
        file.write(b'{"text": "a"}\n{"text": "b"}\n{"text": "')
        for _ in range(200):
            file.write(b"a" * 1_000_000)
        file.write(b'"}\n')

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (1_000_000_000, 1_000_000_000))

    done = pack(path, "--tokenizer", tokenizer_dir, "-o", tmp_path / "out", "-q", "--workers", "1", preexec_fn=limit)
    path.unlink()
    assert_one_error(done, 4, "line 3 is 200 MB, the limit is 64 MB (--max-line-bytes)")


def test_shards_of_another_tokenizer_are_refused(tmp_path: Path, corpus: Path, tokenizer_dir: Path) -> None:
    assert pack(corpus, "--tokenizer", tokenizer_dir, "-o", tmp_path / "out").returncode == 0
    content = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    content["model"]["vocab"]["one more"] = 300
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    shutil.copy(tokenizer_dir / "tokenizer_config.json", tmp_path)
    other = (corpus, "--tokenizer", tmp_path / "tokenizer.json", "-o", tmp_path / "out", "-q")
    mine, theirs = (Tokenizer.load(folder).fingerprint for folder in (tmp_path, tokenizer_dir))
    assert_one_error(pack(*other), 4, "another tokenizer", mine, theirs, "--overwrite")
    assert pack(*other, "--overwrite").returncode == 0
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["tokenizer_fingerprint"] == mine


def test_odd_file_names(tmp_path: Path, tokenizer_dir: Path) -> None:
    for i, name in enumerate([b"with space.txt", b"new\nline.txt", b"\xff.txt", b"-x.txt", b"y" * 251 + b".txt"]):
        path = os.path.join(os.fsencode(tmp_path), name)
        with open(path, "w") as file:
            file.write("some text\n")
        done = pack("--tokenizer", tokenizer_dir, "-o", f"out{i}", "-q", "--", name, cwd=tmp_path)
        assert done.returncode == 0, (name, done.stderr)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)])
def test_a_signal_ends_it_with_the_finished_shards_kept(tmp_path: Path, corpus: Path, tokenizer_dir: Path, number: int, code: int) -> None:
    settings = ["-", "--format", "jsonl", "--tokenizer", str(tokenizer_dir), "--shard-tokens", "100000", "--workers", "2", "-v"]
    command = [*LLMCTL, "tokenize", "pack", *settings, "-o", str(tmp_path / "out")]
    process = subprocess.Popen(command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stderr is not None
    data = corpus.read_bytes() * 80  # the packer holds some megabytes that it has read ahead
    sent = len(data) * 2 // 3
    process.stdin.write(data[:sent])
    process.stdin.flush()
    seen = b""
    while b"train-00001" not in seen:
        line = process.stderr.readline()
        assert line, seen
        seen += line
    process.send_signal(number)
    try:
        process.stdin.write(data[sent:])
        process.stdin.close()
    except BrokenPipeError:
        pass
    rest = process.stderr.read()
    assert process.wait(240) in (code, -number)
    assert b"finished shard" in rest
    assert b"Traceback" not in rest
    assert not list((tmp_path / "out").glob(".tmp-*"))
    done = pack(*settings, "-o", tmp_path / "out", input=data)
    assert done.returncode == 0, done.stderr
    assert b"going on with an interrupted run" in done.stderr
    whole = pack(*settings, "-o", tmp_path / "whole", input=data)
    assert whole.returncode == 0, whole.stderr
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")


def test_a_signal_is_heard_while_stdin_is_silent(tmp_path: Path, tokenizer_dir: Path) -> None:
    command = [*LLMCTL, "tokenize", "pack", "-", "--tokenizer", str(tokenizer_dir), "-o", str(tmp_path / "out")]
    process = subprocess.Popen(command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stderr is not None
    assert b"packing" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(240) in (143, -signal.SIGTERM)
    assert b"stopped" in process.stderr.read()


def can_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "-Urm", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="needs user namespaces")
def test_a_disk_that_fills_up_keeps_the_finished_shards(tmp_path: Path, corpus: Path, tokenizer_dir: Path) -> None:
    base = f"{sys.executable} -m llmctl tokenize pack {corpus} --tokenizer {tokenizer_dir} --shard-tokens 20000 --val-fraction 0"
    script = f"""
    mount -t tmpfs -o size=200k none {tmp_path}/small || exit 99
    {base} -o {tmp_path}/small/out -q; echo "code $?"
    ls -A {tmp_path}/small/out; grep -c sha256 {tmp_path}/small/out/pack-state.json
    mount -o remount,size=20m {tmp_path}/small
    {base} -o {tmp_path}/small/out; echo "code $?"
    sha256sum {tmp_path}/small/out/*.tokens
    """
    (tmp_path / "small").mkdir()
    done = subprocess.run(["unshare", "-Urm", "sh", "-c", script], env=environment(), capture_output=True, text=True, check=False)
    assert "llmctl: error: cannot write" in done.stderr, done
    assert "no space left" in done.stderr
    assert "finished shard" in done.stderr
    assert "going on with an interrupted run" in done.stderr
    before, after = done.stdout.split("code 0")
    assert before.startswith("code 5")
    assert ".tmp-" not in before
    kept = [name for name in before.split() if name.endswith(".tokens")]
    assert kept
    assert before.split()[-1] == str(len(kept)), "each is listed"
    assert pack(*base.split()[5:], "-o", tmp_path / "whole").returncode == 0
    assert sorted(sha for sha in after.split() if len(sha) == 64) == sorted(shards(tmp_path / "whole").values())


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
@pytest.mark.parametrize(("call", "when"), [("rename", 2), ("rename", 5), ("fsync", 4), ("write", 12), ("unlink", 1)])
def test_a_kill_at_a_system_call_leaves_what_the_same_command_completes(
    tmp_path: Path, corpus: Path, tokenizer_dir: Path, call: str, when: int
) -> None:
    arguments = (corpus, "--tokenizer", tokenizer_dir, "--shard-tokens", "20000", "--workers", "1", "-q")
    strace = ("strace", "-f", "-o", "/dev/null", "-e", f"trace={call}", "-e", f"inject={call}:signal=SIGKILL:when={when}")
    broken = pack(*arguments, "-o", tmp_path / "out", prefix=strace)
    if b"PTRACE" in broken.stderr or b"ptrace" in broken.stderr:
        pytest.skip("strace may not trace here")
    assert broken.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL)
    assert pack(*arguments, "-o", tmp_path / "out").returncode == 0
    assert pack(*arguments, "-o", tmp_path / "whole").returncode == 0
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")
    assert llmctl("tokenize", "verify", tmp_path / "out").returncode == 0


@pytest.mark.slow
def test_five_gigabytes_pass_through_a_gigabyte(tmp_path: Path) -> None:
    """Text made as `yes` makes it, through a pipe, into a packer and two workers of which none may have more address space."""
    folder = Path(os.environ.get("LLMCTL_TEST_DATA", "/nonexistent")) / "tokenizers" / "gpt2"
    if not folder.is_dir() or shutil.which("prlimit") is None:
        pytest.skip("needs $LLMCTL_TEST_DATA and prlimit")
    num_bytes = 5_000_000_000
    line = "The quick brown fox jumps over the lazy dog, 1234 times; então выпей чаю."
    out = tmp_path / "out"
    options = f"--format lines --val-fraction 0 --workers 2 --tokenizer {folder} -o {out} --json"
    pack = f"prlimit --as={1 << 30} {sys.executable} -m llmctl tokenize pack - {options}"
    done = subprocess.run(["bash", "-c", f"yes '{line}' | head -c {num_bytes} | {pack}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["train"]["num_bytes"] > 0.98 * num_bytes, "all but the ends of lines"
    shutil.rmtree(out)


def test_decontamination_by_the_names_of_tasks(tmp_path: Path, tokenizer_dir: Path) -> None:
    question = "How do you keep a very long wooden ladder from slipping on a wet stone floor in the rain"
    ending = "and then the old man slowly walks over to the river bank to wash his two muddy boots"
    (tmp_path / "piqa_valid.jsonl").write_text(json.dumps({"goal": question, "sol1": "a", "sol2": "b"}) + "\n")
    (tmp_path / "hellaswag_val.jsonl").write_text(json.dumps({"ctx_a": "x", "endings": [ending, "no"]}) + "\n")
    (tmp_path / "own.txt").write_text("nine words of a set of my very own\n")
    (tmp_path / "docs.txt").write_text(f"Asked: {question}?\nSo, {ending}.\nnine words of a set of my very own\nthis one stays\n")

    def pack(*more: str) -> subprocess.CompletedProcess[bytes]:
        command = [*LLMCTL, "tokenize", "pack", "docs.txt", "--format", "lines", "--tokenizer", str(tokenizer_dir), "-o", "out", "--json"]
        command += ["--val-fraction", "0", *more]
        return subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, timeout=120)

    for names, code, message in (
        ("piqa,hellaswagg", 10, "no such task"),
        ("piqa", 2, "--eval-data"),
        ("lambada_openai", 10, "lambada"),
    ):
        done = pack("--decontaminate", names, *(["--eval-data", "."] if code == 10 else []))
        assert_one_error(done, code, message)
    done = pack("--decontaminate", "hellaswag,piqa", "--decontaminate", "own.txt", "--eval-data", ".")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["quality"] == {"contaminated": 3}
    assert facts["train"]["num_documents"] == 1
