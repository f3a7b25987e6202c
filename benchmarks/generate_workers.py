"""One engine in a process of its own, for benchmarks/generate.py: reads a JSON command a line, answers with a JSON line.

    python generate_workers.py ENGINE MODEL THREADS FORMAT

ENGINE is llmctl, llama.cpp, transformers or bandwidth. Only the engine's own packages are imported, since each has its own
environment. Commands: {"do": "prefill" | "decode" | "batch" | "mixed" | "read", ...}; answers are seconds and counts.
"""

import ctypes
import importlib
import json
import os
import resource
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

BATCH, CAPACITY = 8, 1024


class Engine(Protocol):
    """What is measured: texts in slots 0 to 7, greedy."""

    vocab_size: int

    def prefill(self, ids: Sequence[int], slot: int) -> int:
        """A prompt into an empty slot; its next token."""

    def decode(self, tokens: Sequence[int], slots: Sequence[int], positions: Sequence[int]) -> list[int]:
        """One more token in each of the slots; what follows them."""


class Llmctl:
    """The native executor, without the engine around it, as the peers are called without theirs."""

    def __init__(self, model: str, threads: int, number_format: str) -> None:
        import numpy as np

        from llmctl.core.infer.opening import open_model

        quant: Any = number_format if number_format.startswith("int") else None
        opened = open_model(
            Path(model), device="cpu", dtype=None if quant else number_format, quant=quant, threads=threads, executor="native"
        )
        self._executor, self._np = opened.executor, np
        self.vocab_size = opened.executor.vocab_size
        self._executor.reserve(num_slots=BATCH, capacity=CAPACITY)

    def prefill(self, ids: Sequence[int], slot: int) -> int:
        """See Engine."""
        np = self._np
        return int(self._executor.step(np.array([ids]), np.array([0]), np.array([slot])).argmax())

    def decode(self, tokens: Sequence[int], slots: Sequence[int], positions: Sequence[int]) -> list[int]:
        """See Engine."""
        np = self._np
        logits = self._executor.step(np.array(tokens)[:, None], np.array(positions), np.array(slots))
        return [int(token) for token in logits.argmax(axis=1)]


class LlamaCpp:
    """llama.cpp's C interface through llama-cpp-python; one sequence a slot."""

    def __init__(self, model: str, threads: int, _: str) -> None:
        import numpy as np

        llama_cpp: Any = importlib.import_module("llama_cpp")  # in an environment of its own
        self._lib, self._np = llama_cpp, np
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch, options.n_seq_max = BATCH * CAPACITY, 512, 512, BATCH
        options.n_threads = options.n_threads_batch = threads
        self._model = llama_cpp.llama_model_load_from_file(os.fsencode(model), llama_cpp.llama_model_default_params())
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {model}")
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(512, 0, 1)

    def _run(self, rows: Sequence[tuple[int, int, int, bool]]) -> list[int]:
        """Tokens with position, slot, and whether the next token is wanted; those tokens."""
        batch, lib, np = self._batch, self._lib, self._np
        batch.n_tokens = len(rows)
        for i, (token, position, slot, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, wanted
            batch.seq_id[i][0] = slot
        if lib.llama_decode(self._context, batch):
            raise SystemExit("llama_decode failed")
        found = []
        for i, row in enumerate(rows):
            if row[3]:
                logits = np.ctypeslib.as_array(lib.llama_get_logits_ith(self._context, i), (self.vocab_size,))
                found.append(int(logits.argmax()))
        return found

    def prefill(self, ids: Sequence[int], slot: int) -> int:
        """See Engine."""
        self._lib.llama_memory_seq_rm(self._lib.llama_get_memory(self._context), slot, -1, -1)
        return self._run([(token, i, slot, i == len(ids) - 1) for i, token in enumerate(ids)])[0]

    def decode(self, tokens: Sequence[int], slots: Sequence[int], positions: Sequence[int]) -> list[int]:
        """See Engine."""
        memory = self._lib.llama_get_memory(self._context)
        for slot, position in zip(slots, positions, strict=True):  # a repeated round takes tokens back
            self._lib.llama_memory_seq_rm(memory, slot, position, -1)
        return self._run([(token, at, slot, True) for token, slot, at in zip(tokens, slots, positions, strict=True)])


class Transformers:
    """transformers' eager model with its dynamic cache; one cache a slot, so a batch is a loop."""

    def __init__(self, model: str, threads: int, number_format: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM, DynamicCache

        torch.set_num_threads(threads)
        self._torch, self._new_cache = torch, DynamicCache
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, number_format))
        self.vocab_size = self._model.config.vocab_size
        self._caches: dict[int, Any] = {}

    def _run(self, ids: Sequence[int], slot: int) -> int:
        with self._torch.inference_mode():
            found = self._model(self._torch.tensor([ids]), past_key_values=self._caches[slot], use_cache=True, logits_to_keep=1)
        return int(found.logits[0, -1].argmax())

    def prefill(self, ids: Sequence[int], slot: int) -> int:
        """See Engine."""
        self._caches[slot] = self._new_cache()
        return self._run(ids, slot)

    def decode(self, tokens: Sequence[int], slots: Sequence[int], positions: Sequence[int]) -> list[int]:
        """See Engine."""
        return [self._run([token], slot) for token, slot in zip(tokens, slots, strict=True)]


def read_memory(threads: int, num_bytes: int = 256 << 20, repeats: int = 4) -> float:
    """Bytes a second that `threads` threads read together: sums of products, of which numpy's BLAS does nothing but load."""
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    import numpy as np

    parts = [np.ones(num_bytes // 4 // threads, dtype=np.float32) for _ in range(threads)]

    def read(part: Any) -> None:
        for _ in range(repeats):
            float(np.dot(part, part))

    best = 0.0
    for _ in range(3):
        workers = [threading.Thread(target=read, args=(part,)) for part in parts]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = max(best, num_bytes * repeats / (time.perf_counter() - start))
    return best


def mixed(engine: Engine, lengths: Sequence[int], num_new: int) -> int:
    """Prompts of these lengths through eight slots, each with `num_new` tokens more; a free slot takes the next. Tokens fed."""
    waiting = list(enumerate(lengths))
    under_way: dict[int, tuple[int, int, int]] = {}  # slot -> last token, its position, tokens to come
    while waiting or under_way:
        for slot in range(BATCH):
            if slot not in under_way and waiting:
                number, length = waiting.pop(0)
                ids = [(number * 7919 + i * 104729) % engine.vocab_size for i in range(length)]
                under_way[slot] = (engine.prefill(ids, slot), length, num_new - 1)
        slots = sorted(under_way)
        tokens = engine.decode([under_way[s][0] for s in slots], slots, [under_way[s][1] for s in slots])
        for slot, token in zip(slots, tokens, strict=True):
            _, position, left = under_way.pop(slot)
            if left > 1:
                under_way[slot] = (token, position + 1, left - 1)
    return sum(lengths) + num_new * len(lengths)


def answer(engine: Engine, command: dict[str, Any]) -> dict[str, float]:
    """Do what one line says; tokens a second."""
    what = command["do"]
    ids = [(11 + i * 104729) % engine.vocab_size for i in range(command.get("prompt", 0))]
    if what == "prefill":
        start = time.perf_counter()
        engine.prefill(ids, 0)
        return {"per_second": len(ids) / (time.perf_counter() - start)}
    if what in ("decode", "batch"):
        slots = list(range(1 if what == "decode" else BATCH))
        tokens = [engine.prefill(ids, slot) for slot in slots]
        start = time.perf_counter()
        for i in range(command["tokens"]):
            tokens = engine.decode(tokens, slots, [len(ids) + i] * len(slots))
        return {"per_second": len(slots) * command["tokens"] / (time.perf_counter() - start)}
    start = time.perf_counter()
    num_tokens = mixed(engine, command["lengths"], command["tokens"])
    return {"per_second": num_tokens / (time.perf_counter() - start)}


def main() -> None:
    """Answer until stdin ends."""
    kind, model, threads, number_format = sys.argv[1:5]
    if kind == "bandwidth":
        for _ in sys.stdin:
            print(json.dumps({"per_second": read_memory(int(threads))}), flush=True)
        return
    kinds: dict[str, type[Llmctl] | type[LlamaCpp] | type[Transformers]]
    kinds = {"llmctl": Llmctl, "llama.cpp": LlamaCpp, "transformers": Transformers}
    if kind == "llama.cpp":
        importlib.import_module("llama_cpp")  # not counted: its own program has nothing to import
    start = time.perf_counter()
    engine: Engine = kinds[kind](model, int(threads), number_format)
    print(json.dumps({"loaded_s": time.perf_counter() - start}), flush=True)
    for line in sys.stdin:
        found = answer(engine, json.loads(line))
        peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps({**found, "peak_mib": peak_kib / 1024}), flush=True)


if __name__ == "__main__":
    main()
