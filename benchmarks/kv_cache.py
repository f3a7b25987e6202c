"""What keeping keys and values in fewer bits costs in perplexity, and what it saves in memory.

    python benchmarks/kv_cache.py MODEL --text FILE [--tokens 4096] [--context 1024] [--quant int8] [--dtype bfloat16]

The text's first tokens are cut into windows of --context, each a text of its own, and every token but a window's first is
scored. The kinds of cache see the same weights and windows, so their difference is the cache's alone.
"""

import argparse
import math
from pathlib import Path

import numpy as np

from llmctl.core.checkpoint import load_tokenizer, resolve_model
from llmctl.core.infer.opening import open_model


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--quant", choices=("int8", "int4"), default=None)
    parser.add_argument("--dtype", default=None)
    arguments = parser.parse_args()
    path = resolve_model(arguments.model)
    ids = load_tokenizer(path).encode(arguments.text.read_text(encoding="utf-8"))[: arguments.tokens]
    print("| keys and values | memory a token | perplexity | against float32 | largest difference of a logit | likeliest token the same |")
    print("|---|---|---|---|---|---|")
    want: list[np.ndarray] = []
    base = 0.0
    for kind in ("float32", "float16", "int8"):
        opened = open_model(path, device="cpu", dtype=arguments.dtype, quant=arguments.quant, executor="native", kv_dtype=kind)
        config, executor = opened.config, opened.executor
        executor.reserve(num_slots=1, capacity=arguments.context)
        loss = largest = 0.0
        same = count = 0
        for number, start in enumerate(range(0, len(ids) - 1, arguments.context)):
            window = np.array(ids[start : start + arguments.context])
            rows = [
                executor.step(window[None, at : at + 128], np.array([at]), np.array([0]), all_logits=True)[0]
                for at in range(0, len(window), 128)
            ]
            logits = np.concatenate(rows)
            shifted = logits[:-1].astype(np.float64) - logits[:-1].max(axis=1, keepdims=True)
            loss += float(np.log(np.exp(shifted).sum(axis=1)).sum() - shifted[np.arange(len(window) - 1), window[1:]].sum())
            count += len(window) - 1
            if kind == "float32":
                want.append(logits.astype(np.float32))
            largest = max(largest, float(np.abs(logits - want[number]).max()))
            same += int((logits.argmax(axis=1) == want[number].argmax(axis=1)).sum())
        perplexity = math.exp(loss / count)
        base = base or perplexity
        bits = {"float32": 32.0, "float16": 16.0, "int8": 8.0 + 32.0 / config.head_dim}[kind]
        share = same / (count + len(want))
        kib = bits * 2 * config.num_layers * config.kv_size / 8 / 1024
        print(f"| {kind} | {kib:.1f} KiB | {perplexity:.4f} | {perplexity / base - 1:+.3%} | {largest:.3f} | {share:.2%} |")


if __name__ == "__main__":
    main()
