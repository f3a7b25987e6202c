"""Decoding and prompt speed of the native executor and of torch, one after the other in turns, on one model.

    python benchmarks/decode.py MODEL [--rounds 6] [--prompt 512] [--tokens 64] [--batch 1] [--threads N] [--dtype float32] [--quant int8]

MODEL is what `llmctl generate --model` takes. A round feeds each executor a prompt of random ids in one call and then
decodes; what counts is the median over the rounds, and the ratio of neighbours, since machines wander.
"""

import argparse
import statistics
import time

import numpy as np

from llmctl.core.checkpoint import resolve_model
from llmctl.core.infer.executor import Executor
from llmctl.core.infer.opening import available_threads, open_model


def one_round(executor: Executor, *, num_prompt: int, num_tokens: int, batch: int, seed: int) -> tuple[float, float]:
    """Prompt tokens a second of one text, and decoded tokens a second of `batch` texts together."""
    prompt = np.random.default_rng(seed).integers(0, executor.vocab_size, (1, num_prompt))
    start = time.perf_counter()
    logits = executor.step(prompt, np.array([0]), np.array([0]))
    prompt_s = time.perf_counter() - start
    for slot in range(1, batch):
        executor.copy_slot(0, to=slot, length=num_prompt)
    tokens = np.repeat(logits.argmax(axis=1)[:, None], batch, axis=0)
    start = time.perf_counter()
    for i in range(num_tokens):
        logits = executor.step(tokens, np.full(batch, num_prompt + i), np.arange(batch))
        tokens = logits.argmax(axis=1)[:, None]
    return num_prompt / prompt_s, batch * num_tokens / (time.perf_counter() - start)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model")
    for name, default in (("rounds", 6), ("prompt", 512), ("tokens", 64), ("batch", 1), ("threads", available_threads())):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--quant", choices=("int8", "int4"), default=None)
    parser.add_argument("--executors", nargs="+", default=["native", "torch"])
    arguments = parser.parse_args()
    path = resolve_model(arguments.model)
    opened = {}
    for name in arguments.executors:
        model = open_model(path, device="cpu", dtype=arguments.dtype, quant=arguments.quant, threads=arguments.threads, executor=name)
        model.executor.reserve(num_slots=arguments.batch, capacity=arguments.prompt + arguments.tokens)
        print(f"{name}: {model.description}")
        opened[name] = model.executor
    speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in opened}
    for number in range(arguments.rounds):
        for name, executor in opened.items():
            speeds[name].append(
                one_round(executor, num_prompt=arguments.prompt, num_tokens=arguments.tokens, batch=arguments.batch, seed=number)
            )
    for index, what in enumerate(("prompt", "decode")):
        for name, rounds in speeds.items():
            values = [pair[index] for pair in rounds]
            print(f"{what} {name}: {statistics.median(values):.1f} tokens/s ({min(values):.1f} to {max(values):.1f})")
        if len(speeds) == 2:
            first, second = ([pair[index] for pair in rounds] for rounds in speeds.values())
            ratios = [a / b for a, b in zip(first, second, strict=True)]
            print(f"{what} ratio: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
