"""Plots are SVG that a parser reads, with every point at its place."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from ldm.metrics.plot import DOWN, HEIGHT, LEFT, RIGHT, TOP, WIDTH, plot, ticks

SVG = "{http://www.w3.org/2000/svg}"


def test_points_lie_where_they_belong():
    root = ElementTree.fromstring(
        plot("a < b", "x", "y", {"one": [(1, 0), (10, 5), (100, 10)], "two": [(1, 10)]}, log=True)
    )
    places = [(float(c.get("cx")), float(c.get("cy"))) for c in root.iter(f"{SVG}circle")]
    assert places == [
        (LEFT, HEIGHT - DOWN),
        (pytest.approx((LEFT + WIDTH - RIGHT) / 2), pytest.approx((TOP + HEIGHT - DOWN) / 2)),
        (WIDTH - RIGHT, TOP),
        (LEFT, TOP),
    ]
    words = [each.text for each in root.iter(f"{SVG}text")]
    assert {"a < b", "x", "y", "one", "two", "1", "10", "100"} <= set(words)


def test_an_axis_may_begin_above_zero_and_has_round_marks():
    root = ElementTree.fromstring(plot("", "", "", {"": [(300, 0.4), (1200, 0.3)]}, zero=False))
    words = [each.text for each in root.iter(f"{SVG}text") if each.text]
    assert words == ["0.3", "0.325", "0.35", "0.375", "0.4", "250", "500", "750", "1000", "1250"]
    (first, top), (last, bottom) = ((float(c.get("cx")), float(c.get("cy"))) for c in root.iter(f"{SVG}circle"))
    assert (top, bottom) == (TOP, HEIGHT - DOWN)
    width = WIDTH - RIGHT - LEFT
    assert (first, last) == (pytest.approx(LEFT + 0.05 * width, abs=0.1), pytest.approx(LEFT + 0.95 * width, abs=0.1))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.25, 0.5, 0.75, 1]),
        (0, 9.3, [0, 2.5, 5, 7.5, 10]),
        (0, 0, [0, 0.25, 0.5, 0.75, 1]),
        (-3, 3, [-4, -2, 0, 2, 4]),
    ],
)
def test_marks_are_round_and_enclose(low, high, expected):
    assert ticks(low, high) == expected
