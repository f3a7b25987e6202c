"""Packing against a packer of ten lines, and its promises: same bytes for any workers, kill, full disk or order of arrival."""

import dataclasses
import gzip
import hashlib
import io
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import pre_tokenizers

from llmctl.core.config.pack import PackConfig
from llmctl.core.data import batches, documents, encode, encoders, packfolder, worker
from llmctl.core.data.pack import pack
from llmctl.core.data.packevents import Packed, PackEvent, PackPlanned, PackWarned
from llmctl.core.data.shards import TokenDataset, TokenShard
from llmctl.core.data.verify import DamageFound, Verified, verify
from llmctl.core.errors import InputError, Interrupted, LlmctlError, LockedError, NotFoundError, UsageError
from llmctl.core.files import FileLock
from llmctl.core.tokenizer import Tokenizer

from .conftest import byte_level

SMALL_PIECES = 4000


@pytest.fixture(autouse=True)
def many_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that these small corpora come in many pieces, and a batch holds a few of their documents."""
    monkeypatch.setattr(documents, "PIECE_BYTES", SMALL_PIECES)


def run(
    inputs: Any, out_dir: Path, tokenizer_dir: Path, *, stdin: bytes | None = None, stop: Any = None, **settings: Any
) -> list[PackEvent]:
    """Pack to the end and give the events."""
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    settings = {"workers": 1, **settings}
    config = PackConfig(inputs=tuple(map(str, inputs)), tokenizer=str(tokenizer_dir), out_dir=out_dir, **settings)
    stream = None if stdin is None else io.BytesIO(stdin)
    return list(pack(config, stdin=stream, stop=stop or (lambda: None)))


def hashes(folder: Path) -> dict[str, str]:
    """Name -> sha256 of everything in a folder but the lock."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def some_documents(num: int, seed: int = 0) -> list[str]:
    """Documents of 0 to 400 words, some Chinese, some with names of special tokens, some with odd blanks."""
    generator = random.Random(seed)
    words = [
        "the",
        "king",
        "fox",
        "國王",
        "狐狸。",
        "\n",
        "\n\n",
        "  ",
        "<|endoftext|>",
        "12345",
        "é",
        "🦊",
        "golden-ball,",
        "\t",
        "\u3000",
    ]
    return ["".join(generator.choices(words, k=generator.choice([0, 1, 3, 30, 400]))) for _ in range(num)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    lines = [json.dumps({"id": i, "text": t}, ensure_ascii=i % 2 == 0) for i, t in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def naive(texts: list[str], tokenizer: Tokenizer, held_out: Callable[[str], bool]) -> dict[str, tuple[list[int], list[int]]]:
    """The whole of packing, as anybody would write it: split -> (ids, where each document ends)."""
    result: dict[str, tuple[list[int], list[int]]] = {"train": ([], []), "val": ([], [])}
    for text in texts:
        ids, ends = result["val" if held_out(text) else "train"]
        assert tokenizer.eos_id is not None
        ids += [*tokenizer.encode(text), tokenizer.eos_id]
        ends.append(len(ids))
    return result


def by_hash(fraction: float, seed: int = 0) -> Callable[[str], bool]:
    """The split rule as the docs state it: a keyed BLAKE2b of the first 64 KiB, as a fraction of 2^64."""

    def held_out(text: str) -> bool:
        digest = hashlib.blake2b(text.encode()[:65536], digest_size=8, key=b"llmctl split %d" % seed).hexdigest()
        return int(digest, 16) / 2**64 < fraction

    return held_out


def stream_of(folder: Path, split: Any) -> tuple[list[int], list[int]]:
    """A split as written, read with nothing but the shards' own tables."""
    manifest = json.loads((folder / "manifest.json").read_text())
    ids: list[int] = []
    ends: list[int] = []
    for name in manifest["splits"][split]["shards"]:
        shard = TokenShard.open(folder / name)
        ends += [len(ids) + int(e) for e in shard.document_ends]
        ids += shard.tokens.tolist()
    return ids, ends


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "docs.jsonl", some_documents(300))


@pytest.mark.parametrize("shard_tokens", [997, 5000, 1 << 25])
def test_packing_equals_the_naive_packer(
    tmp_path: Path, corpus: Path, tokenizer: Tokenizer, tokenizer_dir: Path, shard_tokens: int
) -> None:
    events = run(corpus, tmp_path / "out", tokenizer_dir, val_fraction=0.2, shard_tokens=shard_tokens)
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    wanted = naive(texts, tokenizer, by_hash(0.2))
    for split in ("train", "val"):
        assert stream_of(tmp_path / "out", split) == wanted[split]
        dataset = TokenDataset.open(tmp_path / "out", split)
        assert dataset.num_documents == len(wanted[split][1])
        assert dataset.num_bytes == sum(len(t.encode()) for t in texts if by_hash(0.2)(t) == (split == "val"))
        assert all(s.header.num_tokens == shard_tokens for s in dataset.shards[:-1])
        assert dataset.tokenizer().fingerprint == tokenizer.fingerprint
    done = events[-1]
    assert isinstance(done, Packed)
    assert done.num_special_names == sum(t.count("<|endoftext|>") for t in texts)
    assert any(isinstance(e, PackWarned) and "special tokens" in e.message for e in events)
    assert isinstance([*verify(tmp_path / "out")][-1], Verified)


def test_ids_come_back_as_the_text(tmp_path: Path, corpus: Path, tokenizer: Tokenizer, tokenizer_dir: Path) -> None:
    run(corpus, tmp_path / "out", tokenizer_dir, val_fraction=0)
    ids, ends = stream_of(tmp_path / "out", "train")
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    starts = [0, *ends[:-1]]
    assert [tokenizer.decode_bytes(ids[a : b - 1]).decode() for a, b in zip(starts, ends, strict=True)] == texts


def test_any_number_of_workers_and_any_way_in_give_the_same_bytes(tmp_path: Path, corpus: Path, tokenizer_dir: Path) -> None:
    for workers in (1, 2, 3):
        run(corpus, tmp_path / f"w{workers}", tokenizer_dir, workers=workers, val_fraction=0.2, shard_tokens=1000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "MOST_THREADS", 1)
        run(corpus, tmp_path / "processes", tokenizer_dir, workers=2, val_fraction=0.2, shard_tokens=1000)
        patch.setattr(documents, "PIECE_BYTES", 1 << 20)
        run(corpus, tmp_path / "plain", tokenizer_dir, val_fraction=0.2, shard_tokens=1000)
    names = ("w1", "w2", "w3", "processes", "plain")
    assert len({json.dumps(hashes(tmp_path / name)) for name in names}) == 1
    data = corpus.read_bytes()
    (tmp_path / "docs.jsonl.gz").write_bytes(gzip.compress(data))
    run(tmp_path / "docs.jsonl.gz", tmp_path / "gz", tokenizer_dir, val_fraction=0.2, shard_tokens=1000)
    run("-", tmp_path / "stdin", tokenizer_dir, stdin=data, format="jsonl", val_fraction=0.2, shard_tokens=1000)
    shards = {name: sha for name, sha in hashes(tmp_path / "plain").items() if name.endswith(".tokens")}
    for other in ("gz", "stdin"):
        assert {name: sha for name, sha in hashes(tmp_path / other).items() if name.endswith(".tokens")} == shards


def test_a_text_in_pieces_equals_the_text_in_one(tmp_path: Path, tokenizer: Tokenizer, tokenizer_dir: Path) -> None:
    text = "\n".join(some_documents(40, seed=3)) + "\nthe end\nof it\n" * 200
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    eos = [tokenizer.eos_id]
    for settings in ({"val_fraction": 0}, {"val_fraction": 0.25}):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(documents, "PIECE_BYTES", 300)
            patch.setattr(encoders, "_CUT_BYTES", 300)
            out = tmp_path / f"out{settings['val_fraction']}"
            run(tmp_path / "book.txt", out, tokenizer_dir, shard_tokens=777, **settings)
        data = text.encode()
        head = int(len(data) * (1 - settings["val_fraction"]))
        assert stream_of(out, "train")[0] == tokenizer.encode(data[:head].decode()) + eos
        if settings["val_fraction"]:
            assert stream_of(out, "val")[0] == tokenizer.encode(data[head:].decode()) + eos


def test_one_text_file_holds_out_its_tail_and_many_hold_out_files(tmp_path: Path, tokenizer_dir: Path) -> None:
    for i in range(30):
        (tmp_path / f"{i:02}.txt").write_text(f"file {i} says something\n")
    events = run(tmp_path / "00.txt", tmp_path / "one", tokenizer_dir)
    assert isinstance(events[0], PackPlanned)
    assert (events[0].split_kind, events[0].val_fraction) == ("tail", 0.1)
    events = run(str(tmp_path / "*.txt"), tmp_path / "many", tokenizer_dir, val_fraction=0.3)
    assert events[0].split_kind == "hash"
    done = events[-1]
    assert done.val is not None
    assert done.train.num_documents + done.val.num_documents == 30
    events = run((tmp_path / "00.txt", tmp_path / "01.txt"), tmp_path / "named", tokenizer_dir, val_data=(str(tmp_path / "02.txt"),))
    assert (events[-1].train.num_documents, events[-1].val.num_documents) == (2, 1)
    events = run((tmp_path / "00.txt", tmp_path / "01.txt"), tmp_path / "none", tokenizer_dir, val_fraction=1e-9)
    assert events[-1].val is None
    assert any(isinstance(e, PackWarned) and "--val-fraction" in e.message for e in events)


def test_json_validation_data_is_validation_as_a_whole(tmp_path: Path, corpus: Path, tokenizer_dir: Path) -> None:
    other = write_jsonl(tmp_path / "val.jsonl", some_documents(20, seed=9))
    done = run(corpus, tmp_path / "out", tokenizer_dir, val_data=(str(other),))[-1]
    assert (done.train.num_documents, done.val.num_documents) == (300, 20)


def test_bos_begins_documents_where_the_tokenizer_says_so(tmp_path: Path) -> None:
    tokenizer = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), bos="<s>")
    (tmp_path / "tok").mkdir()
    tokenizer.save(tmp_path / "tok")
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    run(tmp_path / "a.txt", tmp_path / "off", tmp_path / "tok", format="lines", val_fraction=0)
    run(tmp_path / "a.txt", tmp_path / "on", tmp_path / "tok", format="lines", val_fraction=0, add_bos=True)
    one, two, eos, bos = tokenizer.encode("one"), tokenizer.encode("two"), tokenizer.eos_id, tokenizer.bos_id
    assert stream_of(tmp_path / "off", "train")[0] == [*one, eos, *two, eos]
    assert stream_of(tmp_path / "on", "train")[0] == [bos, *one, eos, bos, *two, eos]


def test_special_tokens_in_the_text_are_text_unless_allowed(tmp_path: Path, tokenizer: Tokenizer, tokenizer_dir: Path) -> None:
    (tmp_path / "a.txt").write_text("a<|endoftext|>b")
    run(tmp_path / "a.txt", tmp_path / "text", tokenizer_dir, val_fraction=0)
    run(tmp_path / "a.txt", tmp_path / "special", tokenizer_dir, val_fraction=0, allow_special=True)
    assert stream_of(tmp_path / "text", "train")[0].count(tokenizer.eos_id) == 1
    assert stream_of(tmp_path / "special", "train")[0].count(tokenizer.eos_id) == 2
    assert stream_of(tmp_path / "special", "train")[1] == [len(stream_of(tmp_path / "special", "train")[0])], "it ends no document"


def test_a_vocabulary_of_70_000_takes_uint32_and_nothing_wraps(tmp_path: Path) -> None:
    tokenizer = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), vocab_size=70_000)
    (tmp_path / "tok").mkdir()
    tokenizer.save(tmp_path / "tok")
    (tmp_path / "a.txt").write_text("a b a\nxaxa")
    run(tmp_path / "a.txt", tmp_path / "out", tmp_path / "tok", val_fraction=0)
    shard = TokenShard.open(tmp_path / "out" / "train-00000.tokens")
    assert shard.header.dtype.name == "uint32"
    assert shard.tokens.max() == 69_999
    assert shard.tokens.tolist()[:-1] == tokenizer.encode("a b a\nxaxa")


# records that cannot be read

BAD_LINES: dict[str, tuple[bytes, str]] = {
    "invalid UTF-8": (b'{"text": "ab\xff"}', "not UTF-8 at byte 12"),
    "malformed": (b'{"text": "a', "not valid JSON"),
    "no object": (b'["text"]', "a JSON object is wanted, a list was found"),
    "no field": (b'{"body": "a"}', "no field 'text'"),
    "null": (b'{"text": null}', "holds null"),
    "number": (b'{"text": 3.5}', "holds a number"),
    "nested 100,000 deep": (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deep"),
    "duplicate key": (b'{"text": "a", "text": "b"}', "'text' appears twice"),
    "NaN": (b'{"text": "a", "score": NaN}', "NaN is not JSON"),
    "lone surrogate": (b'{"text": "a\\ud800"}', "lone surrogate"),
    "long": (b'{"text": "' + b"a" * 3000 + b'"}', "--max-line-bytes"),
}


# The way of an error through the pipe is the same for all: two of them show it.
@pytest.mark.parametrize(("case", "workers"), [*((case, 1) for case in BAD_LINES), ("invalid UTF-8", 2), ("long", 2)])
def test_a_bad_record_stops_with_its_line_or_is_skipped_and_listed(tmp_path: Path, tokenizer_dir: Path, case: str, workers: int) -> None:
    bad, reason = BAD_LINES[case]
    good = b"\n".join(b'{"text": "good %d"}' % i for i in range(16))
    limit = 300_000 if case.startswith("nested") else 2000
    (tmp_path / "a.jsonl").write_bytes(good + b"\n" + bad + b"\n" + good)
    with pytest.raises(InputError, match=r"a\.jsonl: line 17[: ].*--on-error skip") as caught:
        run(tmp_path / "a.jsonl", tmp_path / "out", tokenizer_dir, max_line_bytes=limit, workers=workers)
    assert reason in str(caught.value)
    assert not (tmp_path / "out").exists(), "nothing is left that would have to be overwritten"
    done = run(tmp_path / "a.jsonl", tmp_path / "out", tokenizer_dir, max_line_bytes=limit, on_error="skip", val_fraction=0)[-1]
    assert (done.num_errors, done.train.num_documents) == (1, 32)
    (line,) = (tmp_path / "out" / "errors.jsonl").read_text().splitlines()
    entry = json.loads(line)
    assert (entry["line"], entry["byte"]) == (17, len(good) + 1)
    assert reason in entry["error"]


def test_bad_lines_of_a_text_are_left_out_and_listed(tmp_path: Path, tokenizer: Tokenizer, tokenizer_dir: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\ntw\xffo\nthree\n\xc3(\n")
    with pytest.raises(InputError, match=r"a\.txt: line 2: not valid UTF-8 at byte 2 of the line \(byte 9 of the text\)"):
        run(tmp_path / "a.txt", tmp_path / "out", tokenizer_dir)
    done = run(tmp_path / "a.txt", tmp_path / "out", tokenizer_dir, on_error="skip", val_fraction=0)[-1]
    assert done.num_errors == 2
    assert stream_of(tmp_path / "out", "train")[0] == [*tokenizer.encode("one\nthree\n"), tokenizer.eos_id]
    assert [json.loads(x)["line"] for x in (tmp_path / "out" / "errors.jsonl").read_text().splitlines()] == [2, 4]


def test_when_every_record_fails_nothing_is_made(tmp_path: Path, tokenizer_dir: Path) -> None:
    (tmp_path / "a.jsonl").write_text("[]\n{}\n")
    with pytest.raises(LlmctlError, match=r"every record failed.*line 1") as caught:
        run(tmp_path / "a.jsonl", tmp_path / "out", tokenizer_dir, on_error="skip")
    assert caught.value.exit_code == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"\n \n\t\n", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("format", ["text", "lines", "paragraphs", "jsonl"])
def test_an_empty_corpus_is_an_error(tmp_path: Path, tokenizer_dir: Path, content: bytes, format: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(InputError, match="no text"):
        run(tmp_path / "a.txt", tmp_path / "out", tokenizer_dir, format=format)
    assert not (tmp_path / "out").exists()


def test_an_empty_document_is_its_end_alone(tmp_path: Path, tokenizer: Tokenizer, tokenizer_dir: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["", "x", ""])
    run(tmp_path / "a.jsonl", tmp_path / "out", tokenizer_dir, val_fraction=0)
    eos = tokenizer.eos_id
    assert stream_of(tmp_path / "out", "train") == ([eos, *tokenizer.encode("x"), eos, eos], [1, 3, 4])


def test_a_truncated_input_leaves_no_shard_marked_done(tmp_path: Path, corpus: Path, tokenizer_dir: Path) -> None:
    data = gzip.compress(corpus.read_bytes())
    (tmp_path / "a.jsonl.gz").write_bytes(data[: len(data) // 2])
    for settings in ({}, {"on_error": "skip"}):
        with pytest.raises(InputError, match=r"a\.jsonl\.gz: .*truncated"):
            run(tmp_path / "a.jsonl.gz", tmp_path / "out", tokenizer_dir, **settings)
        assert not (tmp_path / "out").exists()


# going on after anything


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, corpus: Path, tokenizer_dir: Path) -> dict[str, str]:
    """Hashes of an unbroken run with many small shards."""
    out = tmp_path_factory.mktemp("reference") / "out"
    with pytest.MonkeyPatch.context() as patch:  # a fixture of the module comes before those of its tests
        patch.setattr(documents, "PIECE_BYTES", SMALL_PIECES)
        run(corpus, out, tokenizer_dir, **SMALL_SHARDS)
    return hashes(out)


SMALL_SHARDS: dict[str, Any] = {"val_fraction": 0.3, "shard_tokens": 8000}


SITES = [
    (os, "replace"),
    (os, "rename"),
    (os, "fsync"),
    (os, "unlink"),
    (os, "mkdir"),
    (os, "ftruncate"),
    (Path, "unlink"),
    (Path, "mkdir"),
]


def killed_at(number: int, job: Callable[[], Any]) -> bool:
    """Run `job` in a forked process that kills itself with SIGKILL before its call number `number` of a SITE; False if it ended first."""
    pid = os.fork()
    if pid == 0:
        count = 0

        def killing(original: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal count
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args, **kwargs)

            return call

        for owner, name in SITES:
            setattr(owner, name, killing(getattr(owner, name)))
        try:
            job()
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status)


def test_a_kill_at_every_step_of_writing_leaves_what_the_same_command_completes(tmp_path: Path, tokenizer_dir: Path) -> None:
    """Exhaustive over every rename, fsync, unlink and mkdir of a run; each time the same command ends in the same bytes."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads and forks
    corpus = write_jsonl(tmp_path / "few.jsonl", some_documents(40, seed=5))
    settings = {"val_fraction": 0.3, "shard_tokens": 3000}
    run(corpus, tmp_path / "whole", tokenizer_dir, **settings)
    wanted = hashes(tmp_path / "whole")
    assert sum(name.endswith(".tokens") for name in wanted) >= 4
    number, num_complete = 0, 0
    while True:
        number += 1
        out = tmp_path / f"out{number}"
        if not killed_at(number, lambda out=out: run(corpus, out, tokenizer_dir, **settings)):
            break
        if (out / "manifest.json").exists():
            num_complete += 1
            assert {name: sha for name, sha in hashes(out).items() if name in wanted} == wanted, "what says that it is complete is"
        run(corpus, out, tokenizer_dir, **settings)
        assert hashes(out) == wanted, f"killed before call {number}"
    assert number > 30, "the run has that many steps"
    assert num_complete > 0


def test_killed_again_and_again(tmp_path: Path, corpus: Path, tokenizer_dir: Path, reference: dict[str, str]) -> None:
    """Each attempt dies 35 steps after its start, so several must build on each other."""
    attempts = 1
    while killed_at(35, lambda: run(corpus, tmp_path / "out", tokenizer_dir, **SMALL_SHARDS)):
        attempts += 1
        assert attempts < 50
    assert attempts > 2
    assert hashes(tmp_path / "out") == reference


def test_a_signal_keeps_the_finished_shards_and_the_same_command_goes_on(
    tmp_path: Path, corpus: Path, tokenizer_dir: Path, reference: dict[str, str]
) -> None:
    calls = iter([None] * 24 + [signal.SIGTERM] * 100)
    with pytest.raises(Interrupted, match=r"finished shards? (is|are) kept.*same command") as caught:
        run(corpus, tmp_path / "out", tokenizer_dir, stop=lambda: next(calls), **SMALL_SHARDS)
    assert caught.value.exit_code == 143
    kept = sorted(p.name for p in (tmp_path / "out").glob("*.tokens"))
    assert kept
    assert not list((tmp_path / "out").glob(".tmp-*"))
    with pytest.raises(InputError, match="not finished"):
        TokenDataset.open(tmp_path / "out")
    events = run(corpus, tmp_path / "out", tokenizer_dir, **SMALL_SHARDS)
    assert events[0].num_shards_kept == len(kept)
    assert hashes(tmp_path / "out") == reference
    again = run(corpus, tmp_path / "out", tokenizer_dir, **SMALL_SHARDS)
    assert [type(e) for e in again] == [Packed]
    assert again[-1].already_complete


def interrupted(corpus: Path, out: Path, tokenizer_dir: Path, **settings: Any) -> None:
    calls = iter([None] * 24 + [signal.SIGTERM] * 100)
    with pytest.raises(Interrupted):
        run(corpus, out, tokenizer_dir, stop=lambda: next(calls), **{**SMALL_SHARDS, **settings})


def test_a_shard_damaged_between_the_runs_is_made_again(
    tmp_path: Path, corpus: Path, tokenizer_dir: Path, reference: dict[str, str]
) -> None:
    interrupted(corpus, tmp_path / "out", tokenizer_dir)
    path = tmp_path / "out" / "train-00001.tokens"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    events = run(corpus, tmp_path / "out", tokenizer_dir, **SMALL_SHARDS)
    assert any(isinstance(e, PackWarned) and "train-00001" in e.message for e in events)
    assert hashes(tmp_path / "out") == reference


def test_other_input_of_the_same_size_is_noticed_on_going_on(tmp_path: Path, corpus: Path, tokenizer_dir: Path) -> None:
    copy = tmp_path / "docs.jsonl"
    copy.write_bytes(corpus.read_bytes())
    interrupted(copy, tmp_path / "out", tokenizer_dir)
    copy.write_bytes(corpus.read_bytes().replace(b"king", b"ring", 1))
    with pytest.raises(InputError, match=r"docs\.jsonl: the input up to here is not the one"):
        run(copy, tmp_path / "out", tokenizer_dir, **SMALL_SHARDS)
    run(copy, tmp_path / "out", tokenizer_dir, overwrite=True, **{**SMALL_SHARDS, "shard_tokens": 5000})
    assert isinstance([*verify(tmp_path / "out")][-1], Verified)


def test_stdin_goes_on_when_the_same_bytes_come_again(tmp_path: Path, corpus: Path, tokenizer_dir: Path, reference: dict[str, str]) -> None:
    data = corpus.read_bytes()
    settings = {**SMALL_SHARDS, "format": "jsonl"}
    calls = iter([None] * 24 + [signal.SIGINT] * 100)
    with pytest.raises(Interrupted):
        run("-", tmp_path / "out", tokenizer_dir, stdin=data, stop=lambda: next(calls), **settings)
    with pytest.raises(InputError, match="stdin: the input up to here"):
        run("-", tmp_path / "out", tokenizer_dir, stdin=data.split(b"\n", 1)[1], **settings)
    run("-", tmp_path / "out", tokenizer_dir, stdin=data, **settings)
    shards = {name: sha for name, sha in hashes(tmp_path / "out").items() if name.endswith(".tokens")}
    assert shards == {name: sha for name, sha in reference.items() if name.endswith(".tokens")}


# what is in the folder already


def test_shards_of_another_tokenizer_are_refused_unless_overwritten(tmp_path: Path, corpus: Path, tokenizer_dir: Path) -> None:
    run(corpus, tmp_path / "out", tokenizer_dir)
    before = hashes(tmp_path / "out")
    other = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), vocab_size=703)
    (tmp_path / "tok").mkdir()
    other.save(tmp_path / "tok")
    with pytest.raises(InputError, match=r"another tokenizer.*--overwrite") as caught:
        run(corpus, tmp_path / "out", tmp_path / "tok")
    assert other.fingerprint in str(caught.value)
    assert Tokenizer.load(tokenizer_dir).fingerprint in str(caught.value)
    assert hashes(tmp_path / "out") == before
    run(corpus, tmp_path / "out", tmp_path / "tok", overwrite=True)
    assert TokenDataset.open(tmp_path / "out").tokenizer_fingerprint == other.fingerprint


def test_other_settings_and_other_input_are_refused_by_name(tmp_path: Path, corpus: Path, tokenizer_dir: Path) -> None:
    run(corpus, tmp_path / "out", tokenizer_dir)
    with pytest.raises(UsageError, match="shard_tokens was 33554432, is 100"):
        run(corpus, tmp_path / "out", tokenizer_dir, shard_tokens=100)
    other = write_jsonl(tmp_path / "docs.jsonl", ["other"])
    with pytest.raises(InputError, match="other input files"):
        run(other, tmp_path / "out", tokenizer_dir)
    run(other, tmp_path / "out", tokenizer_dir, overwrite=True)
    assert TokenDataset.open(tmp_path / "out").num_documents == 1


def test_overwriting_touches_only_what_packing_made(tmp_path: Path, corpus: Path, tokenizer_dir: Path) -> None:
    run(corpus, tmp_path / "out", tokenizer_dir)
    treasure = tmp_path / "treasure"
    treasure.mkdir()
    (treasure / "tokenizer.json").write_text("precious")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    for name in os.listdir(tmp_path / "out" / "tokenizer"):
        (tmp_path / "out" / "tokenizer" / name).unlink()
    (tmp_path / "out" / "tokenizer").rmdir()
    (tmp_path / "out" / "tokenizer").symlink_to(treasure)
    run(corpus, tmp_path / "out", tokenizer_dir, overwrite=True, shard_tokens=1000)
    assert (treasure / "tokenizer.json").read_text() == "precious"
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_a_folder_with_other_things_is_refused(tmp_path: Path, corpus: Path, tokenizer_dir: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(UsageError, match=r"letter\.txt"):
        run(corpus, tmp_path / "home", tokenizer_dir, overwrite=True)
    assert os.listdir(tmp_path / "home") == ["letter.txt"]
    (tmp_path / "home" / "letter.txt").unlink()
    run(corpus, tmp_path / "home", tokenizer_dir)


def test_two_runs_on_one_folder(tmp_path: Path, corpus: Path, tokenizer_dir: Path) -> None:
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"), pytest.raises(LockedError, match=f"pid {os.getpid()}"):
        run(corpus, tmp_path / "out", tokenizer_dir)


def test_nothing_is_made_when_an_input_or_the_tokenizer_is_missing(tmp_path: Path, corpus: Path, tokenizer_dir: Path) -> None:
    with pytest.raises(NotFoundError):
        run(tmp_path / "none.txt", tmp_path / "out", tokenizer_dir)
    with pytest.raises(NotFoundError):
        run(corpus, tmp_path / "out", tmp_path / "none")
    with pytest.raises(UsageError, match="stdin is closed"):
        run("-", tmp_path / "out", tokenizer_dir)
    assert not (tmp_path / "out").exists()


def test_a_world_writable_folder_is_warned_of_on_going_on(tmp_path: Path, corpus: Path, tokenizer_dir: Path) -> None:
    interrupted(corpus, tmp_path / "out", tokenizer_dir)
    (tmp_path / "out").chmod(0o777)
    events = run(corpus, tmp_path / "out", tokenizer_dir, **SMALL_SHARDS)
    assert any(isinstance(e, PackWarned) and "anybody" in e.message for e in events)


# workers


def test_a_dead_worker_is_noticed(tmp_path: Path, corpus: Path, tokenizer_dir: Path, reference: dict[str, str]) -> None:
    pools = []
    original = worker.WorkerPool.__init__

    def noting(self: Any, *args: Any) -> None:
        original(self, *args)
        pools.append(self)

    settings: dict[str, Any] = {"workers": 2, "encoder": "tokenizers", **SMALL_SHARDS}  # gigatoken takes threads
    config = PackConfig(inputs=(str(corpus),), tokenizer=str(tokenizer_dir), out_dir=tmp_path / "out", **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker.WorkerPool, "__init__", noting)
        events = pack(config)
        while not pools:
            next(events)
        os.kill(pools[0].pids[0], signal.SIGKILL)
        with pytest.raises(LlmctlError, match=r"worker died \(signal 9, out of memory\?\)") as caught:
            list(events)
    assert caught.value.exit_code == 1
    assert not list((tmp_path / "out").glob(".tmp-*"))
    assert all(gone(pid) for pid in pools[0].pids)
    run(corpus, tmp_path / "out", tokenizer_dir, **SMALL_SHARDS)
    assert hashes(tmp_path / "out") == reference


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_workers_end_with_their_packer(tmp_path: Path, corpus: Path, tokenizer_dir: Path) -> None:
    """The packer is killed with SIGKILL, so nothing of its own can end them: the end of the pipe does."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        pool = worker.WorkerPool(RULES, Tokenizer.load(tokenizer_dir), 2)
        os.write(write_end, json.dumps(pool.pids).encode())
        os.kill(os.getpid(), signal.SIGKILL)
    os.close(write_end)
    os.waitpid(pid, 0)
    pids = json.loads(os.read(read_end, 1000))
    os.close(read_end)
    deadline = time.monotonic() + 240
    while not all(map(gone_or_zombie, pids)):
        assert time.monotonic() < deadline, "a worker outlived its packer"
        time.sleep(0.05)


def gone_or_zombie(pid: int) -> bool:
    """In a container nobody may collect orphans: a zombie has ended too."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return gone(pid)


RULES = encode.EncodeRules(
    field="text", split=documents.SplitRule(kind="none"), allow_special=False, add_bos=None, skip_errors=False, max_line_bytes=1 << 20
)


def test_a_worker_says_why_it_failed(tokenizer: Tokenizer) -> None:
    too_long_a_key = documents.SplitRule(kind="hash", fraction=0.5, seed=10**80)
    pool = worker.WorkerPool(dataclasses.replace(RULES, split=too_long_a_key), tokenizer, 1)
    try:
        batch = batches.PieceBatch(0, (documents.Piece(0, 1, 0, b"x", form="lines"),), True, True, 0)
        with pytest.raises(LlmctlError, match=r"a worker failed: ValueError.*key"):
            list(pool.run(iter([batch])))
    finally:
        pool.close()


# verify


def damage(folder: Path) -> list[str]:
    return [e.message for e in verify(folder) if isinstance(e, DamageFound)]


def test_verify_names_every_damaged_file(tmp_path: Path, corpus: Path, tokenizer_dir: Path) -> None:
    out = tmp_path / "out"
    run(corpus, out, tokenizer_dir, **SMALL_SHARDS)
    assert damage(out) == []
    first, second, third = sorted(out.glob("train-*.tokens"))[:3]
    data = bytearray(first.read_bytes())
    data[len(data) // 2] ^= 0xFF
    first.write_bytes(data)
    os.truncate(second, second.stat().st_size // 2)
    third.unlink()
    found = damage(out)
    assert len(found) == 3
    for message, path, what in zip(found, (first, second, third), ("sha256 mismatch", "cut or changed", "is missing"), strict=True):
        assert path.name in message
        assert what in message
    with pytest.raises(InputError, match=second.name):
        TokenDataset.open(out)


def test_verify_looks_inside_shards_whose_hash_was_made_to_fit(tmp_path: Path, corpus: Path, tokenizer_dir: Path) -> None:
    out = tmp_path / "out"
    run(corpus, out, tokenizer_dir, val_fraction=0)
    path = out / "train-00000.tokens"
    manifest = json.loads((out / "manifest.json").read_text())

    def forged(data: bytes) -> list[str]:
        path.write_bytes(data)
        manifest["files"][path.name]["sha256"] = hashlib.sha256(data).hexdigest()
        (out / "manifest.json").write_text(json.dumps(manifest))
        return damage(out)

    good = path.read_bytes()
    assert "outside the vocabulary" in forged(good[:256] + b"\xff\xff" + good[258:])[0]
    assert "not in order" in forged(good[:-8] + bytes(8))[0]
    path.write_bytes(good)
    shard = TokenShard.open(path)
    ends = shard.document_ends.copy()
    lengths = [b - a for a, b in zip([0, *ends.tolist()], ends.tolist(), strict=False)]
    long_one = next(i for i, length in enumerate(lengths) if length > 1)
    ends[long_one] -= 1
    assert "end-of-text" in forged(good[: shard.header.ends_offset] + ends.tobytes())[0]
    assert forged(good) == []
    (out / "train-00009.tokens").write_bytes(b"")
    assert "does not list" in damage(out)[0]


def test_chinese_goes_the_same_way(tmp_path: Path, tokenizer: Tokenizer, tokenizer_dir: Path) -> None:
    corpora = Path(os.environ.get("LLMCTL_TEST_DATA", "/nonexistent")) / "corpora"
    if not corpora.is_dir():
        pytest.skip("needs $LLMCTL_TEST_DATA")
    source = corpora / "zh_tang_poems_12k.txt.gz"
    poems = [p.strip("\n") for p in gzip.decompress(source.read_bytes()).decode().split("\n\n")]
    poems = [p for p in poems if p.strip()]
    run(source, tmp_path / "out", tokenizer_dir, format="paragraphs", val_fraction=0.05, workers=2, shard_tokens=200_000)
    wanted = naive(poems, tokenizer, by_hash(0.05))
    assert stream_of(tmp_path / "out", "train") == wanted["train"]
    assert stream_of(tmp_path / "out", "val") == wanted["val"]


def test_the_folder_names_are_what_the_folder_code_says() -> None:
    assert packfolder.ERRORS_NAME == "errors.jsonl"
    names: Iterator[str] = iter(["train-00000.tokens", "val-123456.tokens"])
    assert all(packfolder._SHARD_NAME.fullmatch(name) for name in names)
    assert not packfolder._SHARD_NAME.fullmatch("test-00000.tokens")
