"""Decoding with and without guesses, on one model, in alternated rounds; the texts must be equal.

    python benchmarks/speculation.py MODEL [--quant int8|int4] [--draft-model MODEL] [--temperature 0] [--threads 2]
        [--rounds 6] [--cpu-time] [--records FILE.jsonl] [--markdown FILE.md]

Three prompts: prose, in which little repeats itself, code, and a passage to be said again. A rate is that of the tokens after
the first. --cpu-time counts the process's own time instead of the clock's, for a busy machine; use it with --threads 1. The last
table says what a call of n tokens costs in units of a call of one, which is what the choice of lengths rests on
(`token_cost` in core/infer/opening.py). Measurements are printed, and kept in --records, as they are made, from which a second
start goes on after the last whole round; the Markdown is written anew after each round.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rounds import Rounds, machine, ratios, spread, table

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
COUNTS = (1, 2, 4, 8, 16)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--quant", choices=("int8", "int4"))
    parser.add_argument("--draft-model")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--records", type=Path)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    rounds = Rounds(args.records, {key: value for key, value in vars(args).items() if key not in {"rounds", "records", "markdown"}})
    clock = time.process_time if args.cpu_time else time.perf_counter
    options: dict[str, Any] = {"device": "cpu", "quant": args.quant, "threads": args.threads}
    generators = {way: Generator.open(args.model, speculate=way, draft_model=args.draft_model, **options) for way in WAYS}  # type: ignore[arg-type]
    title = f"{Path(args.model).name}, {generators['off'].description}, temperature {args.temperature}; {machine()}."
    while rounds.done < args.rounds:
        for name, prompt in PROMPTS.items():
            texts = {}
            for way, generator in generators.items():
                rate, texts[way] = decode(generator, prompt, args, clock)
                counts = generator.engine.speculator
                drafted = {} if counts is None else {"num_drafted": counts.num_drafted, "num_accepted": counts.num_accepted}
                rounds.add(prompt=name, way=way, rate=rate, num_tokens=len(texts[way]), **drafted)
                if counts is not None:
                    counts.num_drafted = counts.num_accepted = 0
                print(f"round {rounds.done + 1}/{args.rounds}: {name}, {way}: {rate:.1f} tokens/s {drafted or ''}", flush=True)
            assert texts["off"] == texts["auto"], "guesses changed the text"
            assert drafted, "this model runs on torch, where nothing is guessed without a draft model"
        for count, elapsed_s in call_costs(generators["off"], clock).items():
            rounds.add(count=count, call_s=elapsed_s)
        rounds.end()
        if args.markdown:
            args.markdown.write_text(report(rounds, title))
    print(report(rounds, title))


def report(rounds: Rounds, title: str) -> str:
    """Tables in Markdown."""
    rows = []
    for name in PROMPTS:
        off, auto = (rounds.find("rate", prompt=name, way=way) for way in WAYS)
        counts = [sum(rounds.find(key, prompt=name, way="auto").values()) // rounds.done for key in ("num_drafted", "num_accepted")]
        num_tokens = max(rounds.find("num_tokens", prompt=name, way="off").values())
        rows.append((f"{name}, {num_tokens} tokens", spread(off.values()), spread(auto.values()), spread(ratios(auto, off), 2)))
        rows[-1] += (f"{counts[1]} of {counts[0]}",)
    ones = rounds.find("call_s", count=1)
    costs = [(str(count), spread(ratios(rounds.find("call_s", count=count), ones), 2)) for count in COUNTS]
    return "\n".join(
        (
            f"{title} Medians (range; rounds).\n",
            table(("text", "tokens/s without guesses", "with guesses", "ratio, of the same round", "guesses that came true, a text"), rows),
            table(("tokens in a call, after 128", "its cost, of a call of one"), costs),
        )
    )


def decode(generator: Generator, prompt: str, args: argparse.Namespace, clock: Callable[[], float]) -> tuple[float, tuple[int, ...]]:
    """Tokens a second after the first one, and the text."""
    request = generator.request(prompt, seed=3, max_new_tokens=args.max_new_tokens, temperature=args.temperature)
    first_s = 0.0
    for event in generator.engine.run([request]):
        if isinstance(event, Finished):
            return (event.num_new_tokens - 1) / (clock() - first_s), event.token_ids
        first_s = first_s or clock()
    raise RuntimeError("the text has not come to its end")


def call_costs(generator: Generator, clock: Callable[[], float]) -> dict[int, float]:
    """Seconds that calls of several tokens after 128 take: the median of some."""
    executor = generator.executor
    executor.reserve(num_slots=1, capacity=256)
    slot, start = np.array([0]), np.array([128])
    executor.step(np.ones((1, 128), dtype=np.int64), np.array([0]), slot)
    elapsed_s: dict[int, list[float]] = {count: [] for count in COUNTS}
    for _ in range(5):
        for count, found in elapsed_s.items():
            started_s = clock()
            executor.step(np.ones((1, count), dtype=np.int64), start, slot, all_logits=count > 1)
            found.append(clock() - started_s)
    return {count: statistics.median(found) for count, found in elapsed_s.items()}


if __name__ == "__main__":
    main()
