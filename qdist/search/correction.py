"""What verified trials say about predicted harms: a weight for every group.

A trial's loss is taken for a weighted sum of its groups' harms. The weights are those of a ridge
regression around one common weight, each trial counting by its relative error; with few trials most
groups keep the common weight, and those that explain a surprise move away from it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qdist.search.trial import Trial

_RIDGE = 1.0
_SPREAD = 20.0
"""A group's weight is at most so many times the common one, and at least one part of so many."""
_SQNR = "sqnr_db"


def losses(trials: Sequence[Trial], float_score: float | None) -> list[float | None]:
    """A positive number for each trial that grows as it gets worse; None where it failed.

    The relative energy of the output error (10^(-SQNR/10)) where every trial tells it: it is
    nearly additive, and finer than a score over few samples. Else what the score lacks of the
    float model's, or of the best trial's where that is better or unknown.
    """
    reports = [trial.report for trial in trials]
    known = [report for report in reports if report is not None]
    if known and all(np.isfinite(report.metrics.get(_SQNR, np.nan)) for report in known):
        return [None if r is None else 10 ** (-r.metrics[_SQNR] / 10) for r in reports]
    gains = [r.score if r.higher_is_better else -r.score for r in known]
    if not gains:
        return [None] * len(reports)
    top = max(gains)
    if float_score is not None:
        top = max(top, float_score if known[0].higher_is_better else -float_score)
    lost = iter(top - gain for gain in gains)
    return [None if r is None else next(lost) for r in reports]


def group_weights(
    harms: Sequence[Sequence[float]], lost: Sequence[float | None], n_groups: int
) -> list[float]:
    """The weight of every group. ``harms``: for each trial what its groups harm; ``lost``: its
    loss, see `losses`. All 1 where no trial tells anything."""
    rows = [
        (row, loss)
        for row, loss in zip(harms, lost, strict=True)
        if loss is not None and loss > 0 and np.isfinite(loss) and sum(row) > 0
    ]
    if not rows:
        return [1.0] * n_groups
    phi = np.array([row for row, _ in rows], np.float64)
    loss = np.array([loss for _, loss in rows])
    common = float(np.exp(np.median(np.log(loss / phi.sum(axis=1)))))
    relative = common * phi / loss[:, None]
    rest = 1.0 - relative.sum(axis=1)
    kernel = relative @ relative.T + _RIDGE / len(rows) * np.eye(len(rows))
    moved = relative.T @ np.linalg.solve(kernel, rest)
    factors = np.clip(1.0 + moved, 1 / _SPREAD, _SPREAD)
    return [float(common * factor) for factor in factors]
