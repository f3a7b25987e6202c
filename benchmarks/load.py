"""Opening a model: time and peak memory of llmctl, transformers, and the weights alone, in turns, each in a process of its own.

    python benchmarks/load.py MODEL [MODEL ...] [--rounds 5] [--dtype float32]

MODEL is a directory, or a .gguf file, whose tokenizer is opened too. A worker imports what it needs, and then is timed: until the
model stands ("load"), and until it has given the logits of eight tokens ("first logits": mapped weights are read then). Memory is
the peak above what the imports took. "safetensors" reads each tensor of a directory with safetensors.torch.load_file and runs
nothing: what mlx-lm's loader and others begin with. Ratios are those of the medians.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

_COMMON = """
import contextlib, gc, json, sys, time
import torch
torch.set_num_threads(int(sys.argv[3]))
path, dtype = sys.argv[1], getattr(torch, sys.argv[2]) if sys.argv[2] != "stored" else None

def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return 0.0

def tell(load, first):
    gc.collect()
    with contextlib.suppress(OSError):
        open("/proc/self/clear_refs", "w").write("5")
    before, start = peak(), time.perf_counter()
    model = load()
    load_s = time.perf_counter() - start
    first_s = None
    if first is not None:
        with torch.inference_mode():
            first(model)
        first_s = time.perf_counter() - start
    print(json.dumps({"load_s": load_s, "first_s": first_s, "peak_mib": peak() - before}))

TOKENS = torch.arange(1, 9)[None]
"""
_WORKERS = {
    "llmctl": """
from pathlib import Path
from llmctl.core.checkpoint import load_model, load_tokenizer
import llmctl.core.checkpoint.gguf, llmctl.core.families.gguf_tokenizer, llmctl.core.tokenizer, tokenizers
def load():
    if path.endswith(".gguf"):
        load_tokenizer(Path(path))
    return load_model(Path(path), dtype=dtype).model
tell(load, lambda model: model(TOKENS))
""",
    "llmctl native": """
from pathlib import Path
import numpy as np
from llmctl.core.checkpoint import load_tokenizer
from llmctl.core.infer.opening import open_model
import llmctl.core.native.executor, llmctl.core.checkpoint.stored
def load():
    if path.endswith(".gguf"):
        load_tokenizer(Path(path))
    return open_model(Path(path), device="cpu", dtype=None if dtype is None else sys.argv[2], executor="native", threads=int(sys.argv[3]))
def first(model):
    model.executor.reserve(num_slots=1, capacity=8)
    model.executor.step(TOKENS.numpy(), np.array([0]), np.array([0]))
tell(load, first)
""",
    "transformers": """
import os
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
from pathlib import Path
import transformers
transformers.utils.logging.disable_progress_bar()
from transformers import AutoModelForCausalLM, AutoTokenizer
import transformers.models.llama.modeling_llama, transformers.modeling_gguf_pytorch_utils
def load():
    folder, options = path, {}
    if path.endswith(".gguf"):
        folder, options = str(Path(path).parent), {"gguf_file": Path(path).name}
        AutoTokenizer.from_pretrained(folder, **options)
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto" if dtype is None else dtype, **options)
tell(load, lambda model: model(TOKENS).logits)
""",
    "safetensors": """
from pathlib import Path
from safetensors.torch import load_file
def load():
    tensors = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        tensors.update(load_file(file))
    return {name: tensor if dtype is None else tensor.to(dtype) for name, tensor in tensors.items()}
tell(load, None)
""",
}


def one(worker: str, model: str, *, dtype: str, threads: int) -> dict[str, float | None] | str:
    """What one process measured, or the last line that it said instead."""
    done = subprocess.run(
        [sys.executable, "-c", _COMMON + _WORKERS[worker], model, dtype, str(threads)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        return (done.stderr.strip().splitlines() or ["no message"])[-1][:160]
    found: dict[str, float | None] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def shown(values: list[float], unit: str) -> str:
    """Median, smallest and largest."""
    return f"{statistics.median(values):.3g} {unit} ({min(values):.3g} to {max(values):.3g})"


def main() -> None:
    """Print a table a model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16, or stored")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", nargs="+", choices=list(_WORKERS), default=list(_WORKERS))
    arguments = parser.parse_args()
    for model in arguments.models:
        workers = [name for name in arguments.workers if not (model.endswith(".gguf") and name == "safetensors")]
        found: dict[str, list[dict[str, float | None]]] = {name: [] for name in workers}
        for number in range(arguments.rounds + 1):  # the first warms the page cache
            for name in list(found):
                result = one(name, str(Path(model).resolve()), dtype=arguments.dtype, threads=arguments.threads)
                if isinstance(result, str):
                    print(f"{model}: {name} cannot: {result}")
                    del found[name]
                elif number:
                    found[name].append(result)
        print(f"{model}, {arguments.dtype}, {arguments.threads} threads, medians of {arguments.rounds}")
        medians: dict[tuple[str, str], float] = {}
        for name, rounds in found.items():
            columns = []
            for key, unit, what in (("load_s", "s", "load"), ("first_s", "s", "first logits"), ("peak_mib", "MiB", "peak above imports")):
                values = [value for measured in rounds if (value := measured[key]) is not None]
                if values:
                    medians[name, key] = statistics.median(values)
                    columns.append(f"{what} {shown(values, unit)}")
            print(f"  {name}: " + "; ".join(columns))
        for other in found:
            if other != "llmctl" and "llmctl" in found:
                ratios = {key: medians[other, key] / medians["llmctl", key] for name, key in medians if name == other}
                print(f"  {other} / llmctl: " + ", ".join(f"{key.rpartition('_')[0]} {ratio:.2f}" for key, ratio in ratios.items()))


if __name__ == "__main__":
    main()
