"""`llmctl tokenize train`, `encode`, `decode` and `count` as a shell sees them."""

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llmctl.core.tokenizer import Tokenizer
from tests.cli.in_process import Completed, run_here
from tests.cli.test_boundary import assert_one_error, environment
from tests.core.tokenizer_kinds import CHINESE, CODE, ENGLISH, trained, write_kind

LLMCTL = [sys.executable, "-m", "llmctl", "tokenize"]
TOKENIZER = trained()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TOKENIZER as a folder."""
    path = tmp_path_factory.mktemp("tokenizer")
    TOKENIZER.save(path)
    return path


def tokenize(*arguments: object, input: bytes = b"") -> Completed:
    """Run `llmctl tokenize` with `arguments` in this process."""
    return run_here(["tokenize", *map(str, arguments)], input=input, env=environment())


def good(done: Completed) -> bytes:
    """stdout of a run that ended well."""
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


# encode and decode


def odd_text() -> bytes:
    """A few thousand characters from all of Unicode, many of them control characters and line ends of some kind."""
    draw = random.Random(7)
    odd = "\r\n\0\x0b\x0c\x1c\x85\u2028\u2029\ufeff\ufffd\u200d \t<|"
    code_points = [
        draw.choice((draw.randrange(0x20, 0x250), draw.randrange(0x3000, 0xA000), draw.randrange(0x1F000, 0x1FAFF))) for _ in range(3000)
    ]
    return "".join(draw.choice(odd) if draw.random() < 0.3 else chr(c) for c in code_points).encode().removeprefix("\ufeff".encode())


IDENTITY = {
    "lines": b"one\ntwo\n",
    "no newline at the end": b"one\ntwo",
    "nothing": b"",
    "one newline": b"\n",
    "empty lines": b"\n\n\na\n\n",
    "carriage returns": b"a\r\nb\rc\r\n\r",
    "NUL": b"a\0b\n\0\n",
    "other line ends": "a\x0bb\x0cc\x1cd\x85e\u2028f\u2029g\n".encode(),
    "names of special tokens": b"<|endoftext|> <|im_start|>\n<|im_end|>",
    "blanks": b"   \n\t\n  x  \n ",
    "a mark inside": "a\ufeffb\n\ufeffc\n".encode(),
    "text": (ENGLISH + CHINESE + CODE).encode(),
    "everything": odd_text(),
}


@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["ids", "json"])
@pytest.mark.parametrize("name", IDENTITY)
def test_encode_and_decode_give_every_byte_back(name: str, flags: list[str], folder: Path) -> None:
    data = IDENTITY[name]
    encoded = good(tokenize("encode", "--tokenizer", folder, *flags, input=data))
    assert encoded.count(b"\n") == data.count(b"\n")
    assert good(tokenize("decode", "--tokenizer", folder, input=encoded)) == data


def test_each_line_is_encoded_by_itself(folder: Path) -> None:
    lines = [line for line in (ENGLISH + CHINESE).split("\n") if line]
    done = tokenize("encode", "--tokenizer", folder, input="\n".join(lines).encode())
    assert [list(map(int, line.split())) for line in done.stdout.decode().split("\n")] == [TOKENIZER.encode(line) for line in lines]
    as_json = tokenize("encode", "--tokenizer", folder / "tokenizer.json", "--json", input="\n".join(lines).encode())
    assert [json.loads(line) for line in as_json.stdout.decode().split("\n")] == [TOKENIZER.encode(line) for line in lines]


@pytest.mark.parametrize(("command", "lines"), [("encode", ["a king\n", "你好\n"]), ("decode", ["65 66\n", "[67]\n"])])
def test_each_line_is_answered_before_the_next_is_sent(command: str, lines: list[str], folder: Path) -> None:
    process = subprocess.Popen(
        [*LLMCTL, command, "--tokenizer", str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()
    )
    assert process.stdin is not None
    assert process.stdout is not None
    for line in lines:
        process.stdin.write(line.encode())
        process.stdin.flush()
        assert process.stdout.readline().endswith(b"\n")  # hangs where the line is held back
    process.stdin.close()
    assert process.wait(timeout=240) == 0


def test_several_files_are_read_as_one_with_a_newline_between(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a b").write_bytes(b"one")
    (tmp_path / "c").write_bytes(b"two\nthree")
    encoded = good(tokenize("encode", "--tokenizer", folder, tmp_path / "a b", "-", tmp_path / "c", input=b"stdin\n"))
    assert good(tokenize("decode", "--tokenizer", folder, input=encoded)) == b"one\nstdin\ntwo\nthree"


def test_a_byte_order_mark_at_the_start_is_dropped_and_utf16_is_named(folder: Path) -> None:
    assert good(tokenize("encode", "--tokenizer", folder, input=b"\xef\xbb\xbfking\n")) == good(
        tokenize("encode", "--tokenizer", folder, input=b"king\n")
    )
    assert_one_error(tokenize("encode", "--tokenizer", folder, input="king\n".encode("utf-16")), 4, "stdin", "UTF-16")


def test_special_tokens_in_a_text_are_text_unless_asked_for(folder: Path) -> None:
    plain = tokenize("encode", "--tokenizer", folder, input=b"a<|im_end|>\n<|im_end|><|endoftext|>\n")
    assert plain.stdout.decode().split("\n")[0] == " ".join(map(str, TOKENIZER.encode("a<|im_end|>")))
    assert "3 were encoded as plain text; --allow-special" in plain.stderr.decode()
    allowed = tokenize("encode", "--tokenizer", folder, "--allow-special", input=b"<|im_end|><|endoftext|>\n")
    end, eos = TOKENIZER.special_tokens["<|im_end|>"], TOKENIZER.eos_id
    assert allowed.stdout.decode() == f"{end} {eos}\n"
    assert good(tokenize("decode", "--tokenizer", folder, input=allowed.stdout)) == b"<|im_end|><|endoftext|>\n"
    assert good(tokenize("decode", "--tokenizer", folder, "--skip-special", input=allowed.stdout)) == b"\n"
    assert good(tokenize("encode", "--tokenizer", folder, "--add-bos", input=b"\n")) == f"{TOKENIZER.bos_id}\n".encode()


def test_characters_without_ids_are_counted(tmp_path: Path) -> None:
    write_kind(tmp_path, "incomplete bytes")
    done = tokenize("encode", "--tokenizer", tmp_path, input="king 🤗☃\x01\nking\n☃".encode())
    assert done.returncode == 0
    tokenizer = Tokenizer.load(tmp_path)
    lost = sum(tokenizer.decode(tokenizer.encode(char)) != char for char in "king 🤗☃\x01king☃")
    assert lost > 0
    assert f"warning: {lost} characters were lost" in done.stderr.decode()


def test_lines_that_a_tokenizer_rewrites_are_counted(tmp_path: Path) -> None:
    write_kind(tmp_path, "wordpiece")
    done = tokenize("encode", "--tokenizer", tmp_path, input=b"king\nKing\nking  king\n")
    assert done.returncode == 0
    assert "warning: 2 lines will not come back as they were" in done.stderr.decode()


def test_bad_utf8_stops_with_its_place_after_the_lines_before_it(folder: Path) -> None:
    data = b"".join(b"line\n" for _ in range(16)) + b"bad \xff here\nlast\n"
    done = tokenize("encode", "--tokenizer", folder, input=data)
    assert_one_error(done, 4, "stdin: line 17", "byte 4 of the line", "byte offset 84 of the file", "--on-error skip")
    assert done.stdout.count(b"\n") == 16
    skipped = tokenize("encode", "--tokenizer", folder, "--on-error", "skip", input=data)
    assert skipped.returncode == 3
    assert skipped.stdout.count(b"\n") == 17
    first, last = skipped.stderr.decode().splitlines()
    assert first.startswith("llmctl: warning: stdin: line 17")
    assert last == "llmctl: error: 1 of 18 lines were left out; the reasons are above"


def test_when_every_line_is_bad_it_failed(folder: Path) -> None:
    done = tokenize("encode", "--tokenizer", folder, "--on-error", "skip", input=b"\xff\n\xfe\n")
    assert done.returncode == 1
    assert done.stdout == b""


@pytest.mark.parametrize(
    "line", ["x", "1.5", "1,2", "[1, 2", "[[1]]", "[true]", '{"a": 1}', "-1", "99999999", "1 你", "9" * 5000, "[" * 9000]
)
def test_a_line_that_is_no_ids_is_named(line: str, folder: Path) -> None:
    done = tokenize("decode", "--tokenizer", folder, input=f"65\n{line}\n".encode())
    assert_one_error(done, 4, "stdin: line 2")
    assert done.stdout == TOKENIZER.decode([65]).encode() + b"\n"


def test_decoded_text_as_json(folder: Path) -> None:
    ids = TOKENIZER.encode('a "king"\n你好\t')
    done = tokenize("decode", "--tokenizer", folder, "--json", input=(" ".join(map(str, ids)) + "\n[]\n").encode())
    assert [json.loads(line) for line in good(done).decode().splitlines()] == ['a "king"\n你好\t', ""]


def test_a_line_beyond_the_limit_is_named_and_not_held(folder: Path) -> None:
    data = b"a\nb\n" + b"x" * 3_000_000 + b"\nc\n"
    done = tokenize("encode", "--tokenizer", folder, "--max-line-bytes", 1_000_000, input=data)
    assert_one_error(done, 4, "stdin: line 3 is 3 MB, the limit is 1 MB (--max-line-bytes)")
    skipped = tokenize("encode", "--tokenizer", folder, "--max-line-bytes", 1_000_000, "--on-error", "skip", input=data)
    assert (skipped.returncode, skipped.stdout.count(b"\n")) == (3, 3)
    assert_one_error(
        tokenize("count", "--tokenizer", folder, "--format", "lines", "--max-line-bytes", 1_000_000, input=data),
        4,
        "error: stdin: line 3 is 3 MB, the limit is 1 MB (--max-line-bytes)",
    )


def test_what_is_missing_or_closed(folder: Path, tmp_path: Path) -> None:
    assert_one_error(tokenize("encode", input=b"x"), 2, "--tokenizer is missing")
    assert_one_error(tokenize("encode", "--tokenizer", tmp_path), 10, "has no tokenizer")
    assert_one_error(tokenize("encode", "--tokenizer", tmp_path / "none.json"), 10, "no such file")
    assert_one_error(tokenize("encode", "--tokenizer", folder, tmp_path / "none"), 10, "no such file")
    assert_one_error(tokenize("encode", "--tokenizer", folder, tmp_path), 2, "is a folder")
    assert_one_error(tokenize("encode", "--tokenizer", folder, "-", "-"), 2, "named twice")
    (tmp_path / "tokenizer.json").write_text("{}")
    assert_one_error(tokenize("encode", "--tokenizer", tmp_path), 4, "tokenizer.json")
    for command in ("encode", "decode"):
        closed = subprocess.run(
            f"{' '.join(LLMCTL)} {command} --tokenizer '{folder}' <&-", shell=True, env=environment(), capture_output=True, check=False
        )
        assert_one_error(closed, 2, "stdin is closed")


def test_a_full_disk_and_a_reader_that_went_away(folder: Path, tmp_path: Path) -> None:
    with open("/dev/full", "wb") as full:
        command = [*LLMCTL, "encode", "--tokenizer", str(folder)]
        done = subprocess.run(command, input=b"x\n", stdout=full, stderr=subprocess.PIPE, env=environment(), check=False)
    assert_one_error(done, 5, "stdout", "no space left")
    (tmp_path / "long").write_bytes(b"a line\n" * 40_000)
    script = f"set -o pipefail; {' '.join(LLMCTL)} encode --tokenizer '{folder}' '{tmp_path}/long' | head -1"
    gone = subprocess.run(["bash", "-c", script], env=environment(), capture_output=True, check=False)
    assert (gone.returncode, gone.stdout.count(b"\n"), gone.stderr) == (141, 1, b"")


def test_a_filter_ends_at_a_signal(folder: Path) -> None:
    process = subprocess.Popen(
        [*LLMCTL, "encode", "--tokenizer", str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"x\n")
    process.stdin.flush()
    assert process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=240) in (-signal.SIGTERM, 128 + signal.SIGTERM)


def test_a_tokenizer_needs_neither_torch_nor_transformers(folder: Path) -> None:
    program = "import atexit, sys; atexit.register(lambda: print(sorted({'torch', 'transformers'} & set(sys.modules)), file=sys.stderr));"
    program += "from llmctl.cli.main import main; main()"
    command = [sys.executable, "-c", program, "tokenize", "encode", "--tokenizer", str(folder)]
    done = subprocess.run(command, input=b"x\n", env=environment(), capture_output=True, check=True)
    assert done.stderr == b"[]\n"


def test_odd_file_names(folder: Path, tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/-caf\xe9 \n" + b"x" * 200
    with open(name, "wb") as file:
        file.write(b"king\nbad \xff\n")
    for command in ("encode", "count"):
        arguments = [*(os.fsencode(part) for part in LLMCTL), command.encode(), b"--tokenizer", os.fsencode(folder), name]
        done = subprocess.run(arguments, env=environment(), capture_output=True, check=False)
        assert_one_error(done, 4, "-caf\\xe9", "line 2")


# count


def test_counts_are_those_of_the_whole_text(folder: Path, tmp_path: Path) -> None:
    text = ENGLISH + CHINESE
    (tmp_path / "a.txt").write_text(text)
    records = [{"text": CHINESE}, {"text": ENGLISH}, {"text": "<|im_end|>"}]
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in records).encode()))
    done = tokenize("count", "--tokenizer", folder, "--json", tmp_path / "a.txt", tmp_path / "b.jsonl.gz")
    facts = json.loads(good(done))
    texts = [[text], [record["text"] for record in records]]
    for row, documents in zip(facts["inputs"], texts, strict=True):
        num_bytes = sum(len(t.encode()) for t in documents)
        num_tokens = sum(len(TOKENIZER.encode(t)) for t in documents)
        expected = (num_tokens, num_bytes, sum(map(len, documents)), len(documents), round(num_bytes / num_tokens, 4))
        assert (row["tokens"], row["bytes"], row["characters"], row["documents"], row["bytes_per_token"]) == expected
    assert facts["tokens"] == sum(row["tokens"] for row in facts["inputs"])
    assert "1 counted as plain text" in done.stderr.decode()
    table = good(tokenize("count", "--tokenizer", folder, tmp_path / "a.txt", tmp_path / "b.jsonl.gz")).decode().splitlines()
    assert table[0].split() == ["tokens", "bytes", "characters", "documents", "bytes/token", "input"]
    assert [line.split()[0] for line in table[1:]] == [str(n) for n in (*(row["tokens"] for row in facts["inputs"]), facts["tokens"])]
    assert table[-1].endswith("total")


def test_a_large_text_counts_as_if_it_were_encoded_whole(folder: Path) -> None:
    text = (ENGLISH + CHINESE + CODE) * 3000  # several pieces of a mebibyte
    facts = json.loads(good(tokenize("count", "--tokenizer", folder, "--json", input=text.encode())))
    assert (facts["tokens"], facts["documents"]) == (len(TOKENIZER.encode(text)), 1)


def test_nothing_counts_as_nothing(folder: Path) -> None:
    assert json.loads(good(tokenize("count", "--tokenizer", folder, "--json")))["tokens"] == 0
    assert good(tokenize("count", "--tokenizer", folder)).decode().splitlines()[1].split()[:5] == ["0", "0", "0", "0", "-"]


def test_what_cannot_be_counted_is_named(folder: Path) -> None:
    data = b'{"text": "a"}\n{"text": 5}\n'
    assert_one_error(tokenize("count", "--tokenizer", folder, "--format", "jsonl", input=data), 4, "stdin: line 2", "a number")
    skipped = tokenize("count", "--tokenizer", folder, "--format", "jsonl", "--on-error", "skip", "--json", input=data)
    assert skipped.returncode == 3
    assert json.loads(skipped.stdout)["documents"] == 1


# train


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A small corpus in three forms."""
    path = tmp_path / "corpus"
    path.mkdir()
    (path / "a.txt").write_text(ENGLISH * 60)
    (path / "b.jsonl").write_text("".join(json.dumps({"text": CHINESE * 9}) + "\n" for _ in range(5)))
    (path / "c.txt.gz").write_bytes(gzip.compress(CODE.encode() * 30))
    return path


def test_training_writes_a_tokenizer_and_says_how_good_it_is(corpus: Path, tmp_path: Path) -> None:
    done = tokenize("train", corpus, "-o", tmp_path / "t", "--vocab-size", 500, "--chat", "--special-token", "<|x|>", "--json")
    facts = json.loads(good(done))
    tokenizer = Tokenizer.load(tmp_path / "t")
    assert (facts["vocab_size"], facts["fingerprint"], facts["documents"]) == (tokenizer.vocab_size, tokenizer.fingerprint, 7)
    assert facts["vocab_size"] == 500
    assert facts["bytes_per_token"] > 1
    assert facts["heldout_bytes"] > 0
    assert list(tokenizer.special_tokens) == ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|x|>"]
    assert tokenizer.chat_template is not None
    assert "bytes per token on" in done.stderr.decode()
    assert sorted(path.name for path in (tmp_path / "t").iterdir()) == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "t"]


def test_training_is_the_same_for_any_threads(corpus: Path, tmp_path: Path) -> None:
    for threads in ("1", "2"):  # as processes: the number is for good from the first use on
        command = [*LLMCTL, "train", str(corpus), "-o", str(tmp_path / threads), "--vocab-size", "500", "--threads", threads, "-q"]
        good(subprocess.run(command, env=environment(), capture_output=True, check=False))
    assert (tmp_path / "1" / "tokenizer.json").read_bytes() == (tmp_path / "2" / "tokenizer.json").read_bytes()


def test_a_tokenizer_is_replaced_only_when_asked(corpus: Path, tmp_path: Path) -> None:
    command = ["train", corpus / "a.txt", "-o", tmp_path / "t", "--vocab-size", 300]
    good(tokenize(*command, "--chat"))
    before = (tmp_path / "t" / "tokenizer.json").read_bytes()
    assert_one_error(tokenize(*command), 2, "holds tokenizer.json already", "--overwrite")
    assert (tmp_path / "t" / "tokenizer.json").read_bytes() == before
    good(tokenize(*command, "--overwrite"))
    assert Tokenizer.load(tmp_path / "t").chat_template is None


def test_training_reads_stdin_and_a_template(tmp_path: Path) -> None:
    (tmp_path / "template").write_text("{{ messages[0].content }}")
    command = ["train", "-", "-o", tmp_path / "t", "--vocab-size", 280, "--chat-template", tmp_path / "template"]
    good(tokenize(*command, input=ENGLISH.encode()))
    tokenizer = Tokenizer.load(tmp_path / "t")
    assert tokenizer.render_chat([{"role": "user", "content": "hi"}], add_generation_prompt=True) == "hi"


def test_a_corpus_too_small_for_the_vocabulary_is_a_warning(tmp_path: Path) -> None:
    done = tokenize("train", "-", "-o", tmp_path / "t", "--vocab-size", 5000, input=ENGLISH.encode())
    assert done.returncode == 0
    assert "not 5,000" in done.stderr.decode()


def test_wrong_training_creates_nothing(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "bad.jinja").write_text("{% for %}")
    (tmp_path / "bad.txt").write_bytes(b"ok\nbad \xff\n")
    (tmp_path / "empty.txt").write_bytes(b"")
    before = sorted(tmp_path.iterdir())
    out = tmp_path / "t"
    a = corpus / "a.txt"
    for arguments, code, parts in [
        ([a], 2, ["--out-dir is missing"]),
        (["-o", out], 2, ["INPUT is missing"]),
        ([a, "-o", tmp_path / "file"], 2, ["is a file"]),
        ([a, "-o", tmp_path / "no" / "t"], 2, ["does not exist"]),
        ([a, "-o", out, "--vocab-size", 100], 2, ["--vocab-size", "257"]),
        ([a, "-o", out, "--vocab-size", 258, "--chat"], 2, ["at least 259"]),
        ([a, "-o", out, "--kind", "magic"], 2, ["--kind", "bpe"]),
        ([a, "-o", out, "--special-token", " "], 2, ["--special-token"]),
        ([tmp_path / "none", "-o", out], 10, ["none", "no such file"]),
        ([a, "-o", out, "--chat-template", tmp_path / "none"], 10, ["--chat-template"]),
        ([a, "-o", out, "--chat-template", tmp_path / "bad.jinja"], 4, ["template", "line 1"]),
        ([tmp_path / "bad.txt", "-o", out], 4, ["bad.txt", "line 2", "UTF-8"]),
        ([tmp_path / "empty.txt", "-o", out], 4, ["no text"]),
    ]:
        assert_one_error(tokenize("train", *arguments), code, *parts)
        assert sorted(tmp_path.iterdir()) == before, arguments


def test_training_stops_at_once_at_a_signal(tmp_path: Path) -> None:
    draw = random.Random(3)
    (tmp_path / "long.txt").write_text("".join(chr(draw.randrange(0x4E00, 0x9000)) for _ in range(2_000_000)))
    command = [*LLMCTL, "train", str(tmp_path / "long.txt"), "-o", str(tmp_path / "t"), "--vocab-size", "2000000", "--verbose"]
    command += ["--min-frequency", "1"]  # a merge for nearly each of the characters: long enough under any load
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment())
    assert process.stderr is not None
    assert b"learning from" in process.stderr.readline()  # now in the native library, which knows no signals
    process.send_signal(signal.SIGINT)
    assert b"interrupted" in process.stderr.read()
    assert process.wait(timeout=240) in (-signal.SIGINT, 128 + signal.SIGINT)
    assert not (tmp_path / "t").exists()


def test_lines_that_cannot_be_read_can_be_left_out_of_training(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(ENGLISH.encode() * 20 + b"bad \xff line\n" + ENGLISH.encode())
    done = tokenize("train", tmp_path / "bad.txt", "-o", tmp_path / "t", "--vocab-size", 300, "--on-error", "skip")
    assert done.returncode == 3, done.stderr
    assert Tokenizer.load(tmp_path / "t").vocab_size == 300


def test_a_tokenizer_is_extended(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("llmctl.core.native.library")
    (tmp_path / "a.txt").write_text("The quick brown foxes jumped over it. " * 50)
    more = ["--special-token", "<|tool|>", "--json"]
    done = good(tokenize("train", tmp_path / "a.txt", "--from", folder, "--vocab-size", 420, "-o", tmp_path / "new", *more))
    facts = json.loads(done)
    assert facts["vocab_size"] == 420
    assert facts["bytes_per_token"] > facts["bytes_per_token_before"]
    new = Tokenizer.load(tmp_path / "new")
    assert new.special_tokens == {**TOKENIZER.special_tokens, "<|tool|>": 419}
    assert new.encode("國王") == TOKENIZER.encode("國王")
    wrong = tokenize("train", tmp_path / "a.txt", "--from", folder, "--vocab-size", 420, "--kind", "word", "-o", tmp_path / "none")
    assert_one_error(wrong, 2, "--kind", "--from")
    assert_one_error(tokenize("train", tmp_path / "a.txt", "--from", folder, "-o", tmp_path / "none", "--vocab-size", 300), 2, "already")
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_training_reads_more_than_it_may_have(tmp_path: Path) -> None:
    """1.6 GB through a pipe into 1 GiB of address space, 20 million different words among them: more than the table holds."""
    if shutil.which("prlimit") is None:
        pytest.skip("needs prlimit")
    line = "The quick brown fox jumps over the lazy dog; então выпей чаю."
    train = f"prlimit --as={1 << 30} {sys.executable} -m llmctl tokenize train - --format text --pattern gpt2 --vocab-size 2000 --json"
    source = f"(yes '{line}' | head -c 700000000; seq 20000000; yes '{line}' | head -c 700000000)"
    done = subprocess.run(
        ["bash", "-c", f"{source} | {train} -o {tmp_path / 'out'}"], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["trainer"] == "native"
    assert facts["sample_bytes"] == facts["bytes"] > 1_500_000_000
    assert facts["dropped_words"] > 10_000_000
    tokenizer = Tokenizer.load(tmp_path / "out")
    assert len(tokenizer.encode(" quick brown fox jumps")) == 4
