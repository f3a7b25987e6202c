"""Causal attention for training in float32 by native/causal.cpp: tiles in the cache, nothing kept but softmax's denominators.

The explicit form of causal.py is its fallback, and `scaled_dot_product_attention` in float64 its oracle. It runs on the
threads of the OpenMP runtime that torch has loaded, so that no second pool waits beside it.

Legend: B rows, H heads, Hkv key-value heads, T tokens, D head size.
"""

import ctypes
import functools
from ctypes import CDLL, POINTER, c_float, c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmctl.core.model.causal import trains_here
from llmctl.core.sharedlib import Unavailable, open_library

_MEASURED = b"avx2"
"""The kernels beside which this form was measured: where the CPU has AVX-512, torch's products use it and this does not. With
AVX-VNNI nobody has measured it yet."""
_SIZE_UNIT = 16
_VIEWS = ("q", "k", "v", "out", "grad_out", "grad_q", "grad_k", "grad_v")


class _View(ctypes.Structure):
    """causal.cpp's View."""

    _fields_ = [("data", c_void_p), ("row", c_int64), ("head", c_int64), ("token", c_int64)]


class _Attention(ctypes.Structure):
    """causal.cpp's CausalAttention."""

    _fields_ = [
        *((name, c_int64) for name in ("rows", "heads", "shared", "tokens", "size", "window")),
        *((name, _View) for name in _VIEWS),
        ("log_norms", c_void_p),
        ("scratch", c_void_p),
        ("scratch_floats", c_int64),
        ("num_threads", c_int64),
        ("scale", c_float),
        ("unused", c_int32),
    ]


@functools.cache
def _library() -> CDLL | None:
    """The library, if it is there, holds this form, and the CPU can run it."""
    try:
        library = open_library()
        library.llmctl_kernels.restype, library.llmctl_kernels.argtypes = ctypes.c_char_p, [ctypes.c_char_p]
        library.llmctl_causal_struct_bytes.restype = library.llmctl_causal_scratch.restype = c_int64
        library.llmctl_causal_scratch.argtypes = [c_int64, c_int64]
        library.llmctl_causal.restype, library.llmctl_causal.argtypes = None, [POINTER(_Attention), c_int32, c_void_p]
        fits = library.llmctl_causal_struct_bytes() == ctypes.sizeof(_Attention) and library.llmctl_kernels(_MEASURED) == _MEASURED
    except (Unavailable, AttributeError):
        return None
    return library if fits else None


@functools.cache
def _parallel() -> int | None:
    """The address of GOMP_parallel in this process, or None where torch runs on another OpenMP."""
    try:
        return ctypes.cast(CDLL(None).GOMP_parallel, c_void_p).value
    except (OSError, AttributeError):
        return None


def can_run(q: Tensor, v: Tensor) -> bool:
    """Whether the library can compute this: plain float32 on a CPU with AVX2, heads of a multiple of 16."""
    plain = all(type(x) is Tensor and x.dtype == torch.float32 and x.device.type == "cpu" for x in (q, v))
    fits = q.shape[-1] % _SIZE_UNIT == 0 and q.shape[-1] == v.shape[-1]
    return plain and fits and _library() is not None and (torch.get_num_threads() == 1 or _parallel() is not None)


def suits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether this form should run: in training, where it can and was measured to win."""
    if not (trains_here(q) and q.shape[2] == k.shape[2] and can_run(q, v)):
        return False
    library = _library()
    return library is not None and library.llmctl_kernels(None) == _MEASURED


def native_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None = None) -> Tensor:
    """As `causal.causal_attention`, of what `can_run` says yes to."""
    result: Tensor = _NativeAttention.apply(q, k, v, scale, window)  # type: ignore[no-untyped-call]
    return result


class _NativeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        q, k, v = (_side_by_side(x) for x in (q, k, v))
        out = _empty_like(q)
        log_norms = q.new_empty(q.shape[:3])  # (B, H, T)
        ctx.save_for_backward(q, k, v, out, log_norms)
        ctx.scale, ctx.window = scale, window
        _run(ctx, {"q": q, "k": k, "v": v, "out": out}, log_norms, backwards=False)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_norms = ctx.saved_tensors
        grads = [_empty_like(x) for x in (q, k, v)]
        views = dict(zip(_VIEWS, (q, k, v, out, _side_by_side(grad_out), *grads), strict=True))
        _run(ctx, views, log_norms, backwards=True)
        return *grads, None, None


def _side_by_side(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _empty_like(x: Tensor) -> Tensor:
    """(B, H, T, D) in the layout that the projections read and write, (B, T, H, D)."""
    rows, heads, num_tokens, size = x.shape
    return x.new_empty(rows, num_tokens, heads, size).transpose(1, 2)


def _run(ctx: Any, tensors: dict[str, Tensor], log_norms: Tensor, *, backwards: bool) -> None:
    library = _library()
    assert library is not None
    rows, heads, num_tokens, size = tensors["q"].shape
    num_threads = torch.get_num_threads()
    each = library.llmctl_causal_scratch(num_tokens, size)
    scratch = torch.empty(num_threads * each)
    attention = _Attention(
        rows=rows,
        heads=heads,
        shared=tensors["k"].shape[1],
        tokens=num_tokens,
        size=size,
        window=num_tokens if ctx.window is None else min(ctx.window, num_tokens),
        log_norms=log_norms.data_ptr(),
        scratch=scratch.data_ptr(),
        scratch_floats=each,
        num_threads=num_threads,
        scale=ctx.scale,
        **{name: _View(x.data_ptr(), *x.stride()[:3]) for name, x in tensors.items()},
    )
    library.llmctl_causal(attention, backwards, _parallel() if num_threads > 1 else None)
