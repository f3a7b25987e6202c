"""Quantised layouts against the gguf package's quantisers, against float64, and against brute force."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as np_st

from llmctl.core.errors import InputError
from llmctl.core.quant import GGUF_LAYOUTS, GROUP, LAYOUTS, dequantise, from_gguf, layout_for, quantise, shapes_of, unpacked

gguf = pytest.importorskip("gguf")


def normal(rows: int, columns: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns), dtype=np.float32) * np.float32(0.05)


def in_float64(matrix) -> np.ndarray:
    """scale * code + minimum, number by number."""
    codes = unpacked(matrix).astype(np.float64)
    scales = np.repeat(matrix.scales.astype(np.float64), GROUP, axis=1)
    offsets = 0.0 if matrix.minimums is None else np.repeat(matrix.minimums.astype(np.float64), GROUP, axis=1)
    return (codes * scales + offsets)[:, : matrix.num_columns]


@pytest.mark.parametrize("kind", GGUF_LAYOUTS)
def test_gguf_types_are_held_without_loss(kind: str) -> None:
    number = gguf.GGMLQuantizationType[kind]
    raw = gguf.quants.quantize(normal(70, 32 * 9), number)
    assert np.array_equal(dequantise(from_gguf(raw, kind, 32 * 9)), gguf.quants.dequantize(raw, number))


def test_a_q4_0_scale_that_float16_cannot_hold_eightfold_is_refused() -> None:
    raw = np.zeros((1, 18), np.uint8)
    raw[0, :2] = np.array([9000], np.float16).view(np.uint8)
    with pytest.raises(InputError, match="8188"):
        from_gguf(raw, "Q4_0", 32)


@pytest.mark.parametrize(("layout", "kind"), [("int8", "Q8_0"), ("int4", "Q4_1"), ("int4", "Q4_0")])
def test_the_error_is_below_that_of_ggufs_own_quantiser(layout, kind: str) -> None:
    numbers = normal(200, 576)
    number = gguf.GGMLQuantizationType[kind]
    theirs = gguf.quants.dequantize(gguf.quants.quantize(numbers, number), number)
    ours = dequantise(quantise(numbers, layout))
    assert np.square(ours - numbers).sum() < 0.9 * np.square(theirs - numbers).sum()


@pytest.mark.parametrize(("layout", "kind"), [("int8", "Q8_0"), ("int4", "Q4_1")])
def test_what_is_on_the_grid_comes_back_exactly(layout, kind: str) -> None:
    number = gguf.GGMLQuantizationType[kind]
    numbers = gguf.quants.dequantize(gguf.quants.quantize(normal(50, 96), number), number)
    assert np.array_equal(dequantise(quantise(numbers, layout)), numbers)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("columns", [1, 31, 32, 33, 100])
def test_any_width_is_held_and_shapes_are_as_told(layout, columns: int) -> None:
    numbers = normal(7, columns)
    matrix = quantise(numbers, layout)
    assert matrix.shape == (7, columns)
    told = shapes_of(layout, (7, columns))
    assert told["codes"] == matrix.codes.shape
    assert told["scales"] == matrix.scales.shape
    assert ("minimums" in told) == (matrix.minimums is not None)
    step = np.abs(numbers).max() / 100 if layout == "int8" else np.ptp(numbers) / 10
    assert np.abs(dequantise(matrix) - numbers).max() <= step


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dequantised_numbers_are_those_of_float64(layout) -> None:
    matrix = quantise(normal(20, 64), layout)
    np.testing.assert_array_equal(dequantise(matrix), in_float64(matrix).astype(np.float32))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_other_code_of_a_number_is_nearer(layout) -> None:
    """Brute force over all codes, at the chosen scale and minimum."""
    numbers = normal(3, 64)
    matrix = quantise(numbers, layout)
    codes = np.arange(-127, 128) if layout == "int8" else np.arange(16)
    scales = np.repeat(matrix.scales.astype(np.float64), GROUP, axis=1)
    offsets = np.zeros_like(scales) if matrix.minimums is None else np.repeat(matrix.minimums.astype(np.float64), GROUP, axis=1)
    all_errors = np.abs(codes[:, None, None] * scales + offsets - numbers)
    np.testing.assert_allclose(np.abs(in_float64(matrix) - numbers), all_errors.min(axis=0), atol=1e-7)


@settings(max_examples=60, deadline=None)
@given(
    np_st.arrays(np.float32, (2, 40), elements=st.floats(-1000, 1000, width=32)),
    st.sampled_from(LAYOUTS),
)
@example(np.full((2, 40), 1e-5, np.float32), "int8")  # scales below float16's normal numbers
@example(np.full((2, 40), 3e-6, np.float32), "int8")
def test_errors_are_within_a_step_of_any_groups_range(numbers: np.ndarray, layout) -> None:
    """Of 32 numbers one may be cut off for the others' sake, but never by more than what its neighbours' range allows."""
    matrix = quantise(numbers, layout)
    again = dequantise(matrix)
    assert np.isfinite(again).all()
    for start in range(0, 40, GROUP):
        group, found = numbers[:, start : start + GROUP], again[:, start : start + GROUP]
        spread = 2 * np.abs(group).max(axis=1) / 254 if layout == "int8" else np.ptp(group, axis=1) / 15
        rounding = np.abs(group).max(axis=1) * 2e-3 + 1e-6  # float16 scales and minimums
        assert (np.sqrt(np.square(found - group).mean(axis=1)) <= spread + rounding).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_importance_weighs_the_errors(layout) -> None:
    numbers = normal(50, 70)
    importance = np.geomspace(1e-6, 1e6, 70).astype(np.float32)
    importance[3] = 0.0
    errors = [np.square(dequantise(quantise(numbers, layout, importance=given)) - numbers) @ importance for given in (None, importance)]
    assert errors[1].sum() < {"int8": 0.97, "int4": 0.9}[layout] * errors[0].sum()
    same = dequantise(quantise(numbers, layout, importance=np.full(70, 5, np.float32)))
    np.testing.assert_allclose(same, dequantise(quantise(numbers, layout)), atol=2e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_groups_of_equal_numbers_and_of_zeros_are_exact(layout) -> None:
    numbers = np.concatenate([np.zeros((2, 32)), np.full((2, 32), -0.5)], axis=1).astype(np.float32)
    matrix = quantise(numbers, layout)
    np.testing.assert_allclose(dequantise(matrix), numbers, rtol=1e-3)
    assert (dequantise(matrix)[:, :32] == 0).all()


@pytest.mark.parametrize(("bad", "what"), [(np.nan, "not finite"), (np.inf, "not finite"), (1e9, "too large")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_numbers_that_cannot_be_held_are_refused(layout, bad: float, what: str) -> None:
    numbers = normal(3, 64)
    numbers[1, 40] = bad
    with pytest.raises(InputError, match=what):
        quantise(numbers, layout)


def test_rows_can_be_reordered_in_quantised_form() -> None:
    matrix = quantise(normal(6, 64), "int4")
    order = [3, 1, 0, 5, 4, 2]
    np.testing.assert_array_equal(dequantise(matrix.map_rows(lambda array: array[order])), dequantise(matrix)[order])


@pytest.mark.parametrize(
    ("name", "shape", "layout"),
    [
        ("embed.weight", (100, 32), "int8"),
        ("head.weight", (100, 32), "int8"),
        ("layers.0.attn.q.weight", (32, 32), "int4"),
        ("layers.10.mlp.down.weight", (32, 64), "int4"),
        ("layers.0.attn.q.bias", (32,), None),
        ("layers.0.attn_norm.weight", (32,), None),
        ("layers.0.mlp.router.weight", (8, 32), None),
        ("positions.weight", (64, 32), None),
        ("final_norm.weight", (32,), None),
    ],
)
def test_the_head_keeps_eight_bits_and_small_tensors_all(name: str, shape: tuple[int, ...], layout: str | None) -> None:
    assert layout_for(name, shape, "int4") == layout
