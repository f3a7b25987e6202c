"""Does a small run tell about a large one? Held-out loss over --depth at a fixed ratio of tokens to parameters.

    python benchmarks/depth.py [--depths 2,4,6,8] [--tokens-per-parameter 0.5] [--factors 0.5,1,2] [--text FILE] [--out FILE]

Every run is `llmctl pretrain` with its defaults, but for --depth and the budget. `--factors` repeats each with the learning
rates that it chooses by default multiplied by these: where the loss is least at a factor of 1 for each depth, what suits a
small model suits a large one. The text is tinyshakespeare unless another is given; a tokenizer is trained on it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TEXT = Path(__file__).resolve().parent.parent / "examples" / "tinyshakespeare.txt"
QUIET = ["--eval-every", "0", "--sample-every", "0", "--save-every", "0", "--json", "--quiet"]


def llmctl(*arguments: str) -> list[dict[str, Any]]:
    """The events of one command."""
    done = subprocess.run([sys.executable, "-m", "llmctl", *arguments], check=True, stdout=subprocess.PIPE, text=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def train(shards: Path, run: Path, depth: int, factor: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """One run: what it planned, and its held-out loss at the end."""
    options = ["pretrain", "--data", str(shards), "--depth", str(depth)]
    options += ["--seq-len", str(arguments.seq_len), "--batch-size", str(arguments.batch)]
    if arguments.threads:
        options += ["--threads", str(arguments.threads)]
    (plan,) = (e for e in llmctl(*options, "--max-steps", "1", "--dry-run", "--json", "--quiet") if e["event"] == "Planned")
    tokens = arguments.max_tokens or max(1, round(plan["num_parameters"] * arguments.tokens_per_parameter))
    rates = ["--learning-rate", str(plan["learning_rate"] * factor), "--muon-learning-rate", str(plan["muon_learning_rate"] * factor)]
    started = time.perf_counter()
    events = llmctl(*options, "--max-tokens", str(tokens), "--out-dir", str(run), *(rates if factor != 1 else []), *QUIET)
    (done,) = (e for e in events if e["event"] == "Finished")
    return {
        "depth": depth,
        "parameters": plan["num_parameters"],
        "tokens": done["tokens_seen"],
        "learning_rate": plan["learning_rate"] * factor,
        "factor": factor,
        "loss": done["val_loss"],
        "bits_per_byte": done["val_bits_per_byte"],
        "wall_s": time.perf_counter() - started,
    }


def main() -> None:
    """Print a line a run."""
    parser = argparse.ArgumentParser(description="Held-out loss over --depth with llmctl's defaults.")
    parser.add_argument("--depths", default="2,4,6,8")
    parser.add_argument("--factors", default="1")
    parser.add_argument("--tokens-per-parameter", type=float, default=0.5)
    parser.add_argument("--max-tokens", type=int, help="the same number of tokens for each depth instead")
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, help="also write the results here, as JSON")
    arguments = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        llmctl("tokenize", "train", str(arguments.text), "--vocab-size", str(arguments.vocab_size), "-o", str(folder / "tok"), "--quiet")
        llmctl("tokenize", "pack", str(arguments.text), "--tokenizer", str(folder / "tok"), "-o", str(folder / "shards"), "--quiet")
        for depth in map(int, arguments.depths.split(",")):
            for factor in map(float, arguments.factors.split(",")):
                done = train(folder / "shards", folder / f"run-{depth}-{factor}", depth, factor, arguments)
                results.append(done)
                print(
                    f"depth {depth}  {done['parameters']:>11,} parameters  {done['tokens']:>11,} tokens  lr {done['learning_rate']:.2e}"
                    f" (x{factor:g})  loss {done['loss']:.4f}  {done['bits_per_byte']:.4f} bits/byte  {done['wall_s']:.0f} s",
                    flush=True,
                )
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
