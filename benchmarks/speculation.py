"""Decoding with and without guesses, on one model, in alternated rounds; the texts must be equal.

    python benchmarks/speculation.py MODEL [--quant int8|int4] [--draft-model MODEL] [--temperature 0] [--threads 2]
        [--rounds 6] [--cpu-time]

Three prompts: prose, in which little repeats itself, code, and a passage to be said again. A rate is that of the tokens after
the first. --cpu-time counts the process's own time instead of the clock's, for a busy machine; use it with --threads 1. The last
lines say what a call of n tokens costs in units of a call of one, which is what the choice of lengths rests on
(`token_cost` in core/infer/opening.py).
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from llmctl.core.infer.events import Finished
from llmctl.core.infer.generator import Generator

PASSAGE = (
    "The quick brown fox jumps over the lazy dog, while the old farmer, who had seen many foxes in his long life, watches from the "
    "porch of his small red house and thinks about the price of corn, which has fallen again this year."
)
PROMPTS = {
    "prose": "Write a short story about a fisherman who finds a strange stone on the beach.",
    "code": "Write a Python class for a bank account with deposit, withdraw and a history of transactions, with docstrings.",
    "copy": f"Repeat this text word for word: {PASSAGE}",
}
WAYS = ("off", "auto")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--quant", choices=("int8", "int4"))
    parser.add_argument("--draft-model")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--cpu-time", action="store_true")
    args = parser.parse_args()
    clock = time.process_time if args.cpu_time else time.perf_counter
    machine: dict[str, Any] = {"device": "cpu", "quant": args.quant, "threads": args.threads}
    generators = {way: Generator.open(args.model, speculate=way, draft_model=args.draft_model, **machine) for way in WAYS}  # type: ignore[arg-type]
    print(generators["off"].description)
    for name, prompt in PROMPTS.items():
        rates: dict[str, list[float]] = {way: [] for way in WAYS}
        texts = {}
        for _ in range(args.rounds):
            for way, generator in generators.items():
                rate, texts[way] = decode(generator, prompt, args, clock)
                rates[way].append(rate)
        assert texts["off"] == texts["auto"], "guesses changed the text"
        counts = generators["auto"].engine.speculator
        assert counts is not None, "this model runs on torch, where nothing is guessed without a draft model"
        pairs = [after / before for before, after in zip(rates["off"], rates["auto"], strict=True)]
        plain, guessed = (statistics.median(rates[way]) for way in WAYS)
        print(
            f"{name}: {len(texts['off'])} tokens, {plain:.1f} to {guessed:.1f} tokens/s, {guessed / plain:.2f} "
            f"({min(pairs):.2f} to {max(pairs):.2f}); {counts.num_drafted} guessed, {counts.num_accepted} came true"
        )
        counts.num_drafted = counts.num_accepted = 0
    print(call_costs(generators["off"], args.rounds, clock))


def decode(generator: Generator, prompt: str, args: argparse.Namespace, clock: Callable[[], float]) -> tuple[float, tuple[int, ...]]:
    """Tokens a second after the first one, and the text."""
    request = generator.request(prompt, seed=3, max_new_tokens=args.max_new_tokens, temperature=args.temperature)
    first_s = 0.0
    for event in generator.engine.run([request]):
        if isinstance(event, Finished):
            return (event.num_new_tokens - 1) / (clock() - first_s), event.token_ids
        first_s = first_s or clock()
    raise RuntimeError("the text has not come to its end")


def call_costs(generator: Generator, rounds: int, clock: Callable[[], float]) -> str:
    """What calls of several tokens after 128 cost, in units of a call of one."""
    executor = generator.executor
    executor.reserve(num_slots=1, capacity=256)
    slot, start = np.array([0]), np.array([128])
    executor.step(np.ones((1, 128), dtype=np.int64), np.array([0]), slot)
    elapsed_s: dict[int, list[float]] = {count: [] for count in (1, 2, 4, 8, 16)}
    for _ in range(rounds):
        for count, found in elapsed_s.items():
            started_s = clock()
            executor.step(np.ones((1, count), dtype=np.int64), start, slot, all_logits=count > 1)
            found.append(clock() - started_s)
    one = statistics.median(elapsed_s[1])
    return "cost of a call: " + ", ".join(f"{count} tokens {statistics.median(found) / one:.2f}" for count, found in elapsed_s.items())


if __name__ == "__main__":
    main()
