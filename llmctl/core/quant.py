"""Quantised matrices: two layouts in groups of 32, numbers to codes and back. numpy only; knows no model and no file.

int8: a number is scale * code.  int4: a number is scale * code + minimum, with codes from 0 to 15. Groups of 32 run along
the columns, the inputs of a matrix (outputs, inputs), so that a dot product meets one scale after the other; scales and
minimums are float16, as in GGUF, whose Q8_0, Q4_0 and Q4_1 are held without loss. 8.5 and 5 bits a weight.

Legend: R rows, C columns, G groups a row: C / 32, rounded up; what is beyond C in the last group means nothing.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from llmctl.core.errors import InputError

GROUP = 32
Layout = Literal["int8", "int4"]
LAYOUTS: tuple[Layout, ...] = ("int8", "int4")
BITS: dict[str, int] = {"int8": 8, "int4": 4}
GGUF_LAYOUTS: dict[str, Layout] = {"Q8_0": "int8", "Q4_0": "int4", "Q4_1": "int4"}
"""The types of GGUF that a layout holds as they are."""

_SMALLEST_NORMAL = np.finfo(np.float16).smallest_normal
_INT8_STEPS = (127.0, 125.0, 123.0, 121.0)
"""Candidates for the number of steps from 0 to a group's largest number: one scale rounds the 32 more luckily than another."""
_INT4_CUTS = ((0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (1.0, 0.5), (0.5, 1.0), (-0.5, 0.0), (0.0, -0.5))
"""Candidates for what is cut off below and above a group's codes, in steps: the range of 16 codes need not be that of the
numbers. Measured on normal numbers, these take off a fifth of the squared error of Q4_1, which takes the range."""
_LARGEST = {"int8": 65504.0 * 120, "int4": 60000.0}
"""Beyond it, scales or minimums would overflow float16."""
_CHUNK_NUMBERS = 1 << 16
"""A quarter of a mebibyte of float32: what is worked on stays in the cache."""


@dataclass(frozen=True)
class QuantMatrix:
    """A matrix (R, C) in one of the layouts.

    `codes` are int8 (R, 32 G), or uint8 (R, 16 G) whose byte j of a group holds the group's column j in its low half and
    column j + 16 in its high half. `scales` and, for int4, `minimums` are float16 (R, G).
    """

    layout: Layout
    codes: NDArray[Any]
    scales: NDArray[np.float16]
    minimums: NDArray[np.float16] | None
    num_columns: int

    @property
    def shape(self) -> tuple[int, int]:
        """(R, C)."""
        return len(self.codes), self.num_columns

    @property
    def num_bytes(self) -> int:
        """What it takes in memory."""
        return self.codes.nbytes + self.scales.nbytes + (0 if self.minimums is None else self.minimums.nbytes)

    def map_rows(self, change: Callable[[Any], Any]) -> "QuantMatrix":
        """The matrix whose rows `change` has picked or put into another order; it is called with arrays (R, ...)."""
        minimums = None if self.minimums is None else np.ascontiguousarray(change(self.minimums))
        codes, scales = np.ascontiguousarray(change(self.codes)), np.ascontiguousarray(change(self.scales))
        return dataclasses.replace(self, codes=codes, scales=scales, minimums=minimums)


def shapes_of(layout: Layout, shape: tuple[int, int]) -> dict[str, tuple[int, int]]:
    """The shapes of `codes`, `scales` and (int4) `minimums` of a matrix of `shape` (R, C)."""
    rows, groups = shape[0], -(-shape[1] // GROUP)
    codes = {"codes": (rows, groups * GROUP * BITS[layout] // 8), "scales": (rows, groups)}
    return codes | ({"minimums": (rows, groups)} if layout == "int4" else {})


def layout_for(name: str, shape: tuple[int, ...], wanted: Layout) -> Layout | None:
    """The layout of the decoder's tensor `name` in a model that is quantised to `wanted`; None leaves it as it is.

    Matrices of the layers take `wanted`; embeddings and head take int8, since 4 bits ruin them. Norms, biases, position
    tables and the small matrix that routes tokens to experts stay.
    """
    if name in ("embed.weight", "head.weight"):
        return "int8"
    is_matrix = name.startswith("layers.") and name.endswith(".weight") and len(shape) == 2 and "router" not in name
    return wanted if is_matrix else None


def quantise(numbers: NDArray[Any], layout: Layout, *, importance: NDArray[np.float32] | None = None) -> QuantMatrix:
    """Quantise a matrix (R, C) of floats, each group with the scale (and minimum) of least squared error among candidates.

    `importance` (C,), the mean square of each input, weighs the errors, since what counts is the error of the product, and
    the inputs of a language model differ by orders of magnitude; checkpoint/calibrate.py says what that gains.

    A group that is on a grid already, and reaches both of its ends, comes back exactly: a dequantised Q4_1 does. Raises
    InputError for numbers that are not finite or that float16 scales cannot reach.
    """
    rows, columns = numbers.shape
    groups = -(-columns // GROUP)
    shapes = shapes_of(layout, (rows, columns))
    codes: NDArray[Any] = np.empty(shapes["codes"], np.int8 if layout == "int8" else np.uint8)
    scales = np.empty((rows, groups), np.float16)
    minimums = np.empty((rows, groups), np.float16) if layout == "int4" else None
    step = max(1, _CHUNK_NUMBERS // max(groups * GROUP, 1))
    weights = None if importance is None else _weights(importance, groups, step)
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        chunk = _grouped(np.asarray(numbers[start:stop], dtype=np.float32), groups)  # (32, n)
        if not np.abs(chunk).max(initial=0) <= _LARGEST[layout]:
            what = "numbers too large for float16 scales" if np.isfinite(chunk).all() else "numbers that are not finite"
            raise InputError(f"the weights hold {what} (in rows {start} to {stop - 1}); they cannot be quantised")
        part: NDArray[Any]
        if minimums is None:
            part, scale = _quantise_int8(chunk, None if weights is None else weights[:, : chunk.shape[1]])
        else:
            part, scale, minimum = _quantise_int4(chunk, None if weights is None else weights[:, : chunk.shape[1]])
            minimums[start:stop] = minimum.reshape(-1, groups)
            part = part[:16] | part[16:] << 4
        codes[start:stop] = part.T.reshape(stop - start, -1)
        scales[start:stop] = scale.reshape(-1, groups)
    return QuantMatrix(layout, codes, scales, minimums, columns)


def _grouped(chunk: NDArray[np.float32], groups: int) -> NDArray[np.float32]:
    """(rows, C) -> (32, n), one group a column, since sums along the first dimension are quick.

    The last group of a row is filled up with its last number, which widens no range.
    """
    missing = groups * GROUP - chunk.shape[1]
    if missing:
        chunk = np.pad(chunk, ((0, 0), (0, missing)), mode="edge")
    return np.ascontiguousarray(chunk.reshape(-1, GROUP).T)


def _weights(importance: NDArray[np.float32], groups: int, num_rows: int) -> NDArray[np.float32]:
    """(C,) -> (32, num_rows * G): the weights of `num_rows` equal rows, of mean 1 in each group."""
    row = _grouped(np.asarray(importance, dtype=np.float32)[None], groups)  # (32, G)
    mean = row.mean(axis=0)
    row = np.where(mean > 0, row * _inverse(mean), np.float32(1)) + np.float32(1e-4)  # an input that was always 0 need not stay so
    return np.tile(row, (1, num_rows))


def _sum(values: NDArray[np.float32], weights: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """Sums (n,), weighted if there are weights, of columns (32, n)."""
    total: NDArray[np.float32] = (values if weights is None else values * weights).sum(axis=0)
    return total


def _quantise_int8(x: NDArray[np.float32], weights: NDArray[np.float32] | None) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Codes (32, n) and scales (n,) of groups (32, n)."""
    largest = np.abs(x).max(axis=0)
    best_error = np.full(x.shape[1], np.inf, np.float32)
    best_scale = np.zeros(x.shape[1], np.float16)
    for steps in _INT8_STEPS:
        scale = (largest / np.float32(steps)).astype(np.float16)
        cut = (scale < _SMALLEST_NORMAL) & (scale.astype(np.float32) * np.float32(127) < largest)
        scale[cut] = np.nextafter(scale[cut], np.float16(1))  # below normal numbers float16 is coarse: rounding down would cut off
        rest = _int8_codes(x, scale)
        rest *= scale.astype(np.float32)
        rest -= x
        error = _sum(rest * rest, weights)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        best_scale = np.where(better, scale, best_scale)
    return _int8_codes(x, best_scale).astype(np.int8), best_scale


def _int8_codes(x: NDArray[np.float32], scale: NDArray[np.float16]) -> NDArray[np.float32]:
    codes = x * _inverse(scale.astype(np.float32))
    np.rint(codes, out=codes)
    return np.clip(codes, -127, 127, out=codes)


def _quantise_int4(
    x: NDArray[np.float32], weights: NDArray[np.float32] | None
) -> tuple[NDArray[np.uint8], NDArray[np.float16], NDArray[np.float16]]:
    """Codes (32, n), one a byte, scales (n,) and minimums (n,) of groups (32, n).

    Each candidate's codes get the scale and minimum that fit them best (least squares, as llama.cpp's make_qkx2_quants
    does); the best pair is rounded to float16 and the codes are chosen anew for it.
    """
    low = x.min(axis=0)
    width = x.max(axis=0) - low
    centred = x - low  # sums of numbers far from 0 would cancel
    best_error = np.full(x.shape[1], np.inf, np.float32)
    best_scale, best_minimum = width / 15, low
    for cut_below, cut_above in _INT4_CUTS:
        codes = centred * (_inverse(width) * np.float32(15 + cut_below + cut_above))
        codes -= np.float32(cut_below)
        np.rint(codes, out=codes)
        np.clip(codes, 0, 15, out=codes)
        scale, minimum = _fit(centred, codes, weights)
        codes *= scale
        codes += minimum
        codes -= centred
        error = _sum(codes * codes, weights)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        best_scale, best_minimum = np.where(better, scale, best_scale), np.where(better, minimum + low, best_minimum)
    return _best_rounded(x, [(width / 15, low), (best_scale, best_minimum)], weights)


def _fit(x: NDArray[np.float32], codes: NDArray[np.float32], weights: NDArray[np.float32] | None) -> tuple[NDArray[Any], NDArray[Any]]:
    """Scale and minimum (n,) of least squared error for given codes (32, n) of x (32, n)."""
    total = np.float32(GROUP) if weights is None else weights.sum(axis=0)
    mean_code, mean_x = _sum(codes, weights) / total, _sum(x, weights) / total
    variance = _sum(codes * codes, weights) - total * mean_code * mean_code
    covariance = _sum(codes * x, weights) - total * mean_code * mean_x
    scale = covariance * _inverse(variance)
    return scale, mean_x - scale * mean_code


def _best_rounded(
    x: NDArray[np.float32], candidates: list[tuple[NDArray[Any], NDArray[Any]]], weights: NDArray[np.float32] | None
) -> tuple[NDArray[np.uint8], NDArray[np.float16], NDArray[np.float16]]:
    """The candidate (scale, minimum) of least error once both are float16, and its codes. The first wins a tie."""
    best: tuple[NDArray[Any], ...] | None = None
    for scale, minimum in candidates:
        scale, minimum = scale.astype(np.float16), minimum.astype(np.float16)
        wide_scale, wide_minimum = scale.astype(np.float32), minimum.astype(np.float32)
        codes = np.clip(np.rint((x - wide_minimum) * _inverse(wide_scale)), 0, 15)
        rest = codes * wide_scale + wide_minimum - x
        found = (_sum(rest * rest, weights), codes, scale, minimum)
        if best is None:
            best = found
        else:
            better = found[0] < best[0]
            best = tuple(np.where(better, new, old) for new, old in zip(found, best, strict=True))
    assert best is not None
    return best[1].astype(np.uint8), best[2], best[3]


def _inverse(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """1 / values, and 0 where that is not finite: a group of equal numbers, or of numbers below what float16 scales reach."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / values
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


def dequantise(matrix: QuantMatrix) -> NDArray[np.float32]:
    """The numbers of a quantised matrix, (R, C) float32: exactly scale * code, or that + minimum rounded once."""
    rows = len(matrix.codes)
    codes = unpacked(matrix).reshape(rows, -1, GROUP)
    numbers = codes.astype(np.float32)
    numbers *= matrix.scales.astype(np.float32)[:, :, None]
    if matrix.minimums is not None:
        numbers += matrix.minimums.astype(np.float32)[:, :, None]
    return np.ascontiguousarray(numbers.reshape(rows, -1)[:, : matrix.num_columns])


def unpacked(matrix: QuantMatrix) -> NDArray[Any]:
    """The codes, one a byte: (R, 32 G)."""
    if matrix.layout == "int8":
        return matrix.codes
    halves = matrix.codes.reshape(len(matrix.codes), -1, 16)
    return np.concatenate([halves & 15, halves >> 4], axis=2).reshape(len(matrix.codes), -1)


def from_gguf(raw: NDArray[np.uint8], kind: str, num_columns: int) -> QuantMatrix:
    """A tensor of GGUF of type Q8_0, Q4_0 or Q4_1 without loss, from its bytes (R, bytes a row).

    Q4_0's scale * (code - 8) is scale * code + minimum with a minimum of -8 * scale, which float16 holds exactly. Raises
    InputError when it does not: for scales that no weight needs.
    """
    layout = GGUF_LAYOUTS[kind]
    num_rows, groups = len(raw), num_columns // GROUP
    blocks = raw.reshape(num_rows, groups, -1)
    scales = np.ascontiguousarray(blocks[:, :, :2]).view("<f2")[:, :, 0].astype(np.float16)
    if kind == "Q8_0":
        signed = np.ascontiguousarray(blocks[:, :, 2:]).view(np.int8).reshape(num_rows, -1)
        return QuantMatrix(layout, signed, scales, None, num_columns)
    codes = np.ascontiguousarray(blocks[:, :, -16:]).reshape(num_rows, -1)
    if kind == "Q4_1":
        minimums = np.ascontiguousarray(blocks[:, :, 2:4]).view("<f2")[:, :, 0].astype(np.float16)
    else:
        with np.errstate(over="ignore", invalid="ignore"):
            minimums = (scales * np.float16(-8)).astype(np.float16)
        if (np.isinf(minimums) & np.isfinite(scales)).any():
            raise InputError("a scale of a Q4_0 tensor is beyond 8188; it cannot be held")
    return QuantMatrix(layout, codes, scales, minimums, num_columns)
