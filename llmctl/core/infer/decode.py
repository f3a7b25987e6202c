"""Decoding on a GPU: steps of one token a row, in shapes that repeat, recorded as CUDA graphs. Knows a Decoder and its cache; no text.

A decoding step of a small model is hundreds of short kernels, and starting them from Python takes longer than they run. A CUDA
graph starts all of them at once, but only ever with the shapes and addresses that it was recorded with: so rows are filled up
to a power of two, keys are looked at up to one, and what changes is copied into tensors that stay.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmctl.core.model import Decoder, KVCache

_FEWEST_KEYS = 128


@dataclass(frozen=True)
class _Shape:
    """What a recorded step holds for: rows, keys looked at, and whether the rows are the cache's first slots in order."""

    num_rows: int
    num_keys: int
    in_order: bool


class _Inputs:
    """Tensors on the device that a recorded step reads: token, position and slot of each row, (3, B)."""

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self.all = torch.zeros((3, num_rows), dtype=torch.int64, device=device)
        self.tokens, self.positions, self.slots = self.all


class FixedDecoder:
    """Decodes over one cache, which must not be replaced. With `records`, each shape is recorded once and then replayed.

    Without, the same steps run one kernel after the other, on any device: what is replayed can be tested without a GPU.
    """

    def __init__(self, model: Decoder, cache: KVCache, *, records: bool) -> None:
        self._model, self._cache, self._records = model, cache, records
        self.longest = model.fixed_length(min(cache.capacity, model.config.max_positions))
        """Longest text, in tokens, that `step` goes on with; 0 for a model that it does not suit."""
        # kept here, since a graph reads them at the addresses that they had
        self._tables = model.fixed_tables(self.longest) if self.longest else []
        self._steps: dict[_Shape, tuple[_Inputs, Callable[[], Tensor]]] = {}
        self._pool = torch.cuda.graph_pool_handle() if records else None

    @property
    def num_recorded(self) -> int:
        """How many shapes have come up."""
        return len(self._steps)

    def step(self, tokens: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
        """Logits (B, V), float32, on the device, after `tokens` (B,) at `positions` (B,), below `longest`, of distinct `slots` (B,).

        All three lie on the CPU. What is given back is overwritten by the next step.
        """
        batch = len(tokens)
        num_rows = 1 << (batch - 1).bit_length()
        longest = int(positions.max()) + 1
        num_keys = min(max(_FEWEST_KEYS, 1 << (longest - 1).bit_length()), self._cache.capacity)
        shape = _Shape(num_rows, num_keys, num_rows == batch and slots.tolist() == list(range(batch)))
        rows = torch.stack([tokens, positions, slots])
        if num_rows > batch:  # the first row again: it writes again what it writes
            rows = torch.cat([rows, rows[:, :1].expand(3, num_rows - batch)], dim=1)
        known = self._steps.get(shape)
        inputs = _Inputs(num_rows, self._model.device) if known is None else known[0]
        inputs.all.copy_(rows)
        if known is None:
            known = self._steps[shape] = inputs, self._made(shape, inputs)
        self._cache.lengths[slots] = positions + 1
        return known[1]()[:batch]

    def _made(self, shape: _Shape, inputs: _Inputs) -> Callable[[], Tensor]:
        def run() -> Tensor:
            return self._model.fixed_step(
                inputs.tokens,
                inputs.positions,
                self._cache,
                inputs.slots,
                num_keys=shape.num_keys,
                in_order=shape.in_order,
                tables=self._tables,
            ).float()

        return _recorded(run, self._pool) if self._records else run


def _recorded(run: Callable[[], Tensor], pool: Any) -> Callable[[], Tensor]:
    """`run` as a CUDA graph: what it computes is in the same tensor each time."""
    side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries set themselves up at the first call, which cannot be recorded
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = run()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def suits(model: object) -> bool:
    """Whether a model's decoding can be recorded: our own decoder, without experts, its weights plain tensors."""
    return (
        type(model) is Decoder
        and model.fixed_length(1) > 0
        and all(type(parameter) is torch.nn.Parameter for parameter in model.parameters())
    )
