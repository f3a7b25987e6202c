"""The engine's executor on torch: any device, any model that the decoder expresses. Knows no text and no sampling."""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from llmctl.core.model import Decoder, KVCache


class TorchExecutor:
    """Runs a Decoder over a KVCache that grows on demand. See `Executor` for the contract."""

    def __init__(self, model: Decoder) -> None:
        self._model = model.eval()
        self._cache: KVCache | None = None

    @property
    def vocab_size(self) -> int:
        """Length of a row of logits."""
        return self._model.config.vocab_size

    @property
    def max_positions(self) -> int:
        """The longest text that the model was made for, in tokens."""
        return self._model.config.max_positions

    def reserve(self, *, num_slots: int, capacity: int) -> None:
        """At least that many slots of at least that many tokens. Raises MemoryError."""
        old = self._cache
        if old is not None and old.num_slots >= num_slots and old.capacity >= capacity:
            return
        if old is not None:
            num_slots, capacity = max(num_slots, old.num_slots), max(capacity, old.capacity)
        with memory_errors():
            cache = KVCache(self._model.config, num_slots=num_slots, capacity=capacity, dtype=self._model.dtype, device=self._model.device)
            if old is not None:
                for new_tensor, old_tensor in zip((*cache.keys, *cache.values), (*old.keys, *old.values), strict=True):
                    new_tensor[: old.num_slots, :, : old.capacity] = old_tensor
                cache.lengths[: old.num_slots] = old.lengths
        self._cache = cache

    def release(self) -> None:
        """Forget the cache."""
        self._cache = None
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()  # a cache of another shape may not fit into the pieces

    def step(
        self,
        tokens: NDArray[np.int64],
        positions: NDArray[np.int64],
        slots: NDArray[np.int64],
        *,
        lengths: NDArray[np.int64] | None = None,
        all_logits: bool = False,
    ) -> NDArray[np.float32]:
        """Feed tokens (B, T), give logits (B, V) or (B, T, V) in float32. See `Executor.step`."""
        cache = self._cache
        assert cache is not None, "reserve() comes first"
        batch, num_tokens = tokens.shape
        places = positions[:, None] + np.arange(num_tokens)  # (B, T)
        last = np.full(batch, num_tokens - 1)
        if lengths is not None:
            places = np.where(np.arange(num_tokens) < lengths[:, None], places, -1)  # -1: padding, not stored
            last = lengths - 1
        with torch.inference_mode(), memory_errors():
            hidden = self._model.hidden(
                torch.from_numpy(tokens).to(self._model.device),
                positions=torch.from_numpy(places),
                cache=cache,
                slots=torch.from_numpy(slots),
            )  # (B, T, C)
            if not all_logits:
                hidden = hidden[torch.arange(batch), torch.from_numpy(last)]  # (B, C)
            logits: NDArray[np.float32] = self._model.logits(hidden).float().cpu().numpy()
        return logits

    def copy_slot(self, source: int, *, to: int, length: int) -> None:
        """Copy the first `length` tokens of a slot."""
        cache = self._cache
        assert cache is not None, "reserve() comes first"
        with torch.inference_mode():
            for tensor in (*cache.keys, *cache.values):
                tensor[to, :, :length] = tensor[source, :, :length]


_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""Of the CPU's allocator, twice; of MPS; of CUDA's matrix products, which take their work space by themselves."""


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """Turn the several ways in which torch says that memory is short into MemoryError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MemoryError(str(error)) from error
    except RuntimeError as error:
        if any(words in str(error) for words in _NO_MEMORY):
            raise MemoryError(str(error)) from error
        raise
