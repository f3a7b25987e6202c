"""Time to quality on tinyshakespeare: the README's tour against nanoGPT's README recipe for a CPU, one after the other.

    python benchmarks/time_to_quality.py --nanogpt CHECKOUT [--rounds 3] [--out results.json]

CHECKOUT is a clone of github.com/karpathy/nanoGPT. What counts is the wall time of whole processes, for llmctl with
training the tokenizer and packing, and bits per byte over the whole validation text: the last tenth of the file, which is
nanoGPT's split. nanoGPT scores characters, and the text is ASCII, so that a character is a byte; its value is computed here
from its checkpoint, in windows of its context, each character once. llmctl's is what `llmctl eval` prints for the packed
validation split. Both use all the cores they find.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TEXT = Path(__file__).resolve().parent.parent / "examples" / "tinyshakespeare.txt"
RECIPE = (
    "--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4"
    " --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
)
"""The flags that the README of nanoGPT gives for a CPU."""

PRETRAIN = "--depth 2 --seq-len 128 --batch-size 8 --max-steps 400 --eval-every 0 --sample-every 0 --save-every 0"


def run(command: list[str], *, cwd: Path | None = None) -> tuple[float, str]:
    """Seconds of wall time and stdout."""
    started = time.perf_counter()
    done = subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return time.perf_counter() - started, done.stdout


def nanogpt(checkout: Path, work: Path) -> dict[str, float]:
    """One run of nanoGPT's recipe in a copy of the checkout."""
    copy = work / "nanogpt"
    shutil.copytree(checkout, copy, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".git"))
    data = copy / "data" / "shakespeare_char"
    shutil.copy(TEXT, data / "input.txt")
    prepare_s, _ = run([sys.executable, "data/shakespeare_char/prepare.py"], cwd=copy)
    train_s, _ = run([sys.executable, "train.py", "config/train_shakespeare_char.py", *RECIPE.split()], cwd=copy)
    return {"wall_s": prepare_s + train_s, "bits_per_byte": nanogpt_bits_per_byte(copy)}


def nanogpt_bits_per_byte(copy: Path) -> float:
    """Bits per character of nanoGPT's checkpoint over the whole validation text."""
    code = """
import math, numpy as np, torch
from model import GPT, GPTConfig
checkpoint = torch.load("out-shakespeare-char/ckpt.pt", map_location="cpu", weights_only=False)
model = GPT(GPTConfig(**checkpoint["model_args"])).eval()
model.load_state_dict(checkpoint["model"])
ids = torch.from_numpy(np.fromfile("data/shakespeare_char/val.bin", dtype=np.uint16).astype(np.int64))
length, total = checkpoint["model_args"]["block_size"], 0.0
with torch.no_grad():
    for start in range(0, len(ids) - 1, length):
        piece = ids[start : start + length + 1]
        _, loss = model(piece[None, :-1], piece[None, 1:])
        total += float(loss) * (len(piece) - 1)
print(total / (len(ids) - 1) / math.log(2))
"""
    return float(run([sys.executable, "-c", code], cwd=copy)[1].splitlines()[-1])  # nanoGPT prints its size first


def llmctl(work: Path) -> dict[str, float]:
    """One run of the tour: tokenizer, shards, training; then its score."""
    program = [sys.executable, "-m", "llmctl"]
    wall_s = 0.0
    for arguments in (
        ["tokenize", "train", str(TEXT), "--vocab-size", "1024", "-o", str(work / "tokenizer")],
        ["tokenize", "pack", str(TEXT), "--tokenizer", str(work / "tokenizer"), "-o", str(work / "shards")],
        ["pretrain", "--data", str(work / "shards"), "-o", str(work / "run"), *PRETRAIN.split()],
    ):
        wall_s += run(program + arguments)[0]
    model = max((work / "run").glob("step-*"))
    _, printed = run([*program, "eval", "--model", str(model), str(work / "shards"), "--json", "--no-cache"])
    return {"wall_s": wall_s, "bits_per_byte": find_bits(printed)}


def find_bits(printed: str) -> float:
    """Bits per byte in the JSON lines of `llmctl eval`."""
    for line in map(json.loads, printed.splitlines()):
        for metric in line.get("metrics", []):
            if metric["name"] == "bits_per_byte":
                return float(metric["value"])
    raise LookupError("no bits_per_byte in the result of eval")


def main() -> None:
    """Alternate the two, print each run and the medians."""
    parser = argparse.ArgumentParser(description="Time to quality on tinyshakespeare, llmctl against nanoGPT.")
    parser.add_argument("--nanogpt", type=Path, required=True, help="clone of github.com/karpathy/nanoGPT")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="also write the results here, as JSON")
    arguments = parser.parse_args()
    results: dict[str, list[dict[str, float]]] = {"llmctl": [], "nanoGPT": []}
    for number in range(arguments.rounds):
        for name in results:
            with tempfile.TemporaryDirectory() as folder:
                done = llmctl(Path(folder)) if name == "llmctl" else nanogpt(arguments.nanogpt, Path(folder))
            results[name].append(done)
            print(f"round {number + 1}  {name:8} {done['wall_s']:7.1f} s   {done['bits_per_byte']:.4f} bits per byte", flush=True)
    seconds = {name: statistics.median(r["wall_s"] for r in runs) for name, runs in results.items()}
    ratio = seconds["nanoGPT"] / seconds["llmctl"]
    print(f"median   llmctl {seconds['llmctl']:.1f} s, nanoGPT {seconds['nanoGPT']:.1f} s: {ratio:.2f} times")
    if arguments.out is not None:
        arguments.out.write_text(json.dumps({"cpus": os.cpu_count(), "runs": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
