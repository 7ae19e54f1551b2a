"""Charts: honest axes, nothing drawn from nothing, and no text that could break out of the page."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from stages.pages.charts import Series, format_tick, heat_strip, histogram, line_chart, log_ticks, nice_ticks


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.0, 1.0], [0.0, 0.25, 0.5, 0.75, 1.0]),
        ([1, 57], [0, 20, 40, 60]),
        ([0.0, 1e-3], [0.0, 0.00025, 0.0005, 0.00075, 0.001]),
        ([5.0, 5.0], [2.0, 4.0, 6.0, 8.0]),
        ([0.0, 0.0], [0.0, 0.25, 0.5, 0.75, 1.0]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(values: list[float], ticks: list[float]) -> None:
    assert nice_ticks(values) == pytest.approx(ticks)
    assert ticks[0] <= min(values) <= max(values) <= ticks[-1]


def test_tick_labels_are_short() -> None:
    assert [format_tick(value) for value in (0.0, 20.0, 0.25, 0.0005, 2e-5, 3e6)] == [
        "0",
        "20",
        "0.25",
        "5e-4",
        "2e-5",
        "3e6",
    ]


def test_chart_is_one_well_formed_figure_with_a_line_a_series() -> None:
    chart = line_chart("Loss", [Series("train", [(1, 2.0), (2, 1.0)]), Series("held-out", [(2, 1.5)], "b")])
    figure = ElementTree.fromstring(chart)
    lines = figure.findall(".//polyline")
    assert [line.get("class") for line in lines] == ["line a", "line b"]
    first, last = (tuple(map(float, point.split(","))) for point in (lines[0].get("points") or "").split())
    assert first[0] < last[0]
    assert first[1] < last[1]  # y grows downwards, the loss falls


def test_points_that_are_not_finite_are_skipped_and_an_empty_chart_is_labelled() -> None:
    assert "nothing was recorded" in line_chart("Loss", [Series("train", [(1, math.nan)])])
    figure = ElementTree.fromstring(line_chart("Loss", [Series("train", [(1, 1.0), (2, math.inf), (3, 2.0)])]))
    assert len((figure.findall(".//polyline")[0].get("points") or "").split()) == 2


def test_names_are_escaped() -> None:
    chart = line_chart("<script>", [Series("<b>", [(1, 1.0)])]) + heat_strip("<i>", ["<u>"], ["0"], {("<u>", "0"): 1.0})
    assert not any(tag in chart for tag in ("<script>", "<b><", "<i>", "<u>"))


def test_heat_strip_has_a_cell_a_value_the_largest_the_strongest() -> None:
    strip = ElementTree.fromstring(
        heat_strip("error", ["up", "down"], ["0", "1"], {("up", "0"): 0.1, ("down", "1"): 0.2})
    )
    cells = strip.findall(".//rect")
    assert [float(cell.get("fill-opacity") or 0) for cell in cells] == [pytest.approx(0.53), pytest.approx(1.0)]


def test_histogram_counts_every_value_once() -> None:
    figure = str(histogram("Lengths", [0, 1, 1, 50, 99, 100], "tokens"))
    counts = [int(count) for count in re.findall(r"tokens: (\d+)</title>", figure)]
    assert sum(counts) == 6
    assert counts[-1] == 2
    assert "median 50, largest 100 tokens" in figure
    assert "nothing to count" in histogram("Lengths", [], "tokens")


def test_histogram_of_equal_values_has_a_bar() -> None:
    assert "tokens: 3</title>" in histogram("Lengths", [512, 512, 512], "tokens")


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.009, 2.4], [0.001, 0.01, 0.1, 1.0, 10.0]),
        ([0.06, 9.0], [0.03, 0.1, 0.3, 1.0, 3.0, 10.0]),
        ([3.0, 40.0], [2.0, 5.0, 10.0, 20.0, 50.0]),
    ],
)
def test_ticks_of_a_logarithmic_axis_are_round_and_enclose_the_values(values: list[float], ticks: list[float]) -> None:
    assert log_ticks(values) == ticks


def test_axis_is_logarithmic_only_where_values_span_more_than_a_factor_of_ten() -> None:
    falling = [Series("", [(0.0, 2.0), (1.0, 0.02)])]
    assert "(log)" in line_chart("Loss", falling, may_be_log=True)
    assert "(log)" not in line_chart("Loss", falling)
    assert "(log)" not in line_chart("Loss", [Series("", [(0.0, 2.0), (1.0, 0.5)])], may_be_log=True)
    assert "(log)" not in line_chart("Loss", [Series("", [(0.0, 2.0), (1.0, 0.0)])], may_be_log=True)
