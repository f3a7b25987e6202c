"""One engine in a process of its own, for benchmarks/generate.py: reads a JSON command a line, answers with a JSON line.

    python generate_workers.py ENGINE MODEL THREADS FORMAT [TEXT]

ENGINE is a key of ENGINES, or bandwidth. Only the engine's own packages are imported, since each has its own environment. A command
is {"prompts": [ids, ...], "num_new": N}: greedy, to N tokens whatever they are; the answer holds the texts' ids, the seconds that
prompts and that the tokens after the first ones took, and the peak of memory. With TEXT the engine gives one token, and ends.
"""

import ctypes
import importlib
import importlib.metadata
import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BATCH, CAPACITY = 8, 1024
Ran = tuple[list[list[int]], float, float]  # texts, seconds for the prompts, seconds for the tokens after the first ones


class Slots:
    """Texts in slots of their own; a free slot takes the next."""

    def prefill(self, ids: Sequence[int], slot: int) -> int:
        """A prompt into an empty slot; its next token."""
        raise NotImplementedError

    def decode(self, tokens: Sequence[int], slots: Sequence[int], positions: Sequence[int]) -> list[int]:
        """One more token in each of the slots; what follows them."""
        raise NotImplementedError

    def run(self, prompts: list[list[int]], num_new: int) -> Ran:
        """All of them, eight at a time."""
        waiting, texts = list(range(len(prompts))), [[] for _ in prompts]
        under_way: dict[int, int] = {}  # slot -> number of the text
        prompt_s = decode_s = 0.0
        while waiting or under_way:
            start = time.perf_counter()
            for slot in range(BATCH):
                if slot not in under_way and waiting:
                    under_way[slot] = waiting.pop(0)
                    texts[under_way[slot]].append(self.prefill(prompts[under_way[slot]], slot))
            under_way = {slot: number for slot, number in under_way.items() if len(texts[number]) < num_new}
            prompt_s += time.perf_counter() - start
            start = time.perf_counter()
            if under_way:
                numbers = list(under_way.values())
                positions = [len(prompts[number]) + len(texts[number]) - 1 for number in numbers]
                for number, token in zip(
                    numbers, self.decode([texts[number][-1] for number in numbers], list(under_way), positions), strict=True
                ):
                    texts[number].append(token)
            under_way = {slot: number for slot, number in under_way.items() if len(texts[number]) < num_new}
            decode_s += time.perf_counter() - start
        return texts, prompt_s, decode_s


class Llmctl(Slots):
    """The native executor, without the engine around it, as the peers are called without theirs."""

    def __init__(self, model: str, threads: int, number_format: str, slots: int, capacity: int) -> None:
        import numpy as np

        from llmctl.core.infer.opening import open_model

        quant: Any = number_format if number_format.startswith("int") else None
        opened = open_model(
            Path(model), device="cpu", dtype=None if quant else number_format, quant=quant, threads=threads, executor="native"
        )
        self._executor, self._np = opened.executor, np
        self.version = opened.description
        self._executor.reserve(num_slots=slots, capacity=capacity)

    def prefill(self, ids: Sequence[int], slot: int) -> int:
        """See Slots."""
        np = self._np
        return int(self._executor.step(np.array([ids]), np.array([0]), np.array([slot])).argmax())

    def decode(self, tokens: Sequence[int], slots: Sequence[int], positions: Sequence[int]) -> list[int]:
        """See Slots."""
        np = self._np
        logits = self._executor.step(np.array(tokens)[:, None], np.array(positions), np.array(slots))
        return [int(token) for token in logits.argmax(axis=1)]


class LlamaCpp(Slots):
    """llama.cpp's C interface through llama-cpp-python; one sequence a slot."""

    def __init__(self, model: str, threads: int, _: str, slots: int, capacity: int) -> None:
        import numpy as np

        llama_cpp: Any = importlib.import_module("llama_cpp")
        self._lib, self._np, self.version = llama_cpp, np, f"llama-cpp-python {llama_cpp.__version__}"
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch, options.n_seq_max = slots * capacity, 512, 512, slots
        options.n_threads = options.n_threads_batch = threads
        self._model = llama_cpp.llama_model_load_from_file(os.fsencode(model), llama_cpp.llama_model_default_params())
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {model}")
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(self._vocab)
        self._batch = llama_cpp.llama_batch_init(512, 0, 1)

    def encode(self, text: str) -> list[int]:
        """Token ids."""
        data = text.encode()
        ids = (ctypes.c_int32 * (len(data) + 8))()
        return list(ids[: self._lib.llama_tokenize(self._vocab, data, len(data), ids, len(ids), True, True)])

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
                logits = np.ctypeslib.as_array(lib.llama_get_logits_ith(self._context, i), (self._vocab_size,))
                found.append(int(logits.argmax()))
        return found

    def prefill(self, ids: Sequence[int], slot: int) -> int:
        """See Slots."""
        self._lib.llama_memory_seq_rm(self._lib.llama_get_memory(self._context), slot, -1, -1)
        return self._run([(token, i, slot, i == len(ids) - 1) for i, token in enumerate(ids)])[0]

    def decode(self, tokens: Sequence[int], slots: Sequence[int], positions: Sequence[int]) -> list[int]:
        """See Slots."""
        return self._run([(token, at, slot, True) for token, slot, at in zip(tokens, slots, positions, strict=True)])


class Transformers:
    """transformers' eager model with its dynamic cache, in batches of eight padded on the left."""

    def __init__(self, model: str, threads: int, number_format: str, slots: int, capacity: int) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        self._torch, self._library, self._path = torch, transformers, model
        self._model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, number_format))
        self.version = f"transformers {transformers.__version__}, torch {torch.__version__}"

    def encode(self, text: str) -> list[int]:
        """Token ids."""
        ids: list[int] = self._library.AutoTokenizer.from_pretrained(self._path)(text)["input_ids"]
        return ids

    def run(self, prompts: list[list[int]], num_new: int) -> Ran:
        """See Slots."""
        torch, texts, prompt_s, decode_s = self._torch, [], 0.0, 0.0
        for i in range(0, len(prompts), BATCH):
            batch = prompts[i : i + BATCH]
            longest = max(map(len, batch))
            ids = torch.tensor([[0] * (longest - len(row)) + row for row in batch])
            mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in batch])
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            padded = not bool(mask.all())
            cache, found = self._library.DynamicCache(), []
            for number in range(num_new):
                start = time.perf_counter()
                with torch.inference_mode():
                    output = self._model(
                        ids, attention_mask=mask if padded else None, position_ids=positions, past_key_values=cache, logits_to_keep=1
                    )
                ids = output.logits[:, -1].argmax(-1, keepdim=True)
                found.append(ids)
                mask, positions = torch.nn.functional.pad(mask, (0, 1), value=1), positions[:, -1:] + 1
                if number:
                    decode_s += time.perf_counter() - start
                else:
                    prompt_s += time.perf_counter() - start
            texts += torch.cat(found, 1).tolist()
        return texts, prompt_s, decode_s


class OpenVino:
    """OpenVINO GenAI's pipeline; one prompt. Its two ways of attention are called by their names, PA (its default) and SDPA."""

    backend = "PA"

    def __init__(self, model: str, threads: int, _: str, slots: int, capacity: int) -> None:
        import numpy as np

        self._np, self._ov, self._genai = np, importlib.import_module("openvino"), importlib.import_module("openvino_genai")
        self._pipeline = self._genai.LLMPipeline(model, "CPU", ATTENTION_BACKEND=self.backend, INFERENCE_NUM_THREADS=threads)
        self.version = f"openvino-genai {self._genai.__version__}"

    def run(self, prompts: list[list[int]], num_new: int) -> Ran:
        """See Slots."""
        config = self._genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = num_new, True, False
        start = time.perf_counter()
        found = self._pipeline.generate(self._ov.Tensor(self._np.array(prompts, dtype=self._np.int64)), config)
        elapsed_s, first_s = time.perf_counter() - start, found.perf_metrics.get_ttft().mean / 1000
        return [list(map(int, text)) for text in found.tokens], first_s, elapsed_s - first_s


class OpenVinoSdpa(OpenVino):
    """The same with attention by SDPA over a cache of one piece."""

    backend = "SDPA"


class OnnxGenai:
    """onnxruntime-genai's generator; one prompt."""

    def __init__(self, model: str, threads: int, _: str, slots: int, capacity: int) -> None:
        self._genai: Any = importlib.import_module("onnxruntime_genai")
        config = self._genai.Config(model)
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self._model = self._genai.Model(config)
        self.version = f"onnxruntime-genai {self._genai.__version__}"

    def run(self, prompts: list[list[int]], num_new: int) -> Ran:
        """See Slots."""
        (ids,) = prompts
        options = self._genai.GeneratorParams(self._model)
        options.set_search_options(max_length=len(ids) + num_new, min_length=len(ids) + num_new, do_sample=False)
        start = time.perf_counter()
        generator = self._genai.Generator(self._model, options)
        generator.append_tokens(ids)
        generator.generate_next_token()
        first_s = time.perf_counter() - start
        for _ in range(num_new - 1):
            generator.generate_next_token()
        elapsed_s = time.perf_counter() - start
        return [list(map(int, generator.get_sequence(0)[len(ids) :]))], first_s, elapsed_s - first_s


class CTranslate2:
    """CTranslate2's generator; one prompt."""

    def __init__(self, model: str, threads: int, number_format: str, slots: int, capacity: int) -> None:
        library: Any = importlib.import_module("ctranslate2")
        self._generator = library.Generator(model, compute_type=number_format, intra_threads=threads)
        self._words = json.loads(Path(model, "vocabulary.json").read_text())
        self.version = f"ctranslate2 {library.__version__}"

    def run(self, prompts: list[list[int]], num_new: int) -> Ran:
        """See Slots."""
        stamps = []
        words = [[self._words[token] for token in ids] for ids in prompts]
        start = time.perf_counter()
        found = self._generator.generate_batch(
            words,
            include_prompt_in_result=False,
            max_length=num_new,
            min_length=num_new,
            sampling_topk=1,
            callback=lambda _: bool(stamps.append(time.perf_counter())),
        )
        elapsed_s, first_s = time.perf_counter() - start, stamps[0] - start
        return [list(text.sequences_ids[0]) for text in found], first_s, elapsed_s - first_s


ENGINES: dict[str, Any] = {
    "llmctl": Llmctl,
    "llama.cpp": LlamaCpp,
    "transformers": Transformers,
    "openvino": OpenVino,
    "openvino-sdpa": OpenVinoSdpa,
    "onnxruntime-genai": OnnxGenai,
    "ctranslate2": CTranslate2,
}


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


def peak_mib() -> float:
    """The most memory that this process has held; not its parent's, which getrusage counts in."""
    return next(int(line.split()[1]) / 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))


def main() -> None:
    """Answer until stdin ends."""
    kind, model, threads, number_format = sys.argv[1:5]
    if kind == "bandwidth":
        for _ in sys.stdin:
            print(json.dumps({"bytes_per_second": read_memory(int(threads))}), flush=True)
        return
    if sys.argv[5:]:
        engine = ENGINES[kind](model, int(threads), number_format, 1, 256)
        print(engine.run([engine.encode(sys.argv[5])], 1)[0], flush=True)
        return
    engine = ENGINES[kind](model, int(threads), number_format, BATCH, CAPACITY)
    print(json.dumps({"version": engine.version}), flush=True)
    for line in sys.stdin:
        texts, prompt_s, decode_s = engine.run(**json.loads(line))
        print(json.dumps({"texts": texts, "prompt_s": prompt_s, "decode_s": decode_s, "peak_mib": peak_mib()}), flush=True)


if __name__ == "__main__":
    main()
