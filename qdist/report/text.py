"""How values read as text: the same in terminal tables and on the page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # importing SciPy takes time that other commands should not pay
    from qdist.evaluate.paired import Difference

ELLIPSIS = "\u2026"
MINUS = "\u2212"
UNKNOWN = "\u2013"

_PRECISIONS = ("w4a8", "int8", "w4a16", "w8a16", "int16", "float32")
_RATES = ("top1", "top5", "accuracy", "agreement")


def shorten(name: str, width: int) -> str:
    """``name`` in at most ``width`` characters, cut in the middle: both ends tell layers apart.

    >>> shorten("/blocks.0/attention/MatMul", 12)
    '/bloc…MatMul'
    """
    if len(name) <= width:
        return name
    if width <= 1:
        return ELLIPSIS[:width]
    head = (width - 1) // 2
    return name[:head] + ELLIPSIS + name[len(name) - (width - 1 - head) :]


def score_text(value: float | None) -> str:
    """A score: four decimals when small, five significant digits when not."""
    if value is None:
        return UNKNOWN
    if not math.isfinite(value):
        return number_text(value)
    if value == 0 or 1e-3 <= abs(value) < 10:
        return f"{value:.4f}"
    return f"{value:.5g}"


def change_text(value: float | None) -> str:
    """A signed difference of scores."""
    if value is None:
        return UNKNOWN
    text = score_text(abs(value))
    if value == 0 or not any(digit in text for digit in "123456789"):
        return "\u00b10"
    return f"{'+' if value > 0 else MINUS}{text}"


def difference_text(found: Difference | None) -> str:
    """A difference with its interval."""
    if found is None:
        return UNKNOWN
    low, high = change_text(found.low), change_text(found.high)
    return f"{change_text(found.mean)} ({low} .. {high})"


def number_text(value: float) -> str:
    """Any number in four significant digits; whole where that is shorter."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return f"{value:.4g}"


def db_text(value: float) -> str:
    """A signal-to-noise ratio in dB, without the unit; ``exact`` when there is no noise."""
    return (
        "exact"
        if value == math.inf
        else number_text(value)
        if math.isinf(value)
        else f"{value:.2f}"
    )


def cosine_text(value: float) -> str:
    """A cosine, with the digits in which layers differ."""
    return f"{value:.5f}"


def share_text(value: float | None) -> str:
    """A share of 0..1 in per cent; a share that is not zero never reads as 0 %."""
    if value is None:
        return UNKNOWN
    if 0 < value < 5e-5:
        return "<0.01 %"
    return f"{100 * value:.2f} %"


def metric_text(name: str, value: float) -> str:
    """A metric that stands beside the score, with its unit."""
    if name == "sqnr_db":
        return db_text(value) if math.isinf(value) else f"{db_text(value)} dB"
    if name == "cosine":
        return cosine_text(value)
    if name in _RATES and 0 <= value <= 1:
        return share_text(value)
    return score_text(value)


def size_text(n_bytes: int) -> str:
    """A size in decimal units: ``0 B``, ``12.3 kB``, ``4.56 MB``."""
    size = float(n_bytes)
    if size < 1000:
        return f"{n_bytes} B"
    for unit in ("kB", "MB", "GB", "TB"):
        size /= 1000
        if size < 999.5 or unit == "TB":
            break
    digits = 2 if size < 10 else 1 if size < 100 else 0
    return f"{size:.{digits}f} {unit}"


def duration_text(seconds: float) -> str:
    """A time: ``0.42 s``, ``12.3 s``, ``3 min 05 s``, ``2 h 10 min``."""
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def counts_text(counts: Mapping[str, int]) -> str:
    """Layers of each precision, the narrowest first: ``40 int8, 2 float32``."""
    return ", ".join(f"{n} {name}" for name, n in in_order(counts)) or UNKNOWN


def in_order(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    """The precisions that occur with their counts, the narrowest first, float last."""
    known = [(name, counts[name]) for name in _PRECISIONS if counts.get(name)]
    return known + [(k, n) for k, n in sorted(counts.items()) if n and k not in _PRECISIONS]


def listing(names: Iterable[str], limit: int) -> str:
    """The first ``limit`` names, and how many there are beyond."""
    every = list(names)
    text = ", ".join(every[:limit])
    return f"{text} and {len(every) - limit} more" if len(every) > limit else text
