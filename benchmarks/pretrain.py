"""Training speed on the machine at hand: llmctl, nanoGPT, transformers' Trainer and litgpt, side by side in one run.

    python benchmarks/pretrain.py --nanogpt CHECKOUT [--litgpt PYTHON] [--sides llmctl,trainer,...] [--blocks 5] [--out FILE]

Each side is a process that stays: it builds a GPT-2 of the shape given, warms up, and then trains in blocks of a few
seconds, in turn with the others, `--blocks` times. A side is its own project's training loop: `llmctl` the events of
`llmctl pretrain`, with AdamW as the others have it; `muon` the same with llmctl's default optimizer; `trainer` the
`Trainer` of transformers, and `trainer-bf16` the same in bf16, whatever the others compute in; `nanogpt` and
`nanogpt-compiled` the loop of nanoGPT's train.py around its model; `litgpt` the loop of its pretrain around its model
(`--litgpt` names a Python that has it). `peak` is a large matrix product, in turn too. CHECKOUT is a clone of
github.com/karpathy/nanoGPT. Ids are drawn by Zipf's law, so that the loss of every side falls at once as they learn it.

Printed are the losses of the first steps, which show that all sides train alike, medians of tokens a second and of the
ratios of adjacent blocks to llmctl's, the share of the matmul peak, and the largest resident memory of each process. The
file of `--out` is written anew after each block.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_WARM_UP_STEPS = 5
SIDES = ("llmctl", "muon", "trainer", "trainer-bf16", "nanogpt", "nanogpt-compiled", "litgpt")


def main() -> None:
    """Run the sides in turn and print the table."""
    arguments = _arguments()
    if arguments.worker:
        return _work(arguments.worker, arguments)
    sides = ["peak", *_chosen(arguments)]
    with tempfile.TemporaryDirectory() as folder:
        workers = {name: _Worker(name, arguments, Path(folder)) for name in sides}
        for name, worker in workers.items():  # one after the other, so that none warms up in another's time
            print(f"{name} is ready after {worker.start():.0f} s", flush=True)
        blocks: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
        for number in range(arguments.blocks):
            for name, worker in workers.items():
                blocks[name].append(worker.block())
                done = blocks[name][-1]
                print(
                    f"block {number + 1}  {name:17} {done['per_second']:12,.0f} a second, {done['per_cpu_second']:12,.0f} a CPU second",
                    flush=True,
                )
            lines = report(blocks, arguments)
        for worker in workers.values():
            worker.end()
    print("\n".join(lines))


def report(blocks: dict[str, list[dict[str, Any]]], arguments: argparse.Namespace) -> list[str]:
    """The table in Markdown, line by line; as JSON it goes where that was asked for."""
    speeds = {name: [block["per_second"] for block in found] for name, found in blocks.items()}
    peak = statistics.median(speeds.pop("peak"))
    flops = flops_per_token(arguments)
    lines = [f"\n{_shape_words(arguments)}; {flops / 1e6:.1f} MFLOP a token; matmul peak {peak / 1e9:.0f} GFLOP/s", ""]
    lines += ["| | tokens/s, median (range) | share of peak | llmctl is, median of pairs (range) | peak memory | first losses |"]
    lines += ["|---|---|---|---|---|---|"]
    rows = {}
    for name, found in speeds.items():
        median = statistics.median(found)
        ratios = [ours / theirs for ours, theirs in zip(speeds["llmctl"], found, strict=True)] if "llmctl" in speeds else [float("nan")]
        rows[name] = {
            "tokens_per_second": found,
            "share_of_peak": median * flops / peak,
            "tokens_per_cpu_second": [block["per_cpu_second"] for block in blocks[name]],
            "ratio_of_medians": statistics.median(speeds.get("llmctl", found)) / median,
            "ratios": ratios,
            "peak_rss_bytes": blocks[name][-1]["peak_rss_bytes"],
            "losses": blocks[name][-1]["losses"],
        }
        losses = " ".join(f"{loss:.2f}" for loss in blocks[name][-1]["losses"])
        lines.append(
            f"| {name} | {median:,.0f} ({min(found):,.0f} to {max(found):,.0f}) | {median * flops / peak:.0%}"
            f" | {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) times"
            f" | {blocks[name][-1]['peak_rss_bytes'] / 1e6:,.0f} MB | {losses} |"
        )
    if arguments.out is not None:
        facts = {"shape": _shape_words(arguments), "flops_per_token": flops, "matmul_peak_flops": peak, "cpus": os.cpu_count()}
        arguments.out.write_text(json.dumps({**facts, "sides": rows}, indent=2) + "\n")
    return lines


def flops_per_token(shape: argparse.Namespace) -> float:
    """Forward and backward, as PaLM counts them but with the causal half of attention only."""
    matrices = shape.layers * 12 * shape.width**2 + shape.vocab * shape.width
    return 6.0 * matrices + 12.0 * shape.layers * shape.width * (shape.context + 1) / 2


def _shape_words(shape: argparse.Namespace) -> str:
    return (
        f"GPT-2 of {shape.layers} layers, {shape.width} wide, context {shape.context}, vocabulary {shape.vocab}, batch {shape.batch},"
        f" {shape.dtype}, {shape.threads} threads"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Training speed: llmctl against its peers.")
    parser.add_argument("--nanogpt", type=Path, help="clone of github.com/karpathy/nanoGPT")
    parser.add_argument("--litgpt", type=Path, help="a Python in whose environment litgpt is installed")
    parser.add_argument("--sides", help=f"comma-separated, of {', '.join(SIDES)}; all that can run, without compiling, when not given")
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--block-s", type=float, default=8.0, help="seconds of one block, to the end of the step under way")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", choices=("auto", "f32", "bf16"), default="auto", help="auto: as llmctl chooses here")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="also write the results here, as JSON")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.dtype == "auto":
        import torch

        from llmctl.core.model.device import multiplies_in_bf16

        arguments.dtype = "bf16" if multiplies_in_bf16(torch.device("cpu")) else "f32"
    return arguments


def _chosen(arguments: argparse.Namespace) -> list[str]:
    if arguments.sides:
        chosen = arguments.sides.split(",")
        if unknown := set(chosen) - set(SIDES):
            raise SystemExit(f"--sides: {', '.join(sorted(unknown))} is none of {', '.join(SIDES)}")
        return list(chosen)
    return (
        ["llmctl", "muon", "trainer"]
        + ["trainer-bf16"] * (arguments.dtype != "bf16")
        + ["nanogpt"] * (arguments.nanogpt is not None)
        + ["litgpt"] * (arguments.litgpt is not None)
    )


class _Worker:
    """A side in a process of its own, which waits between its blocks."""

    def __init__(self, name: str, arguments: argparse.Namespace, folder: Path) -> None:
        python = str(arguments.litgpt) if name == "litgpt" else sys.executable
        command = [python, __file__, "--worker", name, "--folder", str(folder / name)]
        for option in ("layers", "width", "context", "vocab", "batch", "dtype", "threads", "block_s", "nanogpt"):
            value = getattr(arguments, option)
            command += [f"--{option.replace('_', '-')}", str(value)] if value is not None else []
        self._command, self._folder = command, folder / name

    def start(self) -> float:
        """Seconds until it is warm."""
        self._folder.mkdir()
        started = time.perf_counter()
        with open(self._folder / "stderr", "wb") as errors:
            self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True)
        self._answer()
        return time.perf_counter() - started

    def block(self) -> dict[str, Any]:
        """One block."""
        self._tell("go")
        return dict(self._answer())

    def end(self) -> None:
        """Wait for its end."""
        self._tell("end")
        self._process.wait()

    def _tell(self, word: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("@"):  # what a library prints by itself is passed over
                answer: dict[str, Any] = json.loads(line[1:])
                return answer
        raise SystemExit(f"{self._command[3]} ended: {(self._folder / 'stderr').read_text()[-2000:]}")


class _Clock:
    """In a worker: counts steps, and waits at the end of each block to be told to go on."""

    def __init__(self, per_step: float, block_s: float) -> None:
        self._per_step, self._block_s, self._warm_up = per_step, block_s, _WARM_UP_STEPS
        self._started, self._started_cpu, self._steps = 0.0, 0.0, 0
        self._losses: list[float] = []

    def saw(self, loss: float) -> None:
        """Call with the losses of the first steps, in their order."""
        if len(self._losses) < _WARM_UP_STEPS:
            self._losses.append(loss)

    def step(self) -> bool:
        """Call after each step; False when that was the last."""
        if self._warm_up > 1:
            self._warm_up -= 1
            return True
        if self._warm_up == 1:
            self._warm_up = 0
            print("@{}", flush=True)
            return self._wait()
        self._steps += 1
        elapsed = time.perf_counter() - self._started
        if elapsed < self._block_s:
            return True
        done = self._steps * self._per_step
        block = {"per_second": done / elapsed, "per_cpu_second": done / (time.process_time() - self._started_cpu)}
        print("@" + json.dumps({**block, "peak_rss_bytes": _peak_rss_bytes(), "losses": self._losses}), flush=True)
        return self._wait()

    def _wait(self) -> bool:
        go_on = sys.stdin.readline().strip() == "go"
        self._started, self._started_cpu, self._steps = time.perf_counter(), time.process_time(), 0
        return go_on


def _peak_rss_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmHWM in /proc/self/status")


def _work(name: str, shape: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(shape.threads)
    clock = _Clock(2.0 * 1024**3 if name == "peak" else shape.batch * shape.context, shape.block_s)
    sides: dict[str, Callable[[argparse.Namespace, _Clock], None]] = {
        "peak": _peak,
        "llmctl": lambda s, c: _llmctl(s, c, "adamw"),
        "muon": lambda s, c: _llmctl(s, c, "muon"),
        "trainer": lambda s, c: _trainer(s, c, bf16=s.dtype == "bf16"),
        "trainer-bf16": lambda s, c: _trainer(s, c, bf16=True),
        "nanogpt": lambda s, c: _nanogpt(s, c, compiled=False),
        "nanogpt-compiled": lambda s, c: _nanogpt(s, c, compiled=True),
        "litgpt": _litgpt,
    }
    sides[name](shape, clock)
    sys.stdout.flush()
    os._exit(0)  # no side's tidying up concerns anybody


def _dtype(shape: argparse.Namespace) -> Any:
    import torch

    return torch.bfloat16 if shape.dtype == "bf16" else torch.float32


def _peak(shape: argparse.Namespace, clock: _Clock) -> None:
    import torch

    a = torch.ones(1024, 1024, dtype=_dtype(shape))
    out = torch.empty_like(a)
    while True:
        torch.mm(a, a, out=out)
        if not clock.step():
            return


def _llmctl(shape: argparse.Namespace, clock: _Clock, optimizer: str) -> None:
    from llmctl.core.config.pretrain import PretrainConfig
    from llmctl.core.train.events import StepDone
    from llmctl.core.train.pretrain import train

    data, config_json = shape.folder / "data", shape.folder / "config.json"
    _pack(data, shape)
    config_json.write_text(json.dumps(_gpt2_config(shape)))
    config = PretrainConfig(
        data=data,
        out_dir=shape.folder / "run",
        model_config=config_json,
        seq_len=shape.context,
        batch_size=shape.batch,
        micro_batch_size=shape.batch,
        max_steps=1_000_000,
        optimizer=optimizer,
        learning_rate=1e-3,
        warmup_steps=0,
        dtype=shape.dtype,
        threads=shape.threads,
        device="cpu",
        save_every=0,
        eval_every=0,
        sample_every=0,
    )
    for event in train(config):
        if isinstance(event, StepDone):
            clock.saw(event.loss)
            if not clock.step():
                return


def _gpt2_config(shape: argparse.Namespace) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": shape.vocab,
        "n_positions": shape.context,
        "n_embd": shape.width,
        "n_layer": shape.layers,
        "n_head": shape.width // 64,
        "activation_function": "gelu_new",
        "tie_word_embeddings": True,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


def _random_ids(shape: argparse.Namespace) -> Any:
    import numpy as np

    shares = np.cumsum(1.0 / np.arange(1, shape.vocab + 1))
    ids = np.searchsorted(shares, np.random.default_rng(0).random(2_000_000) * shares[-1], side="right")
    return ids.astype(np.uint16 if shape.vocab <= 1 << 16 else np.uint32)


def _pack(folder: Path, shape: argparse.Namespace) -> None:
    """A packed folder of random ids, with a tokenizer of as many words."""
    import tokenizers
    from tokenizers import models, pre_tokenizers

    from llmctl.core.data.shards import MANIFEST_KIND, TOKENIZER_DIR, ShardWriter, id_dtype, shard_name
    from llmctl.core.files import write_manifest
    from llmctl.core.tokenizer import Tokenizer

    backend = tokenizers.Tokenizer(models.WordLevel({f"w{i}": i for i in range(shape.vocab)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = Tokenizer.from_parts(backend, bos=None, eos="w0", pad=None, chat_template=None, model_max_length=None)
    folder.mkdir(parents=True)
    (folder / TOKENIZER_DIR).mkdir()
    tokenizer.save(folder / TOKENIZER_DIR)
    ids = _random_ids(shape)
    writer = ShardWriter(folder / shard_name("train", 0), vocab_size=shape.vocab, fingerprint=tokenizer.fingerprint)
    writer.write(ids.astype("int64"))
    writer.end_document()
    info = writer.finish()
    split = {"num_tokens": info.num_tokens, "num_documents": info.num_documents, "num_bytes": info.num_tokens, "shards": [info.name]}
    facts = {"kind": MANIFEST_KIND, "dtype": id_dtype(shape.vocab).name, "vocab_size": shape.vocab, "splits": {"train": split}}
    write_manifest(folder, extra={**facts, "tokenizer_fingerprint": tokenizer.fingerprint})


def _trainer(shape: argparse.Namespace, clock: _Clock, *, bf16: bool) -> None:
    import torch
    import transformers

    ids = torch.from_numpy(_random_ids(shape).astype("int64"))

    class Windows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(ids) // shape.context

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            window = ids[index * shape.context : (index + 1) * shape.context]
            return {"input_ids": window, "labels": window}

    class Told(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
            control.should_log |= state.global_step <= _WARM_UP_STEPS
            control.should_training_stop = not clock.step()
            return control

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs:
                clock.saw(float(logs["loss"]))

    options = transformers.TrainingArguments(
        output_dir=str(shape.folder / "trainer"),
        use_cpu=True,
        bf16=bf16,
        per_device_train_batch_size=shape.batch,
        max_steps=1_000_000,
        learning_rate=1e-3,
        weight_decay=0.1,
        adam_beta2=0.95,
        lr_scheduler_type="constant",
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**_gpt2_config(shape)))
    transformers.Trainer(model=model, args=options, train_dataset=Windows(), callbacks=[Told()]).train()


def _nanogpt(shape: argparse.Namespace, clock: _Clock, *, compiled: bool) -> None:
    """The loop of its train.py on a CPU: no autocast, clipping at 1, AdamW as it configures it."""
    import torch

    sys.path.insert(0, str(shape.nanogpt))
    from model import GPT, GPTConfig  # type: ignore[import-not-found]

    facts = {"n_layer": shape.layers, "n_head": shape.width // 64, "n_embd": shape.width}
    raw = GPT(GPTConfig(block_size=shape.context, vocab_size=shape.vocab, dropout=0.0, bias=True, **facts))
    optimizer = raw.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    model = torch.compile(raw) if compiled else raw
    batches = _windows(shape)
    tokens, targets = next(batches)
    while True:
        _, loss = model(tokens, targets)
        tokens, targets = next(batches)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(raw.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.saw(loss.item())
        if not clock.step():
            return


def _windows(shape: argparse.Namespace) -> Iterator[tuple[Any, Any]]:
    """Random windows, as nanoGPT's get_batch cuts them."""
    import torch

    ids = torch.from_numpy(_random_ids(shape).astype("int64"))
    while True:
        starts = torch.randint(len(ids) - shape.context, (shape.batch,)).tolist()
        tokens = torch.stack([ids[i : i + shape.context] for i in starts])
        yield tokens, torch.stack([ids[i + 1 : i + 1 + shape.context] for i in starts])


def _litgpt(shape: argparse.Namespace, clock: _Clock) -> None:
    """The loop of its pretrain.py through Fabric: a GPT-2-like shape as it has it (Pythia's), chunked cross-entropy, fused AdamW."""
    import lightning as L  # type: ignore[import-not-found]
    import torch
    from litgpt.config import Config  # type: ignore[import-not-found]
    from litgpt.model import GPT  # type: ignore[import-not-found]
    from litgpt.pretrain import initialize_weights  # type: ignore[import-not-found]
    from litgpt.utils import chunked_cross_entropy  # type: ignore[import-not-found]

    fabric = L.Fabric(devices=1, accelerator="cpu", precision="bf16-mixed" if shape.dtype == "bf16" else "32-true")
    config = Config(
        block_size=shape.context,
        n_layer=shape.layers,
        n_head=shape.width // 64,
        n_embd=shape.width,
        vocab_size=shape.vocab,
        padded_vocab_size=shape.vocab,
        rotary_percentage=0.25,
        parallel_residual=False,
    )
    raw = GPT(config)
    initialize_weights(fabric, raw, n_layer=shape.layers, n_embd=shape.width)
    raw.lm_head.weight = raw.transformer.wte.weight  # as its pretrain does with --train.tie_embeddings
    model = fabric.setup(raw)
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95), fused=True))
    for tokens, targets in _windows(shape):
        loss = chunked_cross_entropy(model(tokens), targets)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.saw(loss.item())
        if not clock.step():
            return


if __name__ == "__main__":
    main()
