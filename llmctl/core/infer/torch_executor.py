"""The engine's executor on torch: any device, any model that the decoder expresses. Knows no text and no sampling."""

import contextlib
from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from llmctl.core.infer.decode import FixedDecoder, suits
from llmctl.core.model import Decoder, KVCache

DecodeKind = Literal["eager", "fixed", "recorded"]
"""Steps in the shapes of their rows; in shapes that repeat (see decode.py); these as CUDA graphs."""


class TorchExecutor:
    """Runs a Decoder over a KVCache that grows on demand. See `Executor` for the contract.

    `decode` says how steps of one token a row run; None is "recorded" where that is possible.
    """

    def __init__(self, model: Decoder, *, decode: DecodeKind | None = None) -> None:
        self._model = model.eval()
        self._cache: KVCache | None = None
        if decode is None:
            decode = "recorded" if model.device.type == "cuda" and suits(model) else "eager"
        self.decode: DecodeKind = decode
        self._fixed: FixedDecoder | None = None

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
        self._fixed = None  # what was recorded reads the cache that is gone

    def release(self) -> None:
        """Forget the cache."""
        self._cache = self._fixed = None
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
        if num_tokens == 1 and self.decode != "eager":
            fixed = self._decode_step(tokens[:, 0], positions, slots)
            if fixed is not None:
                return fixed[:, None] if all_logits else fixed
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

    def _decode_step(self, tokens: NDArray[np.int64], positions: NDArray[np.int64], slots: NDArray[np.int64]) -> NDArray[np.float32] | None:
        """Logits (B, V) of one token a row in shapes that repeat, or None where that cannot be."""
        assert self._cache is not None
        with torch.inference_mode(), memory_errors():
            if self._fixed is None:
                self._fixed = FixedDecoder(self._model, self._cache, records=self.decode == "recorded")
            if int(positions.max()) >= self._fixed.longest:
                return None
            logits: NDArray[np.float32] = (
                self._fixed.step(torch.from_numpy(tokens), torch.from_numpy(positions), torch.from_numpy(slots)).cpu().numpy()
            )
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
