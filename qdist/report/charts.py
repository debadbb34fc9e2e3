"""Where the marks of the page's charts go. Drawing them is the template's part.

Coordinates are those of an SVG's ``viewBox``: x to the right, y down, rounded to tenths.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qdist.evaluate.compare import LayerComparison
from qdist.report import text
from qdist.report.values import Summary, TrialRow

LAYER_ROWS = 30
_NAME_CHARACTERS = 40
_LEFT, _RIGHT, _TOP, _BOTTOM = 62.0, 484.0, 22.0, 274.0
"""Where the charts of trials have their axes."""
_ROOM = 12.0
"""Between an axis and the first and last mark."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """A grid line: position on its axis and label."""

    at: float
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """A linear map of ``low .. high`` onto ``start .. end`` (pixels, in either direction)."""

    low: float
    high: float
    start: float
    end: float
    step: float

    def at(self, value: float) -> float:
        """The pixel of a value; infinities and what lies outside go to the ends."""
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self) -> list[Tick]:
        """Round values, from low to high."""
        first = math.ceil(self.low / self.step - 1e-6)
        last = math.floor(self.high / self.step + 1e-6)
        digits = max(0, -math.floor(math.log10(self.step) + 1e-9))
        return [
            # Adding zero turns -0 into 0.
            Tick(at=self.at(i * self.step), label=f"{i * self.step + 0.0:.{digits}f}")
            for i in range(first, last + 1)
        ]


def make_axis(
    values: Iterable[float],
    start: float,
    end: float,
    *,
    n_ticks: int = 5,
    from_zero: bool = False,
    least_step: float = 0.0,
) -> Axis:
    """An axis over the finite values with a little room, or from zero, that ends on round values.

    Never empty: equal values get room on both sides.
    """
    finite = [value for value in values if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        room = 0.05 * abs(high) or 1.0
        low, high = low if from_zero else low - room, high + room
    step = max(_round_step((high - low) / n_ticks), least_step)
    # A multiple of the step may miss the value it stands for by a rounding error.
    low = min(low, math.floor(low / step + 1e-9) * step)
    high = max(high, math.ceil(high / step - 1e-9) * step)
    return Axis(low=low, high=high, start=start, end=end, step=step)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerBar:
    """One layer: bars from the zero line, as x and width, and what is written beside them."""

    y: float
    name: str
    shown: str
    about: str
    in_place: tuple[float, float]
    alone: tuple[float, float]
    in_place_text: str
    alone_text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerChart:
    """SQNR of the worst layers: bars in place and alone."""

    width: float
    height: float
    top: float
    bottom: float
    zero: float
    ticks: list[Tick]
    bars: list[LayerBar]
    columns: tuple[float, float]


def layer_chart(layers: Sequence[LayerComparison], limit: int = LAYER_ROWS) -> LayerChart:
    """The ``limit`` worst in place, the worst first."""
    worst = sorted(layers, key=lambda row: row.in_place.sqnr_db)[:limit]
    row_height, top, left, right, width = 25.0, 34.0, 300.0, 880.0, 1020.0
    values = [v for row in worst for v in (row.in_place.sqnr_db, row.alone.sqnr_db)]
    axis = make_axis(values, left, right, n_ticks=6, from_zero=True)
    zero = axis.at(0.0)

    def bar(value: float) -> tuple[float, float]:
        end = axis.at(value)
        return min(zero, end), max(round(abs(end - zero), 1), 1.0)

    bars = [
        LayerBar(
            y=round(top + i * row_height, 1),
            name=row.name,
            shown=text.shorten(row.name, _NAME_CHARACTERS),
            about=f"{row.name} ({row.op_type}, {row.precision}): {_db(row.in_place.sqnr_db)} in "
            f"place, {_db(row.alone.sqnr_db)} alone",
            in_place=bar(row.in_place.sqnr_db),
            alone=bar(row.alone.sqnr_db),
            in_place_text=text.db_text(row.in_place.sqnr_db),
            alone_text=text.db_text(row.alone.sqnr_db),
        )
        for i, row in enumerate(worst)
    ]
    bottom = top + row_height * len(bars)
    return LayerChart(
        width=width,
        height=bottom + 26,
        top=top,
        bottom=bottom,
        zero=zero,
        ticks=axis.ticks(),
        bars=bars,
        columns=(950.0, 1016.0),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A trial as a point. ``kind``: ``best``, ``baseline``, ``both``, ``failed`` or ``other``;
    ``leftward``: its label goes to its left."""

    x: float
    y: float
    kind: str
    about: str
    leftward: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialChart:
    """Points, grid lines, the float model's score as a line, and the best so far as steps."""

    x_title: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    marks: list[Mark]
    float_y: float | None
    steps: str = ""
    width: float = 500.0
    height: float = 330.0
    left: float = _LEFT
    right: float = _RIGHT
    top: float = _TOP
    bottom: float = _BOTTOM


def size_chart(summary: Summary, trials: Sequence[TrialRow]) -> TrialChart:
    """Score over artifact size, of the trials that have both."""
    scored = [row for row in trials if row.score is not None and row.n_bytes]
    unit, name = _size_unit(max((row.n_bytes for row in scored), default=0))
    sizes = [row.n_bytes / unit for row in scored]
    x_axis = make_axis(sizes, _LEFT + _ROOM, _RIGHT - _ROOM, n_ticks=4)
    y_axis = _score_axis(summary, scored)
    marks = [_mark(row, x_axis.at(size), y_axis) for row, size in zip(scored, sizes, strict=True)]
    return TrialChart(
        x_title=f"artifact size, {name}",
        x_ticks=x_axis.ticks(),
        y_ticks=y_axis.ticks(),
        marks=_marked_last(marks),
        float_y=None if summary.float_score is None else y_axis.at(summary.float_score),
    )


def progress_chart(summary: Summary, trials: Sequence[TrialRow]) -> TrialChart:
    """Score over trial number; failed trials lie on the lower edge."""
    rows = sorted(trials, key=lambda row: row.number)
    scored = [row for row in rows if row.score is not None]
    numbers = [float(row.number) for row in rows]
    x_axis = make_axis(numbers, _LEFT + _ROOM, _RIGHT - _ROOM, n_ticks=6, least_step=1.0)
    y_axis = _score_axis(summary, scored)
    return TrialChart(
        x_title="trial",
        x_ticks=x_axis.ticks(),
        y_ticks=y_axis.ticks(),
        marks=_marked_last([_mark(row, x_axis.at(row.number), y_axis) for row in rows]),
        float_y=None if summary.float_score is None else y_axis.at(summary.float_score),
        steps=_steps(rows, x_axis, y_axis, higher=summary.higher_is_better),
    )


def _steps(rows: Sequence[TrialRow], x_axis: Axis, y_axis: Axis, *, higher: bool) -> str:
    """The best score so far as the path of a step line."""
    path, best = "", None
    for row in rows:
        if row.score is not None:
            improved = best is None or (row.score > best if higher else row.score < best)
            best = row.score if improved else best
        if best is None:
            continue
        x = x_axis.at(row.number)
        path += f"H{x}V{y_axis.at(best)}" if path else f"M{x},{y_axis.at(best)}"
    return path


def _score_axis(summary: Summary, scored: Sequence[TrialRow]) -> Axis:
    scores = [row.score for row in scored if row.score is not None]
    if summary.float_score is not None:
        scores.append(summary.float_score)
    return make_axis(scores, _BOTTOM - _ROOM, _TOP + _ROOM)


def _mark(row: TrialRow, x: float, y_axis: Axis) -> Mark:
    outcome = f"failed, {row.reason}" if row.score is None else text.score_text(row.score)
    size = f", {text.size_text(row.n_bytes)}" if row.n_bytes else ""
    return Mark(
        x=x,
        y=_BOTTOM if row.score is None else y_axis.at(row.score),
        kind=_kind(row),
        about=f"trial {row.number}, {row.label}: {outcome}{size}",
        leftward=x > (_LEFT + _RIGHT) / 2,
    )


def _kind(row: TrialRow) -> str:
    if row.score is None:
        return "failed"
    if row.is_best:
        return "both" if row.is_baseline else "best"
    return "baseline" if row.is_baseline else "other"


def _marked_last(marks: list[Mark]) -> list[Mark]:
    """What is drawn last lies on top."""
    order = {"failed": 0, "other": 1, "baseline": 2, "best": 3, "both": 3}
    return sorted(marks, key=lambda mark: order[mark.kind])


def _size_unit(n_bytes: int) -> tuple[float, str]:
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n_bytes >= unit:
            return unit, name
    return 1.0, "bytes"


def _round_step(step: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is not below ``step``."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * f for f in (1, 2, 5, 10) if power * f >= step * (1 - 1e-9))


def _db(value: float) -> str:
    return text.metric_text("sqnr_db", value)
