"""The figures' names, what they mean, their bounds, and the table that says which are met."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A figure. ``bound`` is for the encoder, ``others`` for the other models; None: only reported.

    ``is_least``: the figure has to be at least the bound, else at most.
    """

    key: str
    meaning: str
    bound: float | None = None
    others: float | None = None
    is_least: bool = False

    def bound_on(self, model: str) -> float | None:
        """The bound that holds for this model."""
        return self.bound if model == "encoder" else self.others

    def holds(self, model: str, value: float) -> bool | None:
        """Whether the bound is met; None without one."""
        bound = self.bound_on(model)
        if bound is None:
            return None
        return value >= bound if self.is_least else value <= bound

    def bound_text(self, model: str) -> str:
        """The bound as the table has it."""
        bound = self.bound_on(model)
        if bound is None:
            return "report"
        return f"{'>=' if self.is_least else '<='} {bound:g}"


FIGURES = (
    Figure(
        key="ratio_compute_taps",
        meaning="calibration of N samples, one worker, start-up excluded / plain float run",
        bound=1.25,
    ),
    Figure(
        key="ratio_all_taps",
        meaning="the same, every distinct activation",
        bound=1.50,
    ),
    Figure(
        key="all_taps_vs_bound",
        meaning="all taps / (float run that returns all taps + 0.6 ns per element)",
        others=1.25,
    ),
    Figure(
        key="kernel_vs_copy",
        meaning="histogram kernel / memory copy of the same data",
        bound=2.5,
        others=2.5,
    ),
    Figure(
        key="speedup_vs_ort_percentile",
        meaning="ONNX Runtime's percentile calibrator / ours, ranges included",
        bound=10,
        others=6,
        is_least=True,
    ),
    Figure(
        key="speedup_vs_ort_percentile_distinct",
        meaning="the same where ONNX Runtime is given the distinct tensors alone",
    ),
    Figure(
        key="limit_vs_ort_percentile",
        meaning="ONNX Runtime's percentile calibrator / a plain float run in as many processes",
    ),
    Figure(
        key="speedup_vs_ort_entropy",
        meaning="ONNX Runtime's entropy calibrator / ours, ranges included",
        bound=10,
        others=6,
        is_least=True,
    ),
    Figure(
        key="speedup_vs_ort_entropy_distinct",
        meaning="the same where ONNX Runtime is given the distinct tensors alone",
    ),
    Figure(
        key="limit_vs_ort_entropy",
        meaning="ONNX Runtime's entropy calibrator / a plain float run in as many processes",
    ),
    Figure(
        key="rss_vs_ort_percentile",
        meaning="peak RSS above the loaded model, N = 64 / the same of ONNX Runtime's",
        bound=0.25,
    ),
    Figure(key="rss_growth", meaning="peak RSS at 1,024 samples / at 64", bound=1.03),
    Figure(
        key="two_worker_speedup",
        meaning="throughput of 2 workers / 1 worker on 2 cores, start-up excluded",
        bound=1.8,
        is_least=True,
    ),
    Figure(key="commit_share", meaning="time in store commits / total", bound=0.05),
    Figure(
        key="resume_overhead",
        meaning="a fully finished run of at least 120 s repeated / the first",
        bound=0.05,
    ),
    Figure(
        key="merge_s_per_1000_shards",
        meaning="seconds to read and merge 1,000 records of 300 rows in one process",
    ),
    Figure(
        key="merge_tree_s_per_1000_shards",
        meaning="the same as a tree, whose nodes two workers make and keep, start-up excluded",
    ),
)


def with_bounds(model: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of one model, and under ``bounds`` which bound each has and whether it holds."""
    bounds = {
        figure.key: {
            "bound": figure.bound_on(model),
            "kind": "at least" if figure.is_least else "at most",
            "holds": figure.holds(model, figures[figure.key]),
        }
        for figure in FIGURES
        if isinstance(figures.get(figure.key), int | float)
    }
    return {**figures, "bounds": bounds}


def keys_text() -> str:
    """What ``--keys`` prints."""
    return "\n".join(
        f"{figure.key:28} {figure.bound_text('encoder'):>8} on the encoder, "
        f"{figure.bound_text(''):>8} on the others: {figure.meaning}"
        for figure in FIGURES
    )


def markdown(results: Mapping[str, Mapping[str, Any]]) -> str:
    """One row per figure, one column per model; a bound that does not hold is in bold."""
    models = [name for name, found in results.items() if "skipped" not in found]
    lines = [
        "| figure | bound on encoder | " + " | ".join(models) + " |",
        "| --- | --- |" + " --- |" * len(models),
    ]
    for figure in FIGURES:
        cells = [_cell(figure, model, results[model].get(figure.key)) for model in models]
        lines.append(
            f"| `{figure.key}` | {figure.bound_text('encoder')} | " + " | ".join(cells) + " |"
        )
    return "\n".join(lines)


def _cell(figure: Figure, model: str, value: Any) -> str:
    if not isinstance(value, int | float):
        return "-"
    text = f"{value:.3g}"
    bound = figure.bound_on(model)
    if bound is not None and model != "encoder":
        text += f" ({figure.bound_text(model)})"
    return f"**{text}**" if figure.holds(model, value) is False else text
