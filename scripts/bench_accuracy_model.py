"""Everything that the accuracy benchmark measures of one model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any

import bench_accuracy_ort as ort_side
from bench_accuracy_cases import AccuracyCase
from bench_accuracy_ours import TARGET, calibrate, pick
from bench_accuracy_scores import BESIDE, Scores, discordant, float_outputs, paired, score

from qdist.errors import QdistError
from qdist.evaluate.metrics import find_metric
from qdist.plan.choice import LayerChoice
from qdist.plan.target import ProjectedPlan

WIDE = ("int16", "bf16", "fp16")
DEFAULT = LayerChoice(saturation="auto")
SHARES = (0.1, 0.2)
"""Of the layers that pickers may raise."""
SYMMETRIES = (False, True)

Row = dict[str, Any]


class Measured:
    """One model: calibrated once, then plan after plan. ``say`` gets lines of progress."""

    def __init__(self, case: AccuracyCase, folder: Path, say: Callable[[str], None]) -> None:
        self._case = case
        self._path = folder / "quantized.onnx"
        self._say = say
        say(f"{case.name}: calibrating")
        self._ours = calibrate(case, folder)
        self._reference = float_outputs(case)
        own = score(case, case.model, None)
        self._float = own.value(case.metric) if own.parts else None
        self._higher = find_metric(case.metric).higher_is_better
        self._scores: dict[tuple[Any, ...], Scores] = {}

    def everything(
        self, methods: Sequence[str], pickers: Sequence[str]
    ) -> Iterator[dict[str, Any]]:
        """Rows of the default and these methods, the comparison with the best of ONNX Runtime's,
        and what these pickers come to: after every row, all that is known by then."""
        wanted = tuple(dict.fromkeys((DEFAULT.saturation, *methods)))
        rows: list[Row] = []
        found: dict[str, Any] = {
            "metric": self._case.metric,
            "higher_is_better": self._higher,
            "float": self._float,
            "n_calibration": len(self._case.calibration.keys()),
            "n_evaluation": len(self._case.evaluation.keys()),
            "rows": rows,
            "against_ort": [],
            "wide_against_float": [],
            "mixed": [],
            "unfinished": True,
        }
        for row in chain(self._methods(wanted), self._wide(), self._theirs()):
            rows.append(row)
            yield found
        found["against_ort"] = self._against(rows)
        found["wide_against_float"] = self._against_float(rows)
        for row in self._mixed(rows, pickers):
            found["mixed"].append(row)
            yield found
        del found["unfinished"]
        yield found

    def _methods(self, methods: Iterable[str]) -> Iterable[Row]:
        for symmetric in SYMMETRIES:
            for granularity in ("channel", "tensor"):
                for method in methods:
                    choice = replace(DEFAULT, saturation=method, granularity=granularity)
                    yield self._row(
                        self._ours.plan(choice, symmetric=symmetric),
                        tool="qdist",
                        method=method,
                        precision="int8",
                        granularity=granularity,
                        symmetric=symmetric,
                    )

    def _wide(self) -> Iterable[Row]:
        for precision in WIDE:
            choice = replace(DEFAULT, precision=precision)
            yield self._row(
                self._ours.plan(choice, symmetric=True),
                tool="qdist",
                method=DEFAULT.saturation,
                precision=precision,
                granularity="channel",
                symmetric=True,
            )

    def _theirs(self) -> Iterable[Row]:
        model = ort_side.readable(self._case, self._ours.frozen, self._path.parent)
        for symmetric in SYMMETRIES:
            for method in ort_side.METHODS:
                about: Row = {
                    "tool": "onnxruntime",
                    "method": method,
                    "precision": "int8",
                    "granularity": "channel",
                    "symmetric": symmetric,
                }
                self._path.unlink(missing_ok=True)
                error = ort_side.quantize(
                    self._case, model, method, self._path, symmetric=symmetric
                )
                yield {**about, "error": error} if error else self._scored(about)

    def _row(self, projected: ProjectedPlan, **about: Any) -> Row:
        self._ours.write(projected, self._path)
        return self._scored(about)

    def _scored(self, about: Row) -> Row:
        name = " ".join(str(value) for value in about.values())
        try:
            found = score(self._case, self._path, self._reference)
        except QdistError as error:
            self._say(f"{self._case.name}: {name}: {error.code}")
            return {**about, "error": f"{error.code}: {error.got[:200]}"}
        self._scores[tuple(about.values())] = found
        covered = ort_side.coverage(self._path)
        values = found.values()
        shown = ", ".join(f"{key} {value:.4g}" for key, value in values.items())
        self._say(f"{self._case.name}: {name}: {shown}")
        return {
            **about,
            "score": values[self._case.metric],
            **{key: values[key] for key in BESIDE},
            "coverage": covered.share,
            "n_compute": covered.n_compute,
            "n_activations": covered.n_activations,
        }

    def _against(self, rows: list[Row]) -> list[Row]:
        """Our default less the best of theirs, metric by metric, with the same symmetry."""
        found = []
        for symmetric in SYMMETRIES:
            ours = self._scores[_key(rows, "qdist", DEFAULT.saturation, symmetric)]
            for metric in dict.fromkeys((*BESIDE, self._case.metric)):
                higher = find_metric(metric).higher_is_better
                theirs = [
                    (self._scores[key], key[1])
                    for key in self._scores
                    if key[0] == "onnxruntime" and key[4] == symmetric
                ]
                if not theirs:
                    continue
                sign = 1 if higher else -1
                best, method = max(theirs, key=lambda each: sign * each[0].value(metric))
                difference = paired(ours, best, metric)
                worst_end = difference.high if higher else -difference.low
                apart = discordant(ours, best, metric)
                found.append(
                    {
                        "discordant": None if apart is None else asdict(apart),
                        "symmetric": symmetric,
                        "metric": metric,
                        "best": method,
                        "ours": ours.value(metric),
                        "theirs": best.value(metric),
                        "difference": difference.mean,
                        "low": difference.low,
                        "high": difference.high,
                        "is_worse": bool(worst_end < 0),
                    }
                )
        return found

    def _against_float(self, rows: list[Row]) -> list[Row]:
        """Scores in 16 bits less the float model's, with the interval over samples."""
        if self._float is None:
            return []
        own = score(self._case, self._case.model, None)
        found = []
        for row in rows:
            if row.get("precision") not in WIDE or "error" in row:
                continue
            mine = self._scores[_key_of(row)]
            difference = paired(mine, own, self._case.metric)
            worst_end = difference.high if self._higher else -difference.low
            found.append(
                {
                    "precision": row["precision"],
                    "difference": difference.mean,
                    "low": difference.low,
                    "high": difference.high,
                    "is_worse": bool(worst_end < 0),
                }
            )
        return found

    def _mixed(self, rows: list[Row], pickers: Sequence[str]) -> Iterator[Row]:
        """What pickers make of a default that falls more than a point short."""
        for symmetric in SYMMETRIES:
            plain = next(r for r in rows if _is(r, "qdist", DEFAULT.saturation, symmetric))
            gap = self._loss(plain)
            if gap <= self._case.loss_of_a_point:
                continue
            for name in pickers:
                picked = pick(self._ours, name, DEFAULT, symmetric=symmetric)
                for share in SHARES:
                    projected, n_raised, n_layers = picked(share)
                    row = self._row(
                        TARGET.project(projected),
                        tool="qdist",
                        method=f"{name}, {share:.0%}",
                        precision="int8+w8a16",
                        granularity="channel",
                        symmetric=symmetric,
                    )
                    row |= {"picker": name, "n_raised": n_raised, "n_layers": n_layers}
                    if "error" not in row:
                        row["closed"] = 1 - self._loss(row) / gap
                    yield row

    def _loss(self, row: Row) -> float:
        """By how much a score is worse than the float model's; without labels, how often the two
        do not agree."""
        if self._float is None:
            return 1.0 - float(row["agreement"])
        return (self._float - float(row["score"])) * (1 if self._higher else -1)


def _is(row: Row, tool: str, method: str, symmetric: bool) -> bool:
    wanted = (tool, method, "int8", "channel", symmetric)
    return _key_of(row) == wanted


def _key_of(row: Row) -> tuple[Any, ...]:
    names = ("tool", "method", "precision", "granularity", "symmetric")
    return tuple(row[name] for name in names)


def _key(rows: list[Row], tool: str, method: str, symmetric: bool) -> tuple[Any, ...]:
    return _key_of(next(row for row in rows if _is(row, tool, method, symmetric)))
