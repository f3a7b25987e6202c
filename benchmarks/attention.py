"""Causal attention in training on a CPU: our forms against scaled_dot_product_attention, forward and backward.

    python benchmarks/attention.py [--rounds 6] [--dtype f32|bf16] [--cpu-time]

SDPA, the explicit form (core/model/causal.py) and the native one (core/model/causal_native.py, float32 where it was built)
alternate in one process; a ratio is the median of those of the rounds.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from llmctl.core.model.causal import causal_attention
from llmctl.core.model.causal_native import can_run, native_attention
from llmctl.core.train.machine import keep_freed_memory

SHAPES = [
    ((64, 4, 64, 32), None),
    ((16, 4, 128, 64), None),
    ((16, 4, 256, 64), None),
    ((16, 6, 256, 64), None),
    ((8, 4, 512, 64), None),
    ((4, 4, 1024, 64), None),
    ((2, 4, 1024, 64), 128),
    ((2, 4, 1024, 64), 512),
    ((1, 4, 2048, 64), 256),
]
"""Rows, heads, tokens, head size; and the window, with which SDPA computes the whole square under a mask."""


def seconds(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: list[Tensor], gradient: Tensor, clock: Callable[[], float]
) -> float:
    """Time of one forward and backward by `clock`."""
    started = clock()
    attend(*inputs).backward(gradient)
    elapsed = clock() - started
    for tensor in inputs:
        tensor.grad = None
    return elapsed


def main() -> None:
    """Print a line a shape."""
    parser = argparse.ArgumentParser(description="Causal attention in training: ours against SDPA.")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--dtype", choices=("f32", "bf16"), default="f32")
    parser.add_argument("--cpu-time", action="store_true", help="of the process, for a machine that others use too")
    arguments = parser.parse_args()
    dtype = torch.float32 if arguments.dtype == "f32" else torch.bfloat16
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    keep_freed_memory()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.dtype}, medians of {arguments.rounds} rounds\n")
    print("| rows, heads, tokens, head size | window | SDPA | explicit | times faster | native | times faster |")
    print("|---|---|---|---|---|---|---|")
    for shape, window in SHAPES:
        places = torch.arange(shape[2])
        seen = (places[None] <= places[:, None]) & (places[None] > places[:, None] - (window or shape[2]))
        mask = None if window is None else seen
        rows, heads, num_tokens, size = shape
        # in the layout of the decoder's projections
        tensors = [torch.randn(rows, num_tokens, heads, size).to(dtype).transpose(1, 2) for _ in range(4)]
        inputs, gradient = [t.requires_grad_() for t in tensors[:3]], tensors[3]
        sides: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
            "sdpa": lambda q, k, v, m=mask: F.scaled_dot_product_attention(q, k, v, attn_mask=m, is_causal=m is None),
            "explicit": lambda q, k, v, w=window: causal_attention(q, k, v, scale=q.shape[-1] ** -0.5, window=w),
        }
        if can_run(inputs[0], inputs[2]):
            sides["native"] = lambda q, k, v, w=window: native_attention(q, k, v, scale=q.shape[-1] ** -0.5, window=w)
        times: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(arguments.rounds + 1):
            for name, attend in sides.items():
                elapsed = seconds(attend, inputs, gradient, clock)
                if number:  # the first warms up
                    times[name].append(elapsed)
        cells = [f"{statistics.median(times['sdpa']) * 1e3:.1f} ms"]
        for name in ("explicit", "native"):
            if name not in times:
                cells += ["", ""]
                continue
            ratios = [theirs / ours for theirs, ours in zip(times["sdpa"], times[name], strict=True)]
            cells += [
                f"{statistics.median(times[name]) * 1e3:.1f} ms",
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
            ]
        print(f"| {', '.join(map(str, shape))} | {window or ''} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
