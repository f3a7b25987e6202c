"""Weights that stay quantised in memory, as a tensor type: the readable oracle of quantised models. Knows layouts of core/quant.

The decoder is the same one: where it multiplies by such a weight or looks rows up in it, the numbers of a block of rows are
made, used and forgotten. Anything else that is done with the weight sees its numbers, all of them, as an ordinary tensor.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmctl.core.quant import GROUP, Layout, QuantMatrix

_BLOCK_ROWS = 4096


class QuantWeight(Tensor):
    """A matrix (R, C) of nominal `dtype`, in which it is computed with, held as codes, scales and (int4) minimums.

    Made by `of`. Arithmetic from code to number is in float32, as `quant.dequantise` has it, bit for bit.
    """

    codes: Tensor
    scales: Tensor
    minimums: Tensor | None

    @staticmethod
    def __new__(
        cls: type["QuantWeight"], codes: Tensor, scales: Tensor, minimums: Tensor | None, num_columns: int, dtype: torch.dtype
    ) -> "QuantWeight":
        made: QuantWeight = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]  # how torch makes tensors without memory
            cls, (len(codes), num_columns), dtype=dtype, device=codes.device, requires_grad=False
        )
        made.codes, made.scales, made.minimums = codes, scales, minimums
        return made

    @classmethod
    def of(cls, matrix: QuantMatrix, *, dtype: torch.dtype) -> "QuantWeight":
        """The weight that shares the memory of `matrix`."""
        minimums = None if matrix.minimums is None else torch.from_numpy(matrix.minimums)
        return cls(torch.from_numpy(matrix.codes), torch.from_numpy(matrix.scales), minimums, matrix.num_columns, dtype)

    @property
    def layout_name(self) -> Layout:
        """Which layout it has. (`layout` is a property of every tensor.)"""
        return "int8" if self.codes.dtype == torch.int8 else "int4"

    def matrix(self) -> QuantMatrix:
        """The same as numpy arrays."""
        minimums = None if self.minimums is None else self.minimums.cpu().numpy()
        return QuantMatrix(self.layout_name, self.codes.cpu().numpy(), self.scales.cpu().numpy(), minimums, self.shape[1])

    def numbers(self, rows: slice | Tensor = slice(None)) -> Tensor:
        """The numbers of some rows, (rows, C), in the nominal dtype."""
        codes, scales = self.codes[rows], self.scales[rows].float()
        if self.minimums is not None:
            halves = codes.view(len(codes), -1, GROUP // 2)
            codes = torch.cat([halves & 15, halves >> 4], dim=2)  # (rows, G, 32)
        wide = codes.view(len(codes), -1, GROUP).float() * scales[:, :, None]
        if self.minimums is not None:
            wide += self.minimums[rows].float()[:, :, None]
        return wide.view(len(codes), -1)[:, : self.shape[1]].to(self.dtype)

    def with_parts(self, change: Callable[[Tensor], Tensor], *, dtype: torch.dtype) -> "QuantWeight":
        """The same with its parts changed, moved for instance."""
        minimums = None if self.minimums is None else change(self.minimums)
        return QuantWeight(change(self.codes), change(self.scales), minimums, self.shape[1], dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"QuantWeight({self.layout_name}, shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and isinstance(_argument(1, "weight", args, kwargs), QuantWeight):
            return _linear(*args, **kwargs)
        if func is F.embedding and isinstance(_argument(1, "weight", args, kwargs), QuantWeight):
            return _embedding(_argument(0, "input", args, kwargs), _argument(1, "weight", args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():  # results are what dispatch makes of them, not QuantWeights by rule
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own stub has it as an instance's method
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, QuantWeight):
            if func is torch.ops.aten.detach.default:
                return first.with_parts(lambda part: part, dtype=first.dtype)
            if func is torch.ops.aten._to_copy.default:
                device = kwargs.get("device") or first.codes.device
                return first.with_parts(lambda part: part.to(device), dtype=kwargs.get("dtype") or first.dtype)
        return func(*map(_as_numbers, args), **{key: _as_numbers(value) for key, value in kwargs.items()})


def _argument(place: int, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    return args[place] if len(args) > place else kwargs.get(name)


def _as_numbers(value: Any) -> Any:
    if isinstance(value, QuantWeight):
        return value.numbers()
    if isinstance(value, list | tuple):
        return type(value)(map(_as_numbers, value))
    return value


def _linear(input: Tensor, weight: QuantWeight, bias: Tensor | None = None) -> Tensor:
    """(..., C) -> (..., R), a block of rows at a time."""
    rows = weight.shape[0]
    blocks = [F.linear(input, weight.numbers(slice(start, start + _BLOCK_ROWS))) for start in range(0, rows, _BLOCK_ROWS)]
    out = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=-1)
    return out if bias is None else out + bias


def _embedding(tokens: Tensor, weight: QuantWeight) -> Tensor:
    """(B, T) -> (B, T, C); only the rows of the tokens that occur."""
    distinct, places = torch.unique(tokens, return_inverse=True)
    return F.embedding(places, weight.numbers(distinct))


def held_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes that tensors take in memory, quantised ones as they are held."""
    total = 0
    for tensor in tensors:
        parts = (tensor.codes, tensor.scales, tensor.minimums) if isinstance(tensor, QuantWeight) else (tensor,)
        total += sum(part.numel() * part.element_size() for part in parts if part is not None)
    return total
