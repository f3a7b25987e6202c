"""Causal attention in training on a CPU: our explicit form against scaled_dot_product_attention, forward and backward.

    python benchmarks/attention.py [--rounds 6] [--dtype f32|bf16]

The two alternate in one process; the ratio is that of the medians.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from llmctl.core.model.causal import causal_attention
from llmctl.core.train.machine import keep_freed_memory

SHAPES = [
    ((64, 4, 64, 32), None),
    ((16, 4, 256, 64), None),
    ((16, 6, 256, 64), None),
    ((8, 4, 512, 64), None),
    ((4, 4, 1024, 64), None),
    ((2, 4, 1024, 64), 128),
    ((2, 4, 1024, 64), 512),
    ((1, 4, 2048, 64), 256),
]
"""Rows, heads, tokens, head size; and the window, with which SDPA computes the whole square under a mask."""


def seconds(attend: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: list[Tensor], gradient: Tensor) -> float:
    """Wall time of one forward and backward."""
    started = time.perf_counter()
    attend(*inputs).backward(gradient)
    elapsed = time.perf_counter() - started
    for tensor in inputs:
        tensor.grad = None
    return elapsed


def main() -> None:
    """Print a line a shape."""
    parser = argparse.ArgumentParser(description="Causal attention in training: ours against SDPA.")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--dtype", choices=("f32", "bf16"), default="f32")
    arguments = parser.parse_args()
    dtype = torch.float32 if arguments.dtype == "f32" else torch.bfloat16
    keep_freed_memory()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.dtype}, medians of {arguments.rounds} rounds")
    for shape, window in SHAPES:
        places = torch.arange(shape[2])
        seen = (places[None] <= places[:, None]) & (places[None] > places[:, None] - (window or shape[2]))
        mask = None if window is None else seen
        inputs = [torch.randn(shape).to(dtype).requires_grad_() for _ in range(3)]
        gradient = torch.randn(shape).to(dtype)
        sides: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
            "sdpa": lambda q, k, v, m=mask: F.scaled_dot_product_attention(q, k, v, attn_mask=m, is_causal=m is None),
            "ours": lambda q, k, v, w=window: causal_attention(q, k, v, scale=q.shape[-1] ** -0.5, window=w),
        }
        times: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(arguments.rounds + 1):
            for name, attend in sides.items():
                elapsed = seconds(attend, inputs, gradient)
                if number:  # the first warms up
                    times[name].append(elapsed)
        sdpa, ours = (statistics.median(times[name]) * 1e3 for name in ("sdpa", "ours"))
        limit = "" if window is None else f"window {window}"
        print(f"{shape!s:18} {limit:10}  SDPA {sdpa:7.2f} ms   ours {ours:7.2f} ms   {sdpa / ours:.2f} times")


if __name__ == "__main__":
    main()
