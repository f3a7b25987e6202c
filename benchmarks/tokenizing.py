"""Packing and tokenizer training beside tokenizers, tiktoken and gigatoken alone, in turns, on one corpus.

    python benchmarks/tokenizing.py CORPUS [--tokenizer DIR] [--rounds 5] [--peer-bytes N] [--train-bytes N] [--vocab-size 32000]

CORPUS is a text file whose documents lie between two blank lines (one document if there are none), or JSON lines with a
field `text`. llmctl is timed as a user meets it: the whole process `llmctl tokenize pack` from its start to checked shards
on the disk, in either form of the input. The peers get documents in memory, and only their encoding is timed. Each run is
a process of its own; memory is the largest sum over the process and its children. Slow peers may be given the first
--peer-bytes only: what counts is bytes a second. (Not named tokenize.py: beside other scripts that would hide Python's own.)
"""

import argparse
import hashlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SLOW = ("tokenizers", "tiktoken")


def documents_of(path: Path, limit: int | None) -> list[str]:
    """The documents of a corpus, up to about `limit` bytes of them."""
    data = path.read_text(encoding="utf-8")
    found = [json.loads(line)["text"] for line in data.splitlines()] if path.suffix == ".jsonl" else data.split("\n\n\n")
    if limit is not None:
        taken = 0
        for number, document in enumerate(found):
            taken += len(document.encode())
            if taken >= limit:
                return [*found[:number], document[: len(document) - max(0, taken - limit)]]
    return found


def encode_by_tokenizers(documents: list[str], folder: Path) -> Callable[[], int]:
    """`encode_batch_fast`, with all its threads."""
    import tokenizers

    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return lambda: sum(len(encoding) for encoding in backend.encode_batch_fast(documents, add_special_tokens=False))


def encode_by_tiktoken(documents: list[str], folder: Path) -> Callable[[], int]:
    """`encode_ordinary_batch`, with a thread for each core."""
    import tiktoken

    from llmctl.core.tokenizer.byte_level import token_to_bytes

    content = json.loads((folder / "tokenizer.json").read_text())
    special = {token["content"]: token["id"] for token in content["added_tokens"]}
    ranks = {token_to_bytes(token): number for token, number in content["model"]["vocab"].items() if token not in special}
    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
    encoding = tiktoken.Encoding("corpus", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    return lambda: sum(map(len, encoding.encode_ordinary_batch(documents, num_threads=os.cpu_count() or 1)))


def encode_by_gigatoken(documents: list[str], folder: Path) -> Callable[[], int]:
    """`encode_batch`, with all its threads."""
    import gigatoken

    encoder = gigatoken.Tokenizer(folder / "tokenizer.json")
    return lambda: len(encoder.encode_batch(documents).layout.content)


def train(documents: list[str], vocab_size: int, *, fast: bool) -> dict[str, Any]:
    """llmctl's training on all of `documents`, in the default pattern, by the native library or by `tokenizers`."""
    from llmctl.core import sharedlib
    from llmctl.core.tokenizer import TokenizerTrained, train_tokenizer

    if not fast:
        sharedlib.PATH = Path("without")
    start = time.perf_counter()
    for event in train_tokenizer(documents, vocab_size=vocab_size, sample_bytes=None if fast else 1 << 40):
        if isinstance(event, TokenizerTrained):
            result = event
    elapsed_s = time.perf_counter() - start
    digest = hashlib.sha256(result.tokenizer.to_json().encode()).hexdigest()
    return {"elapsed_s": elapsed_s, "by": result.trainer, "result": digest}


def peer(name: str, corpus: Path, folder: Path, limit: int | None, vocab_size: int) -> dict[str, Any]:
    """One measurement, in a process of its own."""
    documents = documents_of(corpus, limit)
    num_bytes = sum(len(document.encode()) for document in documents)
    if name.startswith("train"):
        return {"num_bytes": num_bytes, **train(documents, vocab_size, fast=name == "train")}
    makers = {"tokenizers": encode_by_tokenizers, "tiktoken": encode_by_tiktoken, "gigatoken": encode_by_gigatoken}
    encode = makers[name](documents, folder)
    start = time.perf_counter()
    num_tokens = encode()
    return {"num_bytes": num_bytes, "elapsed_s": time.perf_counter() - start, "num_tokens": num_tokens}


def resident_bytes(pid: int) -> int:
    """Of a process and its children; Linux only."""
    total, waiting = 0, [pid]
    while waiting:
        number = waiting.pop()
        try:
            total += int(Path(f"/proc/{number}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            for task in Path(f"/proc/{number}/task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
        except (OSError, IndexError):
            continue
    return total


def run(command: list[str]) -> tuple[float, int, str]:
    """Seconds, peak bytes and stdout of a command."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    peak = 0

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            peak = max(peak, resident_bytes(process.pid))
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    text = process.communicate()[0]
    elapsed_s = time.perf_counter() - start
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}")
    return elapsed_s, peak, text


def pack(corpus: Path, folder: Path, encoder: str) -> dict[str, Any]:
    """`llmctl tokenize pack`, the whole process."""
    with tempfile.TemporaryDirectory() as temporary:
        out_dir = f"{temporary}/shards"
        command = ["tokenize", "pack", str(corpus), "--tokenizer", str(folder), "-o", out_dir, "--encoder", encoder, "--json"]
        elapsed_s, peak, text = run([sys.executable, "-m", "llmctl", *command])
        facts = json.loads(text)
        splits = [facts[name] for name in ("train", "val") if facts[name]]
        num_tokens = sum(split["num_tokens"] - split["num_documents"] for split in splits)  # without those that end documents
        num_bytes = sum(split["num_bytes"] for split in splits)
        return {"num_bytes": num_bytes, "elapsed_s": elapsed_s, "peak": peak, "num_tokens": num_tokens, "by": facts["encoder"]}


def measurements(arguments: argparse.Namespace, inputs: dict[str, Path]) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Name and how to measure, in the order of a round."""
    folder, jsonl = Path(arguments.tokenizer), inputs["jsonl"]

    def of_peer(name: str, limit: int | None) -> dict[str, Any]:
        options = ["--tokenizer", str(folder), "--vocab-size", str(arguments.vocab_size), "--peer", name]
        options += ["--peer-bytes", str(limit)] if limit is not None else []
        _, peak, text = run([sys.executable, __file__, str(jsonl), *options])
        return {"peak": peak, **json.loads(text.splitlines()[-1])}

    for kind, path in inputs.items():
        yield f"llmctl tokenize pack ({kind})", lambda path=path: pack(path, folder, "auto")
    for name in ("tokenizers", "tiktoken", "gigatoken"):
        if importlib.util.find_spec(name) is None:
            print(f"{name} is not installed: left out", flush=True)
            continue
        yield name, lambda name=name: of_peer(name, arguments.peer_bytes if name in SLOW else None)
    if arguments.train_bytes:
        for name in ("train", "train by tokenizers"):
            yield name, lambda name=name: of_peer(name, arguments.train_bytes)


def main() -> None:
    """Print a line a measurement, then the medians and their ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--tokenizer", required=True, help="a folder with tokenizer.json, or vocab.json and merges.txt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer-bytes", type=int, default=None)
    parser.add_argument("--train-bytes", type=int, default=50_000_000)
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        print(json.dumps(peer(arguments.peer, arguments.corpus, Path(arguments.tokenizer), arguments.peer_bytes, arguments.vocab_size)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        from llmctl.core.tokenizer import Tokenizer

        folder = Path(temporary, "tokenizer")
        folder.mkdir()
        Tokenizer.load(Path(arguments.tokenizer)).save(folder)
        arguments.tokenizer = folder
        inputs = {"jsonl": Path(temporary, "corpus.jsonl"), "text": Path(temporary, "corpus.txt")}
        documents = documents_of(arguments.corpus, None)
        inputs["jsonl"].write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents), encoding="utf-8")
        inputs["text"].write_text("\n\n\n".join(documents), encoding="utf-8")
        del documents
        speeds: dict[str, list[float]] = {}
        peaks: dict[str, int] = {}
        results: dict[str, set[Any]] = {}
        for number in range(arguments.rounds):
            for name, measure in measurements(arguments, inputs):
                found = measure()
                speed = found["num_bytes"] / 1e6 / found["elapsed_s"]
                speeds.setdefault(name, []).append(speed)
                peaks[name] = max(peaks.get(name, 0), found["peak"])
                results.setdefault(name, set()).add(found.get("num_tokens", found.get("result")))
                by = f", by {found['by']}" if "by" in found else ""
                print(f"round {number + 1}: {name}: {speed:.1f} MB/s, {found['peak'] / 1e6:.0f} MB{by}", flush=True)
    print()
    for name, values in speeds.items():
        print(f"{name}: {statistics.median(values):.1f} MB/s ({min(values):.1f} to {max(values):.1f}), {peaks[name] / 1e6:.0f} MB")
    ours, *peers = [name for name in speeds if name != "llmctl tokenize pack (text)" and not name.startswith("train")]
    pairs = [(ours, other) for other in peers] + ([("train", "train by tokenizers")] if "train" in speeds else [])
    for a, b in pairs:
        ratios = [x / y for x, y in zip(speeds[a], speeds[b], strict=True)]
        medians = statistics.median(speeds[a]) / statistics.median(speeds[b])
        print(f"{a} / {b}: {medians:.2f} (rounds {min(ratios):.2f} to {max(ratios):.2f})")
    if arguments.peer_bytes is None:
        same = {name: found for name, found in results.items() if not name.startswith("train") and "(text)" not in name}
        print(f"number of ids: {'the same' if len(set().union(*same.values())) == 1 else same}")
    if "train" in results:
        print(f"trained tokenizers: {'the same' if results['train'] == results['train by tokenizers'] else 'different'}")


if __name__ == "__main__":
    main()
