"""The front of a search as a chart to explore: one self-contained HTML file."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from qdist.evaluate.report import EvalReport
from qdist.files import write_text
from qdist.report import text
from qdist.report.values import TrialRow

TEMPLATE = "front.html.j2"


def write_front_page(
    path: Path,
    trials: Sequence[TrialRow],
    front: Collection[int],
    best: EvalReport,
    float_score: float | None,
) -> Path:
    """Write the chart to ``path``, whole or not at all. ``front``: numbers of the trials on it;
    ``best``: the report of the best, which says what the score is. Raises QD603."""
    return write_text(path, render_front_page(trials, front, best, float_score))


def render_front_page(
    trials: Sequence[TrialRow],
    front: Collection[int],
    best: EvalReport,
    float_score: float | None,
) -> str:
    """The chart as HTML: any two of the trials' numbers against each other, a trial's facts under
    the pointer. Equal arguments give equal text."""
    points = [_point(row, row.number in front) for row in trials if row.score is not None]
    names = list(dict.fromkeys(name for point in points for name in point["numbers"]))
    data = {
        "points": points,
        "names": names,
        "float": {best.metric: float_score},
        "score": best.metric,
        "size": "size, MB",
    }
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(
        files("qdist.report").joinpath(TEMPLATE).read_text(encoding="utf-8")
    )
    # In a script "</" would end it, and names come from models.
    script = json.dumps(data, allow_nan=False, sort_keys=True).replace("<", "\\u003c")
    n_failed = sum(row.score is None for row in trials)
    return template.render(data=script, n=len(points), n_front=len(front), n_failed=n_failed)


def _point(row: TrialRow, on_front: bool) -> dict[str, Any]:
    numbers = {
        "size, MB": row.n_bytes / 1e6,
        "trial": float(row.number),
        "changed layers": float(len(row.changed)),
        "seconds": row.seconds,
        **row.metrics,
    }
    return {
        "number": row.number,
        "label": row.label,
        "front": on_front,
        "best": row.is_best,
        "layers": text.counts_text(row.counts),
        "numbers": {name: value for name, value in numbers.items() if math.isfinite(value)},
    }
