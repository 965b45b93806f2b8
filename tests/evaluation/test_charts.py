import re
from xml.etree import ElementTree

import pytest

from ragkit.evaluation import charts
from ragkit.evaluation.statistics import Estimate


def points(svg):
    """Return the places of a chart's marks: (x, y), in the order of drawing."""
    root = ElementTree.fromstring(svg)
    uses = [use for use in root.iter("use") if "stroke" not in use.get("style", "")]
    return [(float(use.get("x")), float(use.get("y"))) for use in uses]


def ticks(svg, axis):
    """Return the place of each number on an axis."""
    texts = [
        text for text in ElementTree.fromstring(svg).iter("text") if "muted" in text.get("style")
    ]
    return {
        float(text.text.strip(" %").replace("−", "-")): float(text.get(axis))
        for text in texts
        if re.fullmatch(r"[−\d.]+( %)?", text.text or "")
    }


def test_dots_stand_at_the_means_and_lines_over_the_intervals():
    rows = [("one", Estimate(0.25, 0.2, 0.4, 9)), ("two", Estimate(0.75, 0.5, 1.0, 9))]
    svg = charts.intervals(rows, "name", "Caption")
    at = ticks(svg, "x")
    unit = at[1.0] - at[0.0]
    assert [x for x, _ in points(svg)] == pytest.approx(
        [at[0.0] + 0.25 * unit, at[0.0] + 0.75 * unit]
    )
    lines = [
        [float(x) for x in re.findall(r"[ML] ([\d.]+)", path.get("d"))]
        for path in ElementTree.fromstring(svg).iter("path")
        if "stroke: var(--series-1)" in path.get("style", "")
    ]
    expected = [
        [at[0.0] + low * unit, at[0.0] + high * unit] for low, high in ((0.2, 0.4), (0.5, 1))
    ]
    assert lines == [pytest.approx(line) for line in expected]
    assert [y for _, y in points(svg)] == sorted(y for _, y in points(svg))


def test_an_axis_holds_values_that_are_no_shares():
    rows = [("gain", Estimate(-0.2, -0.3, 0.1, 9)), ("perplexity", Estimate(4.0, 3.0, 5.0, 9))]
    svg = charts.intervals(rows, "name", "Caption")
    at = ticks(svg, "x")
    assert 0.0 in at and max(at) >= 4
    unit = (at[max(at)] - at[0.0]) / max(at)
    assert [x for x, _ in points(svg)] == pytest.approx([at[0.0] - 0.2 * unit, at[0.0] + 4 * unit])


def test_groups_draw_each_measure_of_each_row():
    table = {
        "a": {"EM": Estimate(0.1, 0, 0.2, 9), "F1": Estimate(0.3, 0.2, 0.4, 9)},
        "b": {"F1": Estimate(0.9, 0.8, 1, 9)},
    }
    svg = charts.groups(table, "name", "Caption")
    at = ticks(svg, "x")
    unit = at[1.0] - at[0.0]
    found = [(x - at[0.0]) / unit for x, _ in points(svg)]
    # EM's marks, F1's marks, and the two of the legend.
    assert found[:3] == pytest.approx([0.1, 0.3, 0.9])
    assert "EM" in svg and "F1" in svg and "var(--series-2)" in svg and "series-3" not in svg


def test_a_sweep_runs_through_the_means():
    table = {50.0: {"EM": Estimate(0.5, 0.4, 0.6, 9)}, 0.0: {"EM": Estimate(0.8, 0.7, 0.9, 9)}}
    svg = charts.sweep(table, "distractors", "name", "Caption")
    root = ElementTree.fromstring(svg)
    [line] = [
        p
        for p in root.iter("path")
        if "stroke: var(--series-1)" in p.get("style", "") and p.get("clip-path")
    ]
    (x0, y0), (x1, y1) = [
        (float(x), float(y)) for x, y in re.findall(r"[ML] ([\d.]+) ([\d.]+)", line.get("d"))
    ]
    axis = ticks(svg, "x")
    assert [x0, x1] == pytest.approx([axis[0.0], axis[50.0]], abs=0.01)
    band = root.find(".//g[@id='name-FillBetweenPolyCollection_1']//path")
    ys = [float(y) for y in re.findall(r"[ML] -?[\d.]+ (-?[\d.]+)", band.get("d"))]
    # The band reaches from 0.9 to 0.4, so a unit is twice its height.
    unit = (max(ys) - min(ys)) / 0.5
    assert y1 - y0 == pytest.approx(0.3 * unit)
    shift = float(root.find(".//g[@id='name-FillBetweenPolyCollection_1']//use").get("y"))
    assert y0 - (min(ys) + shift) == pytest.approx(0.1 * unit)


def test_bars_are_as_long_as_their_counts():
    svg = charts.bars(
        [("misread", 30), ("none", 0), ("correct", 90)], ["correct"], "name", "Caption"
    )
    widths = {}
    for path in ElementTree.fromstring(svg).iter("path"):
        if match := re.search(r"fill: var\(--(good|bad)\)", path.get("style", "")):
            xs = [float(x) for x in re.findall(r"[ML] ([\d.]+)", path.get("d"))]
            widths.setdefault(match[1], []).append(max(xs) - min(xs))
    assert widths["good"][0] == pytest.approx(3 * widths["bad"][0])
    assert widths["bad"][1] == 0
    assert "30 · 25%" in svg and "90 · 75%" in svg


def test_charts_leave_the_settings_of_matplotlib_as_they_were():
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    charts.intervals([("a", Estimate(0.5, 0.4, 0.6, 9))], "name", "Caption")
    assert dict(mpl.rcParams) == before
