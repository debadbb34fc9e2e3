"""Steps that several commands share."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from qdist.calibration import CalibrationJob, Merged, load_batch, prepare
from qdist.cli import domain, schema
from qdist.cli.context import Context
from qdist.cli.progress import bar
from qdist.data.source import DataSource
from qdist.errors import ModelError, StoreError
from qdist.files import write_json
from qdist.model.freeze import FrozenModel, frozen_difference, opset_difference
from qdist.model.graph import Graph
from qdist.plan.choice import LayerChoice
from qdist.plan.plan import QuantizationPlan
from qdist.plan.planner import Planner
from qdist.plan.rules import apply_rules
from qdist.stats.record import CalibrationRecord
from qdist.store.zarr_store import ZarrStore

HIGH_OPSET = 21
"""What 4- and 16-bit Q/DQ need."""
CHECKS = "checks.json"
"""In the store: what `check_freezing` found."""


def calibrate(
    context: Context[Any],
    frozen: FrozenModel,
    graph: Graph,
    config: schema.CalibrateSettings | schema.TuneSettings,
) -> tuple[CalibrationJob, ZarrStore, Merged]:
    """Measure what the store lacks, over the pool, with progress."""
    from actors.calibrate import CalibrationProgress
    from actors.calibrate import calibrate as run_pool

    source = domain.source(config.data.calibration)
    with bar(context.console, "naming samples", "samples") as naming:
        job = prepare(
            frozen,
            source,
            domain.calibration(config.calibration),
            context.execution,
            graph=graph,
            on_progress=lambda done, total: naming.update(done, total),
        )
    store = ZarrStore.create(domain.absolute(config.store.path), job.identity, job.taps)
    context.notes(check_freezing(frozen, job, source, store, context))
    with bar(context.console, "calibrating", "samples") as measuring:
        started = False

        def show(progress: CalibrationProgress) -> None:
            nonlocal started
            if progress.n_workers and not started:
                started = True
                measuring.start_clock()
            note = f"{progress.n_workers} workers" if started else "starting workers"
            if progress.n_records:
                note = f"merging {progress.n_merged} of {progress.n_records} records"
            if progress.n_retried:
                note += f", {progress.n_retried} retried"
            if progress.message:
                measuring.say(progress.message)
            measuring.update(progress.done, progress.total, note)

        merged = run_pool(job, source, store, domain.cluster(config.cluster), on_progress=show)
        measuring.close(len(job.manifest), len(job.manifest))
    context.notes(merged.notes)
    return job, store, merged


def check_freezing(
    frozen: FrozenModel,
    job: CalibrationJob,
    source: DataSource,
    store: ZarrStore,
    context: Context[Any],
) -> list[str]:
    """Prove on the first micro-batch that freezing, and raising the opset, keep the float result.

    What was found is kept beside the statistics, and not looked for twice. Raises QD207 when
    freezing itself changed the result.
    """
    place = store.path / CHECKS
    if place.is_file():
        return list(json.loads(place.read_text(encoding="utf-8"))["notes"])
    with context.working("checking the simplified model against the given one"):
        feeds = load_batch(job.grid[0], source, job.inputs)
        notes = []
        difference = frozen_difference(frozen, feeds, context.execution)
        if difference:
            notes.append(f"the simplified model differs from the given one by {difference:.2g}")
        refusal = None
        try:
            raised = opset_difference(frozen, HIGH_OPSET, feeds, context.execution)
        except ModelError as error:
            # Models of 8-bit layers need no higher opset, so this only rules the others out.
            refusal = f"{error.code}: {error.got}"
            notes.append(f"no 4- or 16-bit layers: opset {HIGH_OPSET} fails ({refusal})")
        else:
            if raised:
                notes.append(f"at opset {HIGH_OPSET} the float result moves by {raised:.2g}")
    write_json(place, {"notes": notes, "high_opset_refusal": refusal})
    return notes


def high_opset_refusal(store: ZarrStore) -> str | None:
    """Why the model cannot have 4- or 16-bit layers, as calibration found out; None if it can."""
    place = store.path / CHECKS
    if not place.is_file():
        return None
    refusal = json.loads(place.read_text(encoding="utf-8"))["high_opset_refusal"]
    return None if refusal is None else str(refusal)


def check_opset(plan: QuantizationPlan, store: ZarrStore) -> None:
    """Raise QD206 if the plan needs an opset that the model cannot be raised to unharmed."""
    refusal = high_opset_refusal(store)
    if plan.opset >= HIGH_OPSET and refusal is not None:
        raise ModelError(
            "QD206",
            where="the plan's 4- and 16-bit layers",
            got=refusal,
            expected=f"a model that computes the same at opset {HIGH_OPSET}",
            mend=f"export the model at opset {HIGH_OPSET}, or keep to int8 and float32",
        )


def open_statistics(frozen: FrozenModel, path: Path) -> tuple[ZarrStore, CalibrationRecord]:
    """The finished calibration of this model. Raises QD401, QD402, QD403."""
    store = ZarrStore.open(path)
    if store.identity.model_digest != frozen.digest:
        raise StoreError(
            "QD401",
            where=str(path),
            got=f"statistics of model {store.identity.model_digest[:12]}",
            expected=f"statistics of model {frozen.digest[:12]} ({frozen.source.name})",
            mend="give the store of this model with store.path=FOLDER, or run qdist calibrate",
        )
    record, _ = store.latest()
    return store, record


def make_choices(
    planner: Planner, config: schema.QuantizationConfig
) -> tuple[dict[str, LayerChoice], dict[str, str]]:
    """The choice of every layer, and where it comes from. Raises QD503."""
    rules = domain.rules(config)
    choices = apply_rules(planner.layers, domain.default_choice(config), rules)
    planner.check_rules(rules)
    why = {
        layer.name: f"rule {rule.match}"
        for rule in rules
        for layer in planner.layers
        if rule.matches(layer)
    }
    return choices, why


def plan_notes(plan: QuantizationPlan) -> list[str]:
    """What of the model stays float, by reason, in few lines."""
    reasons: dict[str, list[str]] = {}
    for layer in plan.layers:
        for reason in dict.fromkeys(layer.left_float.values()):
            if not reason.startswith(("computed with", "a single number")):
                text = "holds values that mean masked" if "mean masked" in reason else reason
                reasons.setdefault(text, []).append(layer.name)
    return [
        f"{len(names)} {'layer keeps' if len(names) == 1 else 'layers keep'} a float input "
        f"({reason}): {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for reason, names in reasons.items()
    ]


def facts_table(title: str, facts: Iterable[tuple[str, str]]) -> Table:
    """What a command did, one fact a row; long paths are folded, never cut."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for label, value in facts:
        table.add_row(label, value)
    return table


def save_config(context: Context[Any], config: Mapping[str, Any]) -> Path:
    """Keep the resolved configuration beside the results."""
    return write_json(context.folder / f"{context.command}.config.json", dict(config))
