"""Charts: what is drawn lies where the numbers say, and no spike is lost."""

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmctl.core.report.chart import HEIGHT, WIDTH, Series, line_chart, smoothed, thinned, ticks


def drawn(series: list[Series]) -> Any:
    return ElementTree.fromstring(line_chart("A <title>", series, x_label="x", x_text=str, y_text=lambda y: f"{y:g}"))


def points_of(line: Any) -> np.ndarray:
    return np.array([[float(n) for n in point.split(",")] for point in line.get("points").split()])


def test_points_lie_on_the_scale_that_the_ticks_show() -> None:
    xs, ys = [0.0, 10.0, 20.0, 40.0], [1.0, 3.0, 2.0, 5.0]
    root = drawn([Series(label="a", colour="c0", xs=xs, ys=ys)])
    placed = points_of(root.find(".//polyline"))
    labels = [(t.text, float(t.get("x")), float(t.get("y"))) for t in root.iter("text") if re.fullmatch(r"-?[\d.]+", t.text or "")]
    down = {float(text): y - 4 for text, x, y in labels if x < 60}
    across = {float(text): x for text, x, y in labels if x >= 60}
    assert len(down) >= 3
    assert len(across) >= 3
    to_y = np.polynomial.Polynomial.fit(list(down), list(down.values()), 1)
    to_x = np.polynomial.Polynomial.fit(list(across), list(across.values()), 1)
    np.testing.assert_allclose(placed[:, 0], to_x(np.array(xs)), atol=0.2)
    np.testing.assert_allclose(placed[:, 1], to_y(np.array(ys)), atol=0.2)
    assert (placed >= 0).all()
    assert (placed <= [WIDTH, HEIGHT]).all()


def test_missing_numbers_are_left_out_and_an_empty_chart_is_none() -> None:
    root = drawn([Series(label="a", colour="c0", xs=[1.0, 2.0, None, 4.0, 5.0], ys=[1.0, math.nan, 3.0, None, 2.0])])
    assert len(points_of(root.find(".//polyline"))) == 2
    assert line_chart("t", [Series(label="a", colour="c0", xs=[None], ys=[1.0])], x_label="x", x_text=str, y_text=str) == ""


def test_hostile_labels_stay_text() -> None:
    name = "'\"><script>alert(1)</script>&"
    svg = line_chart(name, [Series(label=name, colour="c0", xs=[1.0, 2.0], ys=[1.0, 2.0])], x_label="x", x_text=str, y_text=str)
    assert "<script" not in svg
    root = ElementTree.fromstring(svg)
    assert json.loads(root.get("data-chart") or "")[0]["label"] == name


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=2000), st.integers(10, 100))
def test_thinning_keeps_the_extremes_and_the_order(ys: list[float], half: int) -> None:
    points = [(float(i), y) for i, y in enumerate(ys)]
    kept = thinned(points, 2 * half)
    assert len(kept) <= 2 * half
    assert set(kept) <= set(points)
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)
    assert max(y for _, y in kept) == max(ys)
    assert min(y for _, y in kept) == min(ys)


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_are_round_and_inside(low: float, width: float) -> None:
    high = low + width
    found = ticks(low, high)
    assert len(found) <= 7
    if high > low and width > abs(low) * 1e-6:
        assert len(found) >= 2
        assert all(low - width * 1e-6 <= tick <= high + width * 1e-6 for tick in found)


def test_smoothing_is_the_weighted_mean_of_what_was_seen() -> None:
    ys, weight = [4.0, None, 1.0, 7.0], 0.8
    seen: list[float] = []
    for y, found in zip(ys, smoothed(ys, weight=weight), strict=True):
        if y is None:
            assert found is None
            continue
        seen.append(y)
        weights = weight ** np.arange(len(seen))[::-1]
        assert found == pytest.approx(float(np.dot(weights, seen) / weights.sum()), rel=1e-12)
