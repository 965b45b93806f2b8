"""Charts as SVG that stands inside a page: its fonts, and colours that the page's style names.

Every chart is a function from values to the text of one `<svg>` element, equal for equal values. It
holds no colour but `var(--…)`, so that light and dark pages draw the same chart, and no font: its
text is text.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from xml.etree import ElementTree

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .statistics import Estimate

Rows = Sequence[tuple[str, Estimate]]
"""Labels and what they stand for, from top to bottom."""

_WIDTH = 400.0  # units; a page shows a unit as about a pixel
_ROW = 24.0
# Colours that nothing else has; the page's names of theirs replace them.
_INK, _MUTED, _GRID, _GOOD, _BAD = "#a0b001", "#a0b002", "#a0b003", "#a0b004", "#a0b005"
_SERIES = ("#a0b011", "#a0b012", "#a0b013", "#a0b014")
_MARKERS = ("o", "s", "^", "D")
_NAMES = {
    _INK: "ink",
    _MUTED: "muted",
    _GRID: "grid",
    _GOOD: "good",
    _BAD: "bad",
    **{colour: f"series-{number}" for number, colour in enumerate(_SERIES, start=1)},
}
_COLOUR = re.compile("|".join(_NAMES))
_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]+")
_LABEL = 32  # characters of a label that are shown


def intervals(rows: Rows, name: str, caption: str) -> str:
    """Draw a dot at each mean and a line over its interval.

    Args:
        rows: what is drawn; shares are drawn on an axis from 0 to 1.
        name: what the ids inside the SVG begin with; another for every chart of a page.
        caption: what the chart shows, for those who do not see it.
    """
    with _style(name):
        figure, axes = _axes(len(rows), [label for label, _ in rows])
        _whiskers(axes, [estimate for _, estimate in rows], range(len(rows)), 0)
        _value_axis(axes, [estimate for _, estimate in rows])
        return _svg(figure, name, caption)


def groups(table: Mapping[str, Mapping[str, Estimate]], name: str, caption: str) -> str:
    """Draw several measures' means and intervals in each row; a measure has a colour and a mark.

    Args:
        table: row -> measure -> estimate; at most 4 measures are drawn.
        name, caption: as in `intervals`.
    """
    measures = list(dict.fromkeys(m for of in table.values() for m in of))[: len(_SERIES)]
    step = 0.8 / max(2, len(measures))
    with _style(name):
        figure, axes = _axes(len(table), list(table), row=10 + 11 * len(measures), legend=True)
        for number, measure in enumerate(measures):
            shift = (number - (len(measures) - 1) / 2) * step
            found = [
                (row + shift, of[measure]) for row, of in enumerate(table.values()) if measure in of
            ]
            _whiskers(
                axes, [e for _, e in found], [y for y, _ in found], number, label=_label(measure)
            )
        for row in range(1, len(table)):
            axes.axhline(row - 0.5, color=_GRID, linewidth=0.8)
        _value_axis(axes, [estimate for of in table.values() for estimate in of.values()])
        _legend(axes, len(measures))
        return _svg(figure, name, caption)


def sweep(points: Mapping[float, Mapping[str, Estimate]], x: str, name: str, caption: str) -> str:
    """Draw each measure as a line over shares in percent, with a band over its intervals.

    Args:
        points: percent -> measure -> estimate; at most 4 measures are drawn.
        x: what the shares are of.
        name, caption: as in `intervals`.
    """
    shares = sorted(points)
    measures = list(dict.fromkeys(m for share in shares for m in points[share]))[: len(_SERIES)]
    with _style(name):
        figure = Figure(figsize=(_WIDTH / 72, 260 / 72), layout="constrained")
        axes = figure.add_subplot()
        for number, measure in enumerate(measures):
            at = [share for share in shares if measure in points[share]]
            found = [points[share][measure] for share in at]
            colour = _SERIES[number]
            axes.fill_between(
                at,
                [e.low for e in found],
                [e.high for e in found],
                color=colour,
                alpha=0.18,
                linewidth=0,
            )
            axes.plot(
                at,
                [e.mean for e in found],
                color=colour,
                marker=_MARKERS[number],
                markersize=5,
                linewidth=1.8,
                label=_label(measure),
            )
        axes.set_xlabel(x)
        axes.xaxis.set_major_formatter("{x:.0f} %")
        axes.set_xticks(shares if len(shares) <= 7 else [0, 25, 50, 75, 100])
        axes.grid(axis="y", color=_GRID, linewidth=0.8)
        axes.set_ylim(_limits([e for of in points.values() for e in of.values()]))
        axes.spines[["top", "right", "left"]].set_visible(False)
        _legend(axes, len(measures))
        return _svg(figure, name, caption)


def bars(rows: Sequence[tuple[str, int]], good: Sequence[str], name: str, caption: str) -> str:
    """Draw counts as bars with their numbers and shares.

    Args:
        rows: labels and counts, from top to bottom.
        good: the labels of what is no loss.
        name, caption: as in `intervals`.
    """
    total = sum(count for _, count in rows)
    with _style(name):
        figure, axes = _axes(len(rows), [label for label, _ in rows])
        colours = [_GOOD if label in good else _BAD for label, _ in rows]
        axes.barh(range(len(rows)), [count for _, count in rows], height=0.62, color=colours)
        for row, (_, count) in enumerate(rows):
            axes.annotate(
                f"{count:,} · {count / total:.0%}" if count else "0",
                (count, row),
                (5, 0),
                textcoords="offset points",
                va="center",
                color=_INK,
            )
        axes.set_xlim(0, max(1, *(count for _, count in rows)) * 1.32)
        axes.xaxis.set_visible(False)
        axes.spines[["bottom"]].set_visible(False)
        axes.spines[["left"]].set_visible(True)
        return _svg(figure, name, caption)


def _style(name: str) -> AbstractContextManager[None]:
    return mpl.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": name,
            "text.parse_math": False,
            "font.family": ["DejaVu Sans"],
            "font.size": 11.0,
            "text.color": _INK,
            "axes.labelcolor": _MUTED,
            "axes.edgecolor": _MUTED,
            "axes.linewidth": 0.8,
            "xtick.color": _MUTED,
            "ytick.color": _MUTED,
            "xtick.labelcolor": _MUTED,
            "ytick.labelcolor": _INK,
            "axes.axisbelow": True,
        }
    )


def _axes(
    count: int, labels: Sequence[str], *, row: float = _ROW, legend: bool = False
) -> tuple[Figure, Axes]:
    height = count * row + 34 + (26 if legend else 0)
    figure = Figure(figsize=(_WIDTH / 72, height / 72), layout="constrained")
    axes = figure.add_subplot()
    axes.set_ylim(count - 0.5, -0.5)
    axes.set_yticks(range(count), [_label(label) for label in labels])
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return figure, axes


def _whiskers(
    axes: Axes, estimates: Sequence[Estimate], places: Sequence[float], number: int, label: str = ""
) -> None:
    colour = _SERIES[number]
    lows, highs = [e.low for e in estimates], [e.high for e in estimates]
    axes.hlines(places, lows, highs, color=colour, linewidth=2, alpha=0.55)
    means = [e.mean for e in estimates]
    axes.plot(
        means,
        places,
        _MARKERS[number],
        color=colour,
        markersize=6,
        markeredgewidth=0,
        label=label or None,
        clip_on=False,
    )


def _value_axis(axes: Axes, estimates: Sequence[Estimate]) -> None:
    low, high = _limits(estimates)
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="x", color=_GRID, linewidth=0.8)
    if low < 0 < high:
        axes.axvline(0, color=_MUTED, linewidth=1)


def _limits(estimates: Sequence[Estimate]) -> tuple[float, float]:
    """Return 0 to 1 for shares, and else a range that holds all intervals and 0."""
    low, high = min(e.low for e in estimates), max(e.high for e in estimates)
    if low >= 0 and high <= 1:
        return 0.0, 1.0
    room = 0.06 * (max(high, 0.0) - min(low, 0.0))
    return min(low - room, 0.0), max(high + room, 0.0)


def _legend(axes: Axes, columns: int) -> None:
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=columns,
        frameon=False,
        borderaxespad=0,
        handletextpad=0.3,
        columnspacing=1.4,
        borderpad=0.3,
    )


def _label(text: str) -> str:
    line = " ".join(_UNSAFE.sub("\ufffd", text).split()) or "–"
    return line if len(line) <= _LABEL else line[: _LABEL - 1] + "…"


def _svg(figure: Figure, name: str, caption: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if _local(child.tag) in {"metadata", "style"}:
                parent.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)
        attributes = {_local(key): _own(key, value, name) for key, value in element.items()}
        element.attrib.clear()
        element.attrib.update(attributes)
    del root.attrib["version"]
    root.attrib |= {"class": "chart", "role": "img", "aria-label": _UNSAFE.sub("\ufffd", caption)}
    return ElementTree.tostring(root, encoding="unicode")


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _own(key: str, value: str, name: str) -> str:
    """Make an attribute's ids the chart's own, and its colours the page's."""
    if key == "id":
        return f"{name}-{value}"
    value = re.sub(r"^#|(?<=url\()#", f"#{name}-", value) if "#" in value else value
    return _COLOUR.sub(lambda match: f"var(--{_NAMES[match[0]]})", value)
