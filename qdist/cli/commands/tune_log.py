"""The trials of a search in MLflow: a child run each, sent beside the search.

A thread of its own sends what is handed over, so that the search waits for no server. What a trial
gave is one call; the curves of the parent are collected and sent together.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from qdist.cli.commands.trial_models import MODEL, PLAN, TrialModels
from qdist.cli.tracking import Run
from qdist.cli.tracking.run import now_ms
from qdist.emit.shared_weights import SharedWeights
from qdist.plan.precision import PRECISIONS
from qdist.search.trial import Choices, Trial

CURVES_EVERY_S = 2.0
"""Seconds for which points of the parent's curves are collected, at least."""
WEIGHTS = "weights"
"""The parent's folder of weights that several trials' models share."""


class TrialLog:
    """Logs trials below ``parent``; a context manager around the search. Leaving it waits until all
    is sent or spooled, and raises what the spool could not keep.

    ``models``: where those of the trials are. ``artifacts``: as `qdist.cli.tracking.TrackingSpec`
    has it. ``costs``: what a plan costs, by name. Trials that the parent's run has already, from a
    search that was killed, are not logged again.
    """

    def __init__(
        self,
        parent: Run,
        models: TrialModels,
        model: str,
        artifacts: str,
        costs: Callable[[Choices], Mapping[str, float]] | None = None,
    ) -> None:
        self._parent = parent
        self._models = models
        self._model = model
        self._artifacts = artifacts
        self._costs = costs or (lambda choices: {})
        self._todo: queue.SimpleQueue[Trial | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="trial log", daemon=True)
        self._failure: BaseException | None = None
        self._points: list[tuple[str, float, int, int]] = []
        self._sent_at = time.monotonic()
        self._best: Trial | None = None
        self._n_best = 0
        self._weights = SharedWeights(models.folder / WEIGHTS)
        self._runs: dict[int, str] = {}
        self.seconds = 0.0
        """What sending took, all trials together."""

    def __enter__(self) -> Self:
        self._known = self._parent.children()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._todo.put(None)
        self._thread.join()
        self._send_points()
        if self._failure is not None and error is None:
            raise self._failure

    def add(self, trial: Trial) -> None:
        """Log a finished trial, soon."""
        self._todo.put(trial)

    def send_models(self, trials: Iterable[Trial]) -> None:
        """Send the models of these trials too, once the search has ended."""
        for trial in trials:
            run = self._runs.get(trial.candidate.number)
            if run is not None:
                child = self._parent.start_child("", resume=run)
                self._send_model(child, trial, best=True)
                child.end()

    def _work(self) -> None:
        while (trial := self._todo.get()) is not None:
            begin = time.perf_counter()
            try:
                if self._failure is None:
                    self._log(trial)
            except BaseException as error:  # noqa: BLE001 (raised where the block is left)
                self._failure = error
            self.seconds += time.perf_counter() - begin

    def _log(self, trial: Trial) -> None:
        number, plan = trial.candidate.number, str(trial.details.get("plan_digest", ""))
        self._add_points(trial)
        known = self._known.get(number)
        is_same = known is not None and known.tags.get("qdist.plan_digest") == plan
        if known is not None and is_same and known.status == "FINISHED":
            self._runs[number] = known.run
            return
        child = self._parent.start_child(
            f"trial-{number:03d} {trial.candidate.label}",
            tags={"qdist.number": str(number), "qdist.plan_digest": plan},
            resume=known.run if known is not None and is_same else None,
        )
        self._runs[number] = child.id
        child.log(metrics=self._metrics(trial), params=self._params(trial), tags=_tags(trial))
        child.log_table(_layer_rows(trial), "layers.csv")
        if trial.evaluation is not None and trial.evaluation.output_tail:
            child.log_text(trial.evaluation.output_tail, "evaluation.log")
        place = self._models.place(number) / PLAN
        if place.exists():
            child.log_text(place.read_text(encoding="utf-8"), place.name)
        if self._artifacts == "all":
            self._send_model(child, trial, best=False)
        child.end()

    def _params(self, trial: Trial) -> dict[str, Any]:
        candidate = trial.candidate
        counts = trial.details.get("counts", {})
        found = counts if isinstance(counts, Mapping) else {}
        return {
            "model": self._model,
            "label": candidate.label,
            "strategy": self._parent.params.get("strategy", ""),
            "round": candidate.round,
            "saturation": _common(choice.saturation for choice in candidate.choices.values()),
            "changed_layers": len(candidate.changed),
            **{f"layers_{name}": found.get(name, 0) for name in PRECISIONS},
        }

    def _send_model(self, child: Run, trial: Trial, *, best: bool) -> None:
        """The model, in full where it is small; of a larger one the weights go to the parent."""
        with self._models.at(trial.candidate.number) as place:
            if place is not None:
                self._send_files(child, place, best=best)

    def _send_files(self, child: Run, place: Path, *, best: bool) -> None:
        shared = self._weights.split(place / MODEL)
        if shared is None:
            for path in sorted(place.glob(f"{MODEL}*")):
                child.log_artifact(path, best=best)
            return
        for path in shared.fresh:
            self._parent.log_artifact(path, WEIGHTS)
        child.log_artifact(shared.graph, best=best)
        self._weights.forget(shared)

    def _metrics(self, trial: Trial) -> dict[str, float]:
        return {**_metrics(trial), **self._costs(trial.candidate.choices)}

    def _add_points(self, trial: Trial) -> None:
        """Every trial's numbers as curves of the parent, and the best so far."""
        now, number = now_ms(), trial.candidate.number
        for name, value in self._metrics(trial).items():
            self._points.append((name, value, now, number))
        if trial.report is not None and (self._best is None or trial.rank > self._best.rank):
            self._best = trial
        if self._best is not None and self._best.report is not None:
            # By the order of ending, since that is what "so far" means.
            best = self._best
            self._points += [
                ("best_so_far", self._best.report.score, now, self._n_best),
                ("best_so_far_mb", best.n_bytes / 1e6, now, self._n_best),
            ]
        self._n_best += 1
        if time.monotonic() - self._sent_at >= CURVES_EVERY_S:
            self._send_points()

    def _send_points(self) -> None:
        points, self._points = self._points, []
        self._sent_at = time.monotonic()
        if points:
            self._parent.log_points(points)


def _metrics(trial: Trial) -> dict[str, float]:
    candidate = trial.candidate
    seconds = {k: v for k, v in trial.details.items() if isinstance(v, float)}
    found: dict[str, float] = {"artifact_mb": trial.n_bytes / 1e6, **seconds}
    if trial.n_bytes:
        found["bytes"] = float(trial.n_bytes)
    if candidate.predicted is not None:
        found["predicted"] = candidate.predicted
    if trial.report is not None:
        found |= {"score": trial.report.score, **trial.report.metrics}
    return found


def _tags(trial: Trial) -> dict[str, str]:
    tags = {
        "qdist.status": "ok" if trial.report else "failed",
        "qdist.changed": ", ".join(trial.candidate.changed),
        "qdist.reused": str(bool(trial.details.get("reused"))).lower(),
    }
    if trial.evaluation is not None and trial.evaluation.exit_status is not None:
        tags["qdist.exit_status"] = str(trial.evaluation.exit_status)
    return tags if trial.report else {**tags, "qdist.reason": trial.reason}


def _layer_rows(trial: Trial) -> list[dict[str, Any]]:
    """Every layer's choice, whether it changed, and how far it is off where that was measured."""
    candidate = trial.candidate
    rows = []
    for name, choice in candidate.choices.items():
        row = {"layer": name, **choice.to_json(), "changed": name in candidate.changed}
        if name in trial.layers:
            off = trial.layers[name].to_json()
            row |= {f"in_place_{key}": value for key, value in off.items()}
        rows.append(row)
    return rows


def _common(values: Iterable[str]) -> str:
    kinds = sorted(set(values))
    return kinds[0] if len(kinds) == 1 else "mixed"
