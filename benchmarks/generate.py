"""Generation side by side with llama.cpp and transformers, on one model, in alternated rounds.

    python benchmarks/generate.py MODEL_DIRECTORY [--llama-cpp VENV/bin/python] [--transformers] [--threads 2] [--rounds 6] [--json FILE]

Every engine is a process of its own that holds the model; they take turns, so that all meet the same moods of the machine, and
what counts is the median over the rounds and the ratio to the peer in the same round. llmctl runs without its engine loop, and
llama.cpp through its C interface (llama-cpp-python, built for this machine), with the same greedy loop around both:

    python -m venv VENV && CMAKE_ARGS=-DGGML_NATIVE=ON VENV/bin/pip install --no-binary llama-cpp-python llama-cpp-python

llama.cpp's files are made from the model here: BF16 by `llmctl export`, the rest by llama.cpp's own quantiser, 4-bit ones with
embeddings in Q8_0, which is what --quant int4 has. The bandwidth row says how many bytes two threads read a second; beside it
stands how many bytes of weights a decoded token needs, and what share of the limit that follows was reached.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("generate_workers.py")
PAIRS = {"bfloat16": ("BF16",), "int8": ("Q8_0",), "int4": ("Q4_0", "Q4_1")}
QUANTISE = """
import sys, llama_cpp as l
source, target, kind = sys.argv[1:]
options = l.llama_model_quantize_default_params()
options.ftype = {"Q8_0": l.LLAMA_FTYPE_MOSTLY_Q8_0, "Q4_0": l.LLAMA_FTYPE_MOSTLY_Q4_0, "Q4_1": l.LLAMA_FTYPE_MOSTLY_Q4_1}[kind]
options.token_embedding_type = options.output_tensor_type = l.GGML_TYPE_Q8_0
sys.exit(l.llama_model_quantize(source.encode(), target.encode(), options))
"""


class Worker:
    """One engine's process."""

    def __init__(self, python: str, kind: str, model: Path | str, threads: int, number_format: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            [python, str(WORKER), kind, str(model), str(threads), number_format],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.peak_mib = 0.0
        self.loaded_s = 0.0 if kind == "bandwidth" else self._read()["loaded_s"]

    def ask(self, **command: Any) -> float:
        """A number a second."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        found = self._read()
        self.peak_mib = found.get("peak_mib", 0.0)
        return float(found["per_second"])

    def _read(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker ended: {self._process.args!r}")
        found: dict[str, float] = json.loads(line)
        return found

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def llama_files(python: str, model: Path, folder: Path, kinds: Sequence[str]) -> dict[str, Path]:
    """GGUF files of the model; made where they are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {kind: folder / f"{model.name}-{kind}.gguf" for kind in {"BF16", *kinds}}
    if not files["BF16"].exists():
        command = [sys.executable, "-m", "llmctl", "export", str(model), "-o", str(files["BF16"]), "--format", "gguf", "--dtype", "bf16"]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    for kind, path in files.items():
        if not path.exists():
            command = [python, "-c", QUANTISE, str(files["BF16"]), str(path), kind]
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return files


def first_token_s(command: Sequence[str], text: str) -> float:
    """Seconds from the start of a process to the first byte of its answer."""
    start = time.perf_counter()
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(text.encode())
        process.stdin.close()
        process.stdout.read(1)
        elapsed_s = time.perf_counter() - start
        process.stdout.read()
    return elapsed_s


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Median and range."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def weight_bytes(model: Path, number_format: str) -> float:
    """Bytes of weights that one decoded token reads: all matrices and the head once."""
    from llmctl.core.checkpoint import load_config
    from llmctl.core.model.facts import num_parameters

    config = load_config(model)[0]
    body, head = num_parameters(config).non_embedding, config.vocab_size * config.hidden_size
    body_bytes = {"bfloat16": 2.0, "float32": 4.0, "int8": 8.5 / 8, "int4": 5.0 / 8}[number_format]
    return body * body_bytes + head * (8.5 / 8 if number_format.startswith("int") else body_bytes)


def main() -> None:
    """Print tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--llama-cpp", metavar="PYTHON", help="a Python that has llama_cpp")
    parser.add_argument("--transformers", action="store_true", help="transformers in bf16 and float32 beside")
    parser.add_argument("--formats", nargs="+", choices=tuple(PAIRS), default=list(PAIRS))
    parser.add_argument("--folder", type=Path, default=Path("benchmark-models"), help="where GGUF files are made and kept")
    for name, default in (("threads", 2), ("rounds", 6), ("prompt", 512), ("context", 128), ("tokens", 128), ("prompts", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path, help="all numbers, as JSON")
    arguments = parser.parse_args()

    contestants = [("llmctl", name) for name in arguments.formats]
    workers = {("llmctl", name): Worker(sys.executable, "llmctl", arguments.model, arguments.threads, name) for name in arguments.formats}
    files: dict[str, Path] = {}
    peers: dict[tuple[str, str], tuple[str, str]] = {}  # who -> the contestant that it is compared with
    if arguments.llama_cpp:
        kinds = [kind for name in arguments.formats for kind in PAIRS[name]]
        files = llama_files(arguments.llama_cpp, arguments.model, arguments.folder, kinds)
        for name in arguments.formats:
            for kind in PAIRS[name]:
                peers["llama.cpp", kind] = ("llmctl", name)
                workers["llama.cpp", kind] = Worker(arguments.llama_cpp, "llama.cpp", files[kind], arguments.threads, kind)
    if arguments.transformers:
        for number_format in ("bfloat16", "float32"):
            peers["transformers", number_format] = contestants[0]
            workers["transformers", number_format] = Worker(
                sys.executable, "transformers", arguments.model, arguments.threads, number_format
            )
    bandwidth = Worker(sys.executable, "bandwidth", "-", arguments.threads, "-")

    few = max(1, arguments.tokens // 4)
    lengths = [16 + (37 * i) % 241 for i in range(arguments.prompts)]
    tasks: dict[str, dict[str, Any]] = {
        f"decode {arguments.tokens} after {arguments.context}": {
            "do": "decode",
            "prompt": arguments.context,
            "tokens": arguments.tokens,
        },
        f"prefill {arguments.prompt}": {"do": "prefill", "prompt": arguments.prompt},
        f"8 texts, {few} after {arguments.context}": {"do": "batch", "prompt": arguments.context, "tokens": few},
        f"{arguments.prompts} prompts of 16 to 256, {few} new, all tokens": {"do": "mixed", "lengths": lengths, "tokens": few},
    }
    found: dict[str, dict[tuple[str, str], list[float]]] = {task: {who: [] for who in workers} for task in tasks}
    read: list[float] = []
    for worker in workers.values():  # the first call pays for what is made once
        worker.ask(do="decode", prompt=arguments.context, tokens=4)
    for _ in range(arguments.rounds):
        read.append(bandwidth.ask(do="read"))
        for task, command in tasks.items():
            for who, worker in workers.items():
                found[task][who].append(worker.ask(**command))

    for task, rows in found.items():
        print(f"\n| {task} | tokens/s, median (range) | llmctl's ratio to it, median (range) |\n|---|---|---|")
        for who, values in rows.items():
            ratio = ""
            if who in peers:
                ratio = spread([ours / theirs for ours, theirs in zip(rows[peers[who]], values, strict=True)], 2)
            print(f"| {' '.join(who)} | {spread(values)} | {ratio} |")
    print(f"\nbandwidth: {spread([value / 1e9 for value in read])} GB/s with {arguments.threads} threads")
    decoded = found[next(iter(tasks))]
    for name in arguments.formats:
        needed = weight_bytes(arguments.model, name)
        shares = [100 * rate * needed / limit for rate, limit in zip(decoded["llmctl", name], read, strict=True)]
        print(f"  {name}: {needed / 1e6:.0f} MB a token, {spread(shares, 0)} % of the limit")
    print("peak memory, MiB:", ", ".join(f"{' '.join(who)} {worker.peak_mib:.0f}" for who, worker in workers.items()))
    for worker in (*workers.values(), bandwidth):
        worker.close()
    cold = cold_starts(arguments, files)
    if arguments.json:
        numbers = {task: {" ".join(who): values for who, values in rows.items()} for task, rows in found.items()}
        arguments.json.write_text(json.dumps({"per_second": numbers, "read_bytes_per_second": read, "first_token_s": cold}, indent=1))


def cold_starts(arguments: argparse.Namespace, files: dict[str, Path]) -> dict[str, list[float]]:
    """First token of a fresh process, for a short prompt and one of about 128 tokens; warm disk and cache of packed weights.

    Of llama.cpp it is what loading and the prompt take in a fresh process: the least that a program around it would need.
    """
    prompts = {"short": "The capital of France is", "128 tokens": "The capital of France is Paris, and " * 16}
    found: dict[str, list[float]] = {}
    for name in arguments.formats:
        how = ["--dtype", "bfloat16"] if name == "bfloat16" else ["--quant", name]
        command = [sys.executable, "-m", "llmctl", "generate", "-m", str(arguments.model), "--device", "cpu", "--raw", "-t", "0", "-n", "4"]
        command += ["--threads", str(arguments.threads), *how]
        first_token_s(command, "warm")  # fills the cache
        for label, text in prompts.items():
            found[f"{name}, {label}"] = [first_token_s(command, text) for _ in range(arguments.rounds)]
    found = {f"llmctl {label}": values for label, values in found.items()}
    for kind in (kind for name in arguments.formats for kind in PAIRS[name] if kind in files):
        for label, num_tokens in (("short", 6), ("128 tokens", 128)):
            values = []
            for _ in range(arguments.rounds):
                worker = Worker(arguments.llama_cpp, "llama.cpp", files[kind], arguments.threads, kind)
                values.append(worker.loaded_s + num_tokens / worker.ask(do="prefill", prompt=num_tokens))
                worker.close()
            found[f"llama.cpp {kind}, {label}, loading and prompt alone"] = values
    print("\n| process start to first token, s | median (range) |\n|---|---|")
    for label, values in found.items():
        print(f"| {label} | {spread(values, 2)} |")
    return found


if __name__ == "__main__":
    main()
