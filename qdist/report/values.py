"""The facts that a report is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qdist.evaluate.compare import LayerComparison
from qdist.evaluate.evaluation_run import EvaluationRun

if TYPE_CHECKING:  # importing SciPy takes time that other commands should not pay
    from qdist.evaluate.paired import Difference

STATUSES = ("ok", "failed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The outcome of a run.

    ``float_score`` and ``quantized_score``: in the units of ``metric``, None where not measured.
    ``n_samples``: how many were scored, None where the evaluation does not say. ``float_bytes``
    and ``quantized_bytes``: the models with their external data. ``precision_counts``: layers of
    each precision. ``coverage``: how much of the model is quantized, in words. ``beside``:
    label-free metrics against the float model (``agreement`` 0..1, ``sqnr_db``, ``cosine``); other
    metrics may stand there too. ``places``: label -> path, URL or command. ``seconds``: the whole
    run.
    """

    title: str
    model: str
    float_score: float | None
    quantized_score: float | None
    metric: str
    higher_is_better: bool
    n_samples: int | None
    float_bytes: int
    quantized_bytes: int
    precision_counts: Mapping[str, int]
    coverage: str
    beside: Mapping[str, float]
    worst_layers: tuple[LayerComparison, ...]
    places: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    seconds: float

    def __post_init__(self) -> None:
        if self.float_bytes < 0 or self.quantized_bytes < 0:
            raise ValueError(f"sizes {self.float_bytes} and {self.quantized_bytes} must be >= 0")
        if not self.seconds >= 0:
            raise ValueError(f"seconds {self.seconds} must be >= 0")
        if any(n < 0 for n in self.precision_counts.values()):
            raise ValueError(f"negative layer counts in {dict(self.precision_counts)}")

    @property
    def change(self) -> float | None:
        """How much better the quantized model scores: negative when it is worse."""
        if self.float_score is None or self.quantized_score is None:
            return None
        difference = self.quantized_score - self.float_score
        return difference if self.higher_is_better else -difference

    @property
    def size_share(self) -> float | None:
        """Quantized size over float size; None when the latter is unknown."""
        return self.quantized_bytes / self.float_bytes if self.float_bytes else None


@dataclass(frozen=True, slots=True, kw_only=True)
class UnseenRow:
    """A trial on samples that its search did not see. ``score``: there. ``over_plain`` and
    ``over_float``: how much better than the plain plan and the float model, negative where worse;
    None where that is not known, or of the plain plan itself. ``sure_plain`` and ``sure_float``:
    whether the difference counts (`qdist.evaluate.paired`)."""

    number: int
    label: str
    score: float
    over_plain: Difference | None
    over_float: Difference | None
    sure_plain: bool = False
    sure_float: bool = False
    is_best: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRow:
    """One trial of a search.

    ``score``: None when it failed, and then ``reason`` says why. ``n_bytes``: its artifact, 0 when
    none was written. ``counts``: layers of each precision. ``changed``: layers that differ from
    the baseline. ``status``: one of `STATUSES`. ``evaluation``: how its evaluation went; None where
    the trial did not get so far.
    """

    number: int
    label: str
    score: float | None
    metrics: Mapping[str, float]
    n_bytes: int
    counts: Mapping[str, int]
    changed: tuple[str, ...]
    status: str
    reason: str
    seconds: float
    is_best: bool
    is_baseline: bool
    evaluation: EvaluationRun | None = None

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status must be one of {STATUSES}, got {self.status!r}")
        if (self.score is None) == (self.status == "ok"):
            raise ValueError(f"a trial that is {self.status} with score {self.score}")
        if self.is_best and self.score is None:
            raise ValueError("a failed trial cannot be the best")
