"""One self-contained HTML file: no network, no other files, light and dark."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from qdist.evaluate.compare import LayerComparison
from qdist.files import write_text
from qdist.report import text
from qdist.report.charts import LAYER_ROWS, layer_chart, progress_chart, size_chart
from qdist.report.values import Summary, TrialRow, UnseenRow

TEMPLATE = "page.html.j2"


def write_page(
    path: Path,
    summary: Summary,
    layers: Sequence[LayerComparison],
    trials: Sequence[TrialRow] = (),
    unseen: Sequence[UnseenRow] = (),
) -> Path:
    """Write the report to ``path``, whole or not at all. Raises QD603."""
    return write_text(path, render_page(summary, layers, trials, unseen))


def render_page(
    summary: Summary,
    layers: Sequence[LayerComparison],
    trials: Sequence[TrialRow] = (),
    unseen: Sequence[UnseenRow] = (),
) -> str:
    """The report as HTML. Equal arguments give equal text; everything from a model is escaped.
    ``unseen``: trials on samples that the search did not see."""
    # Undefined names are errors, and every value is escaped: names come from models.
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        score=text.score_text,
        change=text.change_text,
        difference=text.difference_text,
        db=text.db_text,
        cosine=text.cosine_text,
        number=text.number_text,
        size=text.size_text,
        duration=text.duration_text,
        listing=text.listing,
        sortable=sortable,
    )
    template = environment.from_string(
        files("qdist.report").joinpath(TEMPLATE).read_text(encoding="utf-8")
    )
    return template.render(
        summary=summary,
        cards=_cards(summary),
        precisions=_parts(summary),
        layers=sorted(layers, key=lambda row: row.in_place.sqnr_db),
        layer_chart=layer_chart(layers),
        n_charted=min(LAYER_ROWS, len(layers)),
        trials=sorted(trials, key=lambda row: row.number),
        unseen=unseen,
        trial_counts={row.number: text.counts_text(row.counts) for row in trials},
        size_chart=size_chart(summary, trials),
        progress_chart=progress_chart(summary, trials),
        commands=_commands(summary),
    )


def sortable(value: float | None) -> str:
    """A number as the page's script reads it: missing ones sort last."""
    return "" if value is None else repr(float(value))


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A headline number. ``badge`` stands beside it in a ``tone`` (``plain``, ``good``, ``bad``);
    ``share`` (0..1) is drawn as a meter."""

    label: str
    value: str
    below: str
    badge: str = ""
    tone: str = "plain"
    share: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One precision in the bar: layers that have it, and their share of all."""

    name: str
    n: int
    share: float


def _cards(summary: Summary) -> list[Card]:
    beside = (
        (_BESIDE.get(name, (name, "")), text.metric_text(name, value))
        for name, value in summary.beside.items()
    )
    return [
        _score_card(summary),
        _size_card(summary),
        *(Card(label=label, value=value, below=below) for (label, below), value in beside),
    ]


def _score_card(summary: Summary) -> Card:
    change, badge = summary.change, ""
    if change is not None:
        badge = text.change_text(change if summary.higher_is_better else -change)
    below = [] if summary.float_score is None else [f"float {text.score_text(summary.float_score)}"]
    if summary.n_samples is not None:
        below.append(f"{summary.n_samples} samples")
    if not summary.higher_is_better:
        below.append("lower is better")
    return Card(
        label=f"{summary.metric}, quantized",
        value=text.score_text(summary.quantized_score),
        below=" \u00b7 ".join(below),
        badge=badge,
        tone="plain" if not change else "good" if change > 0 else "bad",
    )


def _size_card(summary: Summary) -> Card:
    share, of = summary.size_share, text.size_text(summary.float_bytes)
    return Card(
        label="Size",
        value=text.size_text(summary.quantized_bytes),
        below="" if share is None else f"{share:.1%} of {of}",
        share=None if share is None else min(1.0, share),
    )


_BESIDE = {
    "agreement": ("Agreement", "same answer as the float model"),
    "sqnr_db": ("Output SQNR", "signal over quantization noise"),
    "cosine": ("Output cosine", "with the float model"),
}


def _parts(summary: Summary) -> list[Part]:
    total = sum(summary.precision_counts.values()) or 1
    counts = text.in_order(summary.precision_counts)
    return [Part(name=name, n=n, share=n / total) for name, n in counts]


def _commands(summary: Summary) -> list[tuple[str, str]]:
    """What to run next, and what it is for."""
    places = dict(summary.places)
    commands = []
    if "plan" in places:
        plan = places["plan"]
        commands += [
            ("Every layer's scale, range and method", f"qdist show {shlex.quote(plan)}"),
            (
                "Look closer: dump every layer's values (with this run's model=, data=)",
                f"qdist compare {shlex.quote('plan=' + plan)} compare.dump=3",
            ),
            (
                "The same plan for another target (with this run's model=)",
                f"qdist emit {shlex.quote('plan=' + plan)} target=qdq_symmetric "
                "artifact=symmetric.onnx",
            ),
        ]
    if "artifact" in places:
        commands.append(
            ("What the artifact holds", f"qdist show {shlex.quote(places['artifact'])}")
        )
    return commands
