"""Products with int8 and int4 matrices against float64 sums of the same codes, worked out by numpy from native.h's words."""

import dataclasses

import numpy as np
import pytest
from numpy.typing import NDArray

from llmctl.core.native.library import INT4, INT8, Int4Matrix, Int8Matrix, Session, packed_layout
from llmctl.core.quant import QuantMatrix, dequantise, quantise, unpacked
from tests.core.native.models import forced, runnable_kernels

pytestmark = pytest.mark.skipif(not runnable_kernels(), reason="the native library was not built")

SIZES = [(1, 1), (7, 3), (16, 32), (17, 33), (33, 64), (70, 129), (129, 96), (48, 576)]
ROWS = [*range(1, 20), 31, 32, 33, 63, 64, 65]
KINDS = ["int8", "int4", "int4 centred"]


def random_matrix(kind: str, outputs: int, inputs: int, *, seed: int = 1) -> QuantMatrix:
    """A matrix with codes at the ends of their range; "centred" has minimums of -8 scales, as Q4_0 has."""
    random = np.random.default_rng(seed)
    matrix = quantise(random.standard_normal((outputs, inputs)).astype(np.float32), "int8" if kind == "int8" else "int4")
    if kind == "int4 centred":
        matrix = dataclasses.replace(matrix, minimums=(matrix.scales * np.float16(-8)).astype(np.float16))
    return matrix


def for_library(matrix: QuantMatrix) -> Int8Matrix | Int4Matrix:
    if matrix.minimums is None:
        return Int8Matrix(matrix.codes, matrix.scales, matrix.num_columns)
    return Int4Matrix(matrix.codes, matrix.scales, matrix.minimums, matrix.num_columns)


def quantised_rows(x: NDArray[np.float32]) -> NDArray[np.float64]:
    """The rows as the library takes them: to 127 steps of the largest number of each group of 32."""
    padded = np.pad(x, ((0, 0), (0, -x.shape[1] % 32))).reshape(len(x), -1, 32)
    largest = np.abs(padded).max(axis=2, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = np.where(largest > 0, np.float32(127) / largest, np.float32(0)).astype(np.float32)
    codes = np.rint(padded * steps)
    numbers = codes.astype(np.float64) * (largest / np.float32(127)).astype(np.float64)
    return numbers.reshape(len(x), -1)[:, : x.shape[1]]


@pytest.mark.parametrize("name", runnable_kernels())
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_the_float64_sums_of_codes(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(2)
    with forced(name, monkeypatch):
        session = Session(2)
    for outputs, inputs in SIZES:
        matrix = random_matrix(kind, outputs, inputs)
        bias = random.standard_normal(outputs).astype(np.float32)
        packed = session.pack_quantised([for_library(matrix)], biases=[bias])
        assert (packed.minimums is None) == (kind != "int4")
        for num_rows in ROWS:
            x = random.standard_normal((num_rows, inputs)).astype(np.float32)
            x[0] *= 1e4  # rows of one call have scales of their own
            rows = quantised_rows(x)
            want = rows @ dequantise(matrix).astype(np.float64).T + bias
            error = np.abs(session.multiply(packed, x) - want)
            limit = 4e-7 * (np.abs(rows) @ np.abs(dequantise(matrix)).astype(np.float64).T + np.abs(bias)) * (2 + np.sqrt(inputs / 32))
            if kind != "int8":  # scale * codes and minimum nearly cancel
                limit += 4e-7 * np.abs(rows) @ np.full((inputs, outputs), 15.0) * (2 + np.sqrt(inputs / 32))
            assert (error <= limit).all(), (outputs, inputs, num_rows, (error / limit).max())


@pytest.mark.parametrize("name", runnable_kernels())
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_the_same_bits_in_any_batch_and_for_any_number_of_threads(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(3).standard_normal((67, 129)).astype(np.float32)
    with forced(name, monkeypatch):
        sessions = [Session(1), Session(3)]
    packed = sessions[0].pack_quantised([for_library(random_matrix(kind, 70, 129))])
    whole = sessions[0].multiply(packed, x)
    for session in sessions:
        for num_rows in range(1, 20):
            for first in (0, 13):
                part = session.multiply(packed, x[first : first + num_rows])
                assert part.tobytes() == whole[first : first + num_rows].tobytes()


@pytest.mark.parametrize("name", runnable_kernels())
def test_the_largest_codes_do_not_overflow(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with forced(name, monkeypatch):
        session = Session(1)
    one = np.ones((16, 3), np.float16)
    for codes in (np.full((16, 96), -128, np.int8), np.full((16, 96), 127, np.int8)):
        for x in (np.full((3, 96), 1.0), np.full((3, 96), -1.0)):
            y = session.multiply(session.pack_quantised([Int8Matrix(codes, one, 96)]), x.astype(np.float32))
            assert np.abs(y - x @ codes.T.astype(np.float64)).max() < 1e-2
    packed = session.pack_quantised([Int4Matrix(np.full((16, 48), 255, np.uint8), one, one, 96)])
    for sign in (-1.0, 1.0):  # sums of a group in 16 bits: 30480 of 32767
        assert np.abs(session.multiply(packed, np.full((11, 96), sign, np.float32)) - sign * 16 * 96).max() < 1e-3


@pytest.mark.parametrize("name", runnable_kernels())
@pytest.mark.parametrize("kind", KINDS)
def test_nan_and_infinity_reach_the_results_that_they_belong_to_and_no_other(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = random_matrix(kind, 40, 96)
    x = np.random.default_rng(4).standard_normal((9, 96)).astype(np.float32)
    with forced(name, monkeypatch):
        session = Session(1)
    clean = session.multiply(session.pack_quantised([for_library(matrix)]), x)
    bad = x.copy()
    bad[1, 40], bad[4, 0], bad[7, 95], bad[8] = np.nan, np.inf, -np.inf, 1e-38
    matrix.scales[20, 1] = np.nan
    if kind == "int4 centred":
        assert matrix.minimums is not None
        matrix.minimums[20, 1] = np.nan
    y = session.multiply(session.pack_quantised([for_library(matrix)]), bad)
    assert np.isnan(y[[1, 4, 7]]).all()
    assert np.isnan(y[:, 20]).all()
    good = [0, 2, 3, 5, 6]
    assert np.delete(y[good], 20, axis=1).tobytes() == np.delete(clean[good], 20, axis=1).tobytes()
    assert (np.abs(np.delete(y[8], 20)) < 1e-30).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_packed_arrays_are_laid_out_as_described(kind: str) -> None:
    outputs, inputs = 37, 70
    parts = [random_matrix(kind, rows, inputs, seed=rows) for rows in (30, 7)]
    packed = Session(2).pack_quantised([for_library(part) for part in parts])
    layout = packed_layout(packed.kind, outputs, inputs, has_minimums=kind == "int4")
    assert {name: (array.shape, array.dtype) for name, array in packed.arrays().items()} == {
        name: (shape, np.dtype(dtype)) for name, (shape, dtype) in layout.items()
    }
    codes = np.concatenate([unpacked(part) for part in parts])
    scales = np.concatenate([part.scales for part in parts])
    assert packed.scales is not None
    for output in range(outputs):
        block, lane = divmod(output, 16)
        assert (packed.scales[block, :, lane] == scales[output]).all()
        for k in range(inputs):
            group, inner = divmod(k, 32)
            if packed.kind == INT8:
                found = int(packed.weights[block, 8 * group + inner // 4, lane, inner % 4]) - 128
            else:
                both = int(packed.weights[block, 4 * group + inner % 16 // 4, lane, inner % 4])
                found = both & 15 if inner < 16 else both >> 4
            assert found == codes[output, k]
    assert packed.kind == (INT8 if kind == "int8" else INT4)
