"""Generation side by side with llama.cpp, transformers and other engines, on one model, in alternated rounds.

    python benchmarks/generate.py MODEL_DIRECTORY --records FILE.jsonl --markdown FILE.md [--llama-cpp VENV/bin/python]
        [--llama-simple BINARY] [--transformers bfloat16 float32] [--peer ENGINE FORMAT PYTHON MODEL]... [--threads 2] [--rounds 6]

Every engine is a process of its own that holds the model; they take turns with the same prompts' ids, the same number of tokens and
threads, greedy, over ends of sequences. What counts is the median over the rounds, and the ratio to the peer in the same round. A
measurement is printed, and kept in --records, as it is made; the Markdown is written anew after each round. Stopped and started
again, it goes on after its last whole round. What takes longer than --slow-s is measured in each 2nd, 4th or 8th round,
and what took ten times as long to decode one text is spared several (transformers in bf16, where the processor has none).

llmctl runs without its engine loop, llama.cpp through its C interface with the same greedy loop around it, transformers' forward
with its cache likewise (batches padded); the rest through their own pipelines. Memory is the peak of the process after all of its
tasks, with room for 8 texts of 1024 tokens in llmctl and llama.cpp. The bandwidth row says how many bytes the threads read a second;
beside it stands how many bytes of weights a decoded token needs, and what share of the limit that follows was reached. A first token
is timed from the start of a process to the first byte of its answer, warm disk, llmctl's packed weights cached.

llama.cpp, and its own examples/simple as a program to start (it takes four threads if it is not told). Its files are made from the
model here, into --folder: BF16 by `llmctl export`, the rest by llama.cpp's own quantiser; Q4_0 and Q4_1 with embeddings in Q8_0, which
is what --quant int4 has, Q4_K_M as llama.cpp mixes it:

    python -m venv VENV && CMAKE_ARGS=-DGGML_NATIVE=ON VENV/bin/pip install --no-binary llama-cpp-python llama-cpp-python
    sed -i 's/ctx_params.no_perf = false;/& ctx_params.n_threads = ctx_params.n_threads_batch = 2;/' examples/simple/simple.cpp
    g++ -O2 -std=c++17 -I SITE/include examples/simple/simple.cpp -o llama-simple \\
        -L SITE/llama_cpp/lib -Wl,-rpath,SITE/llama_cpp/lib -lllama -lggml -lggml-base

with SITE the VENV's site-packages, and the example from the sources (`pip download --no-deps --no-binary :all: llama-cpp-python`).

The other peers, each in a VENV of its own; MODEL_DIRECTORY in bf16 (`llmctl export MODEL --dtype bf16`):

    pip install openvino-genai; elsewhere, pip install "optimum-intel[openvino]", then for int8 and for int4 --group-size 32 --ratio 1.0
        optimum-cli export openvino --model MODEL_DIRECTORY --task text-generation-with-past --weight-format int8 OV_INT8
        --peer openvino int8 VENV/bin/python OV_INT8 --peer openvino-sdpa int8 VENV/bin/python OV_INT8
    pip install onnxruntime-genai onnx-ir torch transformers, then
        python -m onnxruntime_genai.models.builder -m none -i MODEL_DIRECTORY -o ORT_INT4 -p int4 -e cpu -c CACHE \\
            --extra_options int4_accuracy_level=4 [algo_config=rtn matmul_mixed_precision=last_matmul:int8 shared_embeddings=false]
        which by itself has head and embeddings in 4 bits, and with what is in brackets the head in int8, as --quant int4 has
        --peer onnxruntime-genai int4 VENV/bin/python ORT_INT4
    pip install ctranslate2 torch transformers, then
        ct2-transformers-converter --model MODEL_DIRECTORY --output_dir CT2_INT8 --quantization int8
        --peer ctranslate2 int8 VENV/bin/python CT2_INT8
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rounds import Rounds, machine, ratios, spread, table

WORKER = Path(__file__).with_name("generate_workers.py")
LLAMA_FILES = {"bfloat16": ("BF16",), "int8": ("Q8_0",), "int4": ("Q4_0", "Q4_1", "Q4_K_M")}
QUANTISE = """
import sys, llama_cpp as l
source, target, kind = sys.argv[1:]
options = l.llama_model_quantize_default_params()
options.ftype = getattr(l, f"LLAMA_FTYPE_MOSTLY_{kind}")
if kind != "Q4_K_M":
    options.token_embedding_type = options.output_tensor_type = l.GGML_TYPE_Q8_0
sys.exit(l.llama_model_quantize(source.encode(), target.encode(), options))
"""
SEVERAL = ("llmctl", "llama.cpp", "transformers")  # what has several texts at once here
TEXT = "The capital of France is"
SENTENCES = {"short prompt": TEXT, "about 128 tokens": "The capital of France is Paris, and " * 16}
PAUSE_S = 0.25  # an engine's threads may spin as long after their work (OpenMP's block time is 0.2 s)


@dataclass(frozen=True)
class Task:
    """Prompts of these many tokens, each with `num_new` more; what is counted of what a worker answers."""

    lengths: Sequence[int]
    num_new: int
    per_second: Callable[[dict[str, float]], float]
    engines: Sequence[str] | None = None


@dataclass(frozen=True)
class Contender:
    """An engine with a model, and llmctl's format that it is compared with."""

    name: str
    engine: str
    python: str
    model: Path | str
    number_format: str
    beside: str | None = None


class Worker:
    """A contender's process."""

    def __init__(self, who: Contender, threads: int) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        environment.pop("OPENBLAS_CORETYPE", None)  # a kernel that somebody chose for an older BLAS reads memory slowly
        self._process = subprocess.Popen(
            [who.python, str(WORKER), who.engine, str(who.model), str(threads), who.number_format],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.version = "" if who.engine == "bandwidth" else self._read()["version"]

    def ask(self, **command: Any) -> dict[str, Any]:
        """Its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker ended: {self._process.args!r}")
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        """End it."""
        self._process.communicate()


def llama_files(python: str, model: Path, folder: Path, formats: Sequence[str]) -> dict[str, Path]:
    """GGUF files of the model; made where they are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {kind: folder / f"{model.name}-{kind}.gguf" for kind in ("BF16", *(kind for name in formats for kind in LLAMA_FILES[name]))}
    if not files["BF16"].exists():
        command = [sys.executable, "-m", "llmctl", "export", str(model), "-o", str(files["BF16"]), "--format", "gguf", "--dtype", "bf16"]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    for kind, path in files.items():
        if not path.exists():
            command = [python, "-c", QUANTISE, str(files["BF16"]), str(path), kind]
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return files


def contenders(arguments: argparse.Namespace, files: dict[str, Path]) -> list[Contender]:
    """Each of llmctl's formats, followed by what it is compared with."""
    found = []
    for name in arguments.formats:
        found.append(Contender(f"llmctl {name}", "llmctl", sys.executable, arguments.model, name))
        found += [
            Contender(f"llama.cpp {kind}", "llama.cpp", arguments.llama_cpp, files[kind], kind, name)
            for kind in LLAMA_FILES[name]
            if kind in files
        ]
        if name == "bfloat16":
            found += [
                Contender(f"transformers {form}", "transformers", sys.executable, arguments.model, form, name)
                for form in arguments.transformers
            ]
        peers = [peer for peer in arguments.peer if peer[1] == name]
        for engine, _, python, model in peers:
            twice = [peer[0] for peer in peers].count(engine) > 1
            found.append(Contender(f"{engine} {name}" + f", {Path(model).name}" * twice, engine, python, model, name, name))
    return found


def first_token(command: Sequence[str], text: str) -> tuple[float, float]:
    """Seconds from the start of a process to the first byte of its answer; its peak of memory in MiB."""
    # Where byte code may not be written, each start compiles the package anew, which no user's does.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    start = time.perf_counter()
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin, process.stdout:
        with contextlib.suppress(BrokenPipeError):  # a peer takes its prompt as an argument
            process.stdin.write(text.encode())
            process.stdin.close()
        first = process.stdout.read(1)
        elapsed_s = time.perf_counter() - start
        process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if not first or process.returncode:
        raise SystemExit(f"a first token did not come: {command!r}")
    return elapsed_s, usage.ru_maxrss / 1024


def cold_commands(who: Contender, arguments: argparse.Namespace, text: str) -> tuple[str, list[str]]:
    """What is started for a first token, with its name."""
    if who.engine == "llmctl":
        how = ["--quant", who.number_format] if who.number_format.startswith("int") else ["--dtype", who.number_format]
        machine_flags = ["--device", "cpu", "--threads", str(arguments.threads), *how]
        return who.name, [who.python, "-m", "llmctl", "generate", "-m", str(who.model), "--raw", "-t", "0", "-n", "4", *machine_flags]
    if who.engine == "llama.cpp" and arguments.llama_simple:
        return f"{who.name}, its examples/simple", [arguments.llama_simple, "-m", str(who.model), "-n", "4", text]
    return f"{who.name}, in Python", [who.python, str(WORKER), who.engine, str(who.model), str(arguments.threads), who.number_format, text]


def weight_bytes(model: Path, number_format: str) -> float:
    """Bytes of weights that one decoded token reads: all matrices and the head once."""
    from llmctl.core.checkpoint import load_config
    from llmctl.core.model.facts import num_parameters

    config = load_config(model)[0]
    body, head = num_parameters(config).non_embedding, config.vocab_size * config.hidden_size
    body_bytes = {"bfloat16": 2.0, "float32": 4.0, "int8": 8.5 / 8, "int4": 5.0 / 8}[number_format]
    return body * body_bytes + head * (8.5 / 8 if number_format.startswith("int") else body_bytes)


def report(rounds: Rounds, everyone: Sequence[Contender], tasks: Sequence[str], arguments: argparse.Namespace) -> str:
    """Tables in Markdown."""
    by_name = {who.name: who for who in everyone}
    versions = {who.name: rounds.find("version", who=who.name) for who in everyone}
    parts = [
        f"{arguments.model.name}, {arguments.threads} threads, {rounds.done} alternated rounds; {machine()}. Medians (range; rounds).\n",
        "; ".join(dict.fromkeys(list(found.values())[-1] for found in versions.values() if found)) + ".\n",
    ]
    for task in tasks:
        rows = []
        for name, who in by_name.items():
            values = rounds.find("value", task=task, who=name)
            pairs = ratios(rounds.find("value", task=task, who=f"llmctl {who.beside}"), values)
            if values:
                rows.append((name, spread(values.values()), spread(pairs, 2)))
        parts.append(table((task, "tokens/s", "llmctl's ratio to it, of the same round"), rows))
    bandwidth, rows = rounds.find("value", task="bandwidth"), []
    for name in arguments.formats:
        needed = weight_bytes(arguments.model, name)
        shares = [100 * needed * share for share in ratios(rounds.find("value", task=tasks[0], who=f"llmctl {name}"), bandwidth)]
        rows.append((f"llmctl {name}", f"{needed / 1e6:.0f} MB", spread(shares, 0) + " %"))
    parts.append(f"Memory read by {arguments.threads} threads: {spread([value / 1e9 for value in bandwidth.values()])} GB/s.\n")
    parts.append(table(("decode against memory", "weights a token", "share of the limit"), rows))
    rows = [(name, f"{max(rounds.find('peak_mib', who=name).values(), default=0):.0f}") for name in by_name]
    parts.append(table(("peak memory after all tasks", "MiB"), rows))
    rows = []
    for name in dict.fromkeys(record["who"] for record in rounds.records if "first_s" in record):
        rows.append((name, *(spread(rounds.find("first_s", who=name, prompt=label).values(), 2) for label in SENTENCES)))
        rows[-1] += (f"{max(rounds.find('cold_mib', who=name).values()):.0f}",)
    parts.append(table(("process start to first token, s", *SENTENCES, "peak memory, MiB"), rows))
    rows = []
    for name, who in by_name.items():
        said, ours = (rounds.find("ids", who=other) for other in (name, f"llmctl {who.beside or who.number_format}"))
        texts = rounds.find("text", who=name)
        if said:
            number = max(said)
            equal = [a == b for a, b in zip(said[number], ours.get(number, []), strict=False)]
            rows.append((name, json.dumps(texts[number]), str([*equal, False].index(False))))
    parts.append(table((f"greedy after “{TEXT}”", "text", "tokens as llmctl's"), rows))
    return "\n".join(parts)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--llama-cpp", metavar="PYTHON", help="a Python that has llama_cpp")
    parser.add_argument("--llama-simple", metavar="BINARY", help="llama.cpp's examples/simple; its first token is then timed, not Python's")
    parser.add_argument("--transformers", nargs="+", choices=("bfloat16", "float32"), default=[], help="beside, in these formats")
    parser.add_argument("--peer", nargs=4, action="append", default=[], metavar=("ENGINE", "FORMAT", "PYTHON", "MODEL"))
    parser.add_argument("--formats", nargs="+", choices=tuple(LLAMA_FILES), default=list(LLAMA_FILES))
    parser.add_argument("--folder", type=Path, default=Path("benchmark-models"), help="where GGUF files are made and kept")
    for name, default in (("threads", 2), ("rounds", 6), ("prompt", 512), ("context", 128), ("tokens", 128), ("prompts", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no round that would end later; a second start goes on")
    parser.add_argument("--slow-s", type=float, default=4.0, help="what takes longer than this many seconds skips rounds")
    parser.add_argument("--records", type=Path, help="JSON lines: each measurement as it is made; what a second start goes on from")
    parser.add_argument("--markdown", type=Path, help="the tables, written anew after each round")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the workers end too

    files = llama_files(arguments.llama_cpp, arguments.model, arguments.folder, arguments.formats) if arguments.llama_cpp else {}
    everyone = contenders(arguments, files)
    few = max(2, arguments.tokens // 4)
    lengths = [8 + (37 * i) % 121 for i in range(arguments.prompts)]
    context = arguments.context
    tasks = {  # the first token is the prompt's
        f"decode {arguments.tokens} after {context}": Task([context], arguments.tokens + 1, lambda a: arguments.tokens / a["decode_s"]),
        f"prefill {arguments.prompt}": Task([arguments.prompt], 1, lambda a: arguments.prompt / a["prompt_s"]),
        f"8 texts, {few} after {context}": Task([context] * 8, few + 1, lambda a: 8 * few / a["decode_s"], SEVERAL),
        f"{len(lengths)} prompts of {min(lengths)} to {max(lengths)}, {few} new, all tokens": Task(
            lengths, few, lambda a: (sum(lengths) + few * len(lengths)) / (a["prompt_s"] + a["decode_s"]), SEVERAL
        ),
    }
    skipped = {"rounds", "minutes", "records", "markdown"}
    rounds = Rounds(arguments.records, {key: value for key, value in vars(arguments).items() if key not in skipped})
    workers: dict[Contender, Worker] = {}
    bandwidth = Worker(Contender("bandwidth", "bandwidth", sys.executable, "-", "-"), arguments.threads)
    try:
        for who in everyone if rounds.done < arguments.rounds else ():
            if who.engine == "llmctl":
                first_token(cold_commands(who, arguments, TEXT)[1], TEXT)  # packs the weights into the cache, which needs more memory
            workers[who] = Worker(who, arguments.threads)
            workers[who].ask(prompts=[list(range(100, 100 + context))], num_new=4)  # the first call pays for what is made once
        end_s, round_s = time.monotonic() + 60 * arguments.minutes, 0.0
        while rounds.done < arguments.rounds and time.monotonic() + round_s < end_s:
            start_s = time.monotonic()
            one_round(rounds, workers, bandwidth, tasks, arguments)
            round_s = time.monotonic() - start_s
            if arguments.markdown:
                arguments.markdown.write_text(report(rounds, everyone, list(tasks), arguments))
    finally:
        for worker in (*workers.values(), bandwidth):
            worker.close()
    print(report(rounds, everyone, list(tasks), arguments))


def one_round(
    rounds: Rounds, workers: dict[Contender, Worker], bandwidth: Worker, tasks: dict[str, Task], arguments: argparse.Namespace
) -> None:
    """Everything once, but for what is too slow for this round."""
    from tokenizers import Tokenizer

    number = rounds.done
    rounds.add(task="bandwidth", value=bandwidth.ask()["bytes_per_second"])

    def turn(task: str, who: str, measure: Callable[[], dict[str, Any]]) -> None:
        took_s, period = max(rounds.find("took_s", task=task, who=who).values(), default=0.0), 1
        while took_s > arguments.slow_s * period:
            period *= 2
        if number % period:
            return
        time.sleep(PAUSE_S)
        start = time.perf_counter()
        found = measure()
        rounds.add(task=task, who=who, took_s=time.perf_counter() - start, **found)
        shown = ", ".join(f"{key} {value:.2f}" if isinstance(value, float) else f"{key} {value!r}" for key, value in found.items())
        print(f"round {number + 1}/{arguments.rounds}: {task}: {who}: {shown}", flush=True)

    tokenizer = Tokenizer.from_file(str(arguments.model / "tokenizer.json"))
    size = tokenizer.get_vocab_size()
    for name, task in tasks.items():
        prompts = [[(number * 611953 + i * 7919 + j * 104729) % size for j in range(length)] for i, length in enumerate(task.lengths)]

        def measure(worker: Worker, task: Task = task, prompts: list[list[int]] = prompts) -> dict[str, Any]:
            answer = worker.ask(prompts=prompts, num_new=task.num_new)
            return {"value": task.per_second(answer), "peak_mib": answer["peak_mib"]}

        for who, worker in workers.items():
            decode_s = max(rounds.find("took_s", task=next(iter(tasks)), who=who.name).values(), default=0.0)
            if task.engines is None or (who.engine in task.engines and decode_s < 10 * arguments.slow_s):
                turn(name, who.name, lambda worker=worker: measure(worker))  # type: ignore[misc]
    for who, worker in workers.items():
        if number == 0:  # a peer that speaks nonsense is no peer
            ids = worker.ask(prompts=[tokenizer.encode(TEXT, add_special_tokens=False).ids], num_new=24)["texts"][0]
            said = {"version": worker.version, "ids": ids, "text": tokenizer.decode(ids)}
            turn("text", who.name, lambda said=said: said)  # type: ignore[misc]
        if who.engine not in SEVERAL:
            continue
        for label, text in SENTENCES.items():
            name, command = cold_commands(who, arguments, text)

            def start(command: list[str] = command, text: str = text, label: str = label) -> dict[str, Any]:
                first_s, cold_mib = first_token(command, text)
                return {"prompt": label, "first_s": first_s, "cold_mib": cold_mib}

            turn(f"first token, {label}", name, start)
    rounds.end()


if __name__ == "__main__":
    main()
