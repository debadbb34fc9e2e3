"""What an evaluation of one model found: the number a search ranks by, and everything beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from qdist.errors import EvaluationError
from qdist.evaluate.evaluation_run import LOG_CHARACTERS, EvaluationRun

ARTIFACT_EXACT = "artifact-exact"
"""The mode in which the emitted file was run as it is written."""

SCORE = "score"
"""The name of a number that came without one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalReport:
    """One model's score. Immutable by convention; pickles, and round-trips through JSON.

    score: the finite number that a search ranks by.
    metric: its name, a key of ``metrics``.
    higher_is_better: which way it ranks.
    metrics: every named number that was found, the score included. Others may be NaN or infinite.
    n_samples: how many samples were scored; None where the evaluation does not say.
    seconds: wall-clock time.
    log: the tail of the output, at most `LOG_CHARACTERS` of it.
    mode: what was run; "artifact-exact" is the emitted file as it is written.
    per_sample: the score of every sample, in order, where the evaluation gives them.
    stopped_early: the evaluation ended before its last sample, because this model had lost; the
        score is that of the samples so far, and ranks below every one of a whole evaluation.
    exit_status: of a command; None where the evaluation is none.

    Raises `qdist.errors.EvaluationError` QD704 when the score is NaN or infinite, and
    `ValueError` when the fields contradict each other.
    """

    score: float
    metric: str
    higher_is_better: bool
    metrics: Mapping[str, float]
    n_samples: int | None
    seconds: float
    log: str = ""
    mode: str = ARTIFACT_EXACT
    per_sample: tuple[float, ...] = ()
    stopped_early: bool = False
    exit_status: int | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.score):
            raise unusable(
                self.metric,
                got=repr(float(self.score)),
                expected="a finite number",
                mend="check that the model's outputs hold no NaN or infinity; the layers of this "
                "plan may clip or overflow",
            )
        if self.metrics.get(self.metric) != self.score:
            raise ValueError(f"metrics[{self.metric!r}] is not the score {self.score!r}")
        if self.n_samples is not None and self.n_samples < 0:
            raise ValueError(f"n_samples {self.n_samples} < 0")
        if not self.seconds >= 0:
            raise ValueError(f"seconds {self.seconds} < 0")
        object.__setattr__(self, "metrics", dict(self.metrics))
        object.__setattr__(self, "log", self.log[-LOG_CHARACTERS:])

    @property
    def run(self) -> EvaluationRun:
        """How the evaluation went."""
        return EvaluationRun(
            exit_status=self.exit_status, seconds=self.seconds, output_tail=self.log
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON object. Numbers that JSON lacks become the strings "nan", "inf" and "-inf".
        ``per_sample``, ``stopped_early`` and ``exit_status`` are left out where they say
        nothing."""
        rest: dict[str, Any] = {}
        if self.per_sample:
            rest["per_sample"] = list(self.per_sample)
        if self.stopped_early:
            rest["stopped_early"] = True
        if self.exit_status is not None:
            rest["exit_status"] = self.exit_status
        return {
            "score": self.score,
            "metric": self.metric,
            "higher_is_better": self.higher_is_better,
            "metrics": {
                name: value if math.isfinite(value) else str(value)
                for name, value in self.metrics.items()
            },
            "n_samples": self.n_samples,
            "seconds": self.seconds,
            "log": self.log,
            "mode": self.mode,
            **rest,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The report that `to_json` wrote. Raises `TypeError` for missing or unknown fields."""
        fields = dict(value)
        fields["metrics"] = {k: float(v) for k, v in fields.get("metrics", {}).items()}
        fields["per_sample"] = tuple(map(float, fields.get("per_sample", ())))
        return cls(**fields)


def choose_score(
    numbers: Mapping[str, float], metric: str | None, where: str
) -> tuple[str, dict[str, float]]:
    """Which of the ``numbers`` that an evaluation gave is its score: its name, and all of them.

    ``metric`` names it; None takes the only one there is. A number that came without a name is
    keyed `SCORE`, and takes the name that is asked for.

    Raises `qdist.errors.EvaluationError` QD704: no number, several and no name to choose by, the
    named one is missing, or it is NaN or infinite.
    """
    found = dict(numbers)
    if metric is not None and set(found) == {SCORE}:
        found = {metric: found[SCORE]}
    known = ", ".join(sorted(found))
    if not found:
        raise unusable(
            where,
            got="no number",
            expected="a number, or an object of named numbers",
            mend="let the evaluation give its metric",
        )
    if metric is None and len(found) > 1:
        raise unusable(
            where,
            got=f"several metrics: {known}",
            expected="the name of the one to rank by",
            mend="set the evaluation's metric to one of them",
        )
    name = next(iter(found)) if metric is None else metric
    if name not in found:
        raise unusable(
            where,
            got=f"no metric {name!r} among {known}",
            expected=f"a metric named {name!r}",
            mend="name one of those found, or let the evaluation give this one",
        )
    if not math.isfinite(found[name]):
        raise unusable(
            where,
            got=f"{name} = {found[name]}",
            expected="a finite number",
            mend="check the model's outputs for NaN and the evaluation for empty data",
        )
    return name, found


def named_numbers(value: Any) -> dict[str, float]:
    """The numbers in a parsed result: one number (keyed `SCORE`), or those of a mapping.

    Entries of a mapping that are not numbers are left out; booleans are not numbers. NumPy
    scalars and arrays of one element count. Anything else gives an empty dict.
    """
    if isinstance(value, Mapping):
        pairs = ((str(name), _number(item)) for name, item in value.items())
        return {name: number for name, number in pairs if number is not None}
    number = _number(value)
    return {} if number is None else {SCORE: number}


def unusable(where: str, *, got: str, expected: str, mend: str) -> EvaluationError:
    """The QD704 error, to be raised."""
    return EvaluationError("QD704", where=where, got=got, expected=expected, mend=mend)


def _number(value: Any) -> float | None:
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "size", 1) == 1:
        value = item()  # NumPy scalars and arrays of one element
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer beyond the range of floats
        return math.inf if value > 0 else -math.inf
