"""Steps that several commands share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from qdist.calibration import CalibrationJob, Merged, identify, input_specs, load_phases, prepare
from qdist.calibration.converge import refuse_blocks
from qdist.calibration.estimate import group_sizes
from qdist.calibration.work import blocks
from qdist.cli import domain, schema
from qdist.cli.context import Context
from qdist.cli.progress import bar
from qdist.cli.samples import samples
from qdist.cli.selecting import selected
from qdist.data.manifest import SampleManifest
from qdist.data.random_source import RANDOM_WARNING
from qdist.data.source import DataSource
from qdist.emit.deployment import artifact_notes, deployment_notes
from qdist.errors import ModelError, StoreError
from qdist.files import write_json
from qdist.model.difference import frozen_difference, opset_difference
from qdist.model.freeze import FrozenModel
from qdist.model.graph import Graph
from qdist.model.session import Execution, fingerprint
from qdist.model.smoothed import smoothed_model
from qdist.model.taps import find_taps
from qdist.plan.choice import LayerChoice
from qdist.plan.dialects.forms import read_file
from qdist.plan.dialects.reading import Before
from qdist.plan.layer_index import LayerIndex
from qdist.plan.plan import QuantizationPlan, check_model, load_plan
from qdist.plan.planner import Planner
from qdist.plan.rules import Assignment, Rule, apply_rules
from qdist.report.text import size_text
from qdist.store.identity import Identity
from qdist.store.protocol import FinishedMerge
from qdist.store.zarr_store import ZarrStore, create_store, open_store
from qdist.threshold.convergence import Convergence

if TYPE_CHECKING:  # importing Ray costs half a second that --help should not pay
    from actors.calibrate import CalibrationProgress

HIGH_OPSET = 21
"""What 4- and 16-bit Q/DQ need."""
CHECKS = "checks"
"""Document of the store: what `check_freezing` found."""
SAMPLES = "samples"
"""Document of the store: the manifest of all samples that it was ever made for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrated:
    """A finished calibration, and what it was made of."""

    job: CalibrationJob
    source: DataSource
    store: ZarrStore
    merged: Merged


def calibrate(
    context: Context[Any],
    frozen: FrozenModel,
    graph: Graph,
    config: schema.CalibrateSettings | schema.TuneSettings,
) -> Calibrated:
    """Measure what the store lacks, over the pool, with progress."""
    if config.calibration.early_stop is not None:
        refuse_blocks(config.calibration.blocks)
    wanted = samples(config.data, config.calibration, graph, context)
    context.notes(wanted.notes)
    if config.data.select_num is not None:
        # A wrong name is better known before samples are compared.
        find_taps(graph, wanted.settings.taps)
        wanted = selected(wanted, config, graph, context)
    inputs = input_specs(graph)
    settings = replace(wanted.settings, n_workers=config.cluster.workers)
    identity = identify(frozen, wanted.source, settings, context.execution, inputs)
    place = domain.location(config.store.path)
    there = _existing(place, identity)
    with bar(context.console, "naming samples", "samples") as naming:
        job = prepare(
            frozen,
            wanted.source,
            settings,
            context.execution,
            graph=graph,
            earlier=None if there is None else _earlier(there),
            on_progress=lambda done, total: naming.update(done, total),
        )
    # Settings that cannot be leave no store behind, which would then refuse better ones.
    blocks(job)
    context.notes(_size_notes(job, wanted.source))
    checks = None if there is None else there.document(CHECKS)
    if checks is None:
        checks = check_freezing(frozen, job, wanted.source, context)
    store = there or create_store(place, identity)
    store.put_document(CHECKS, checks)
    store.put_document(SAMPLES, job.manifest.to_json())
    context.notes([str(note) for note in checks["notes"]])
    policy = config.calibration.early_stop
    stop = None if policy is None else domain.early_stop(policy)
    merged = measured(context, job, wanted.source, store, config.cluster, stop)
    context.notes(merged.notes)
    return Calibrated(job=job, source=wanted.source, store=store, merged=merged)


def _existing(place: str, identity: Identity) -> ZarrStore | None:
    """The store, where there is one. Raises QD401 where it is of another identity."""
    try:
        open_store(place)
    except StoreError as error:
        if error.code != "QD402":
            raise
        return None
    return create_store(place, identity)


def _earlier(store: ZarrStore) -> SampleManifest | None:
    """The samples that the store already knows, so that they keep their place."""
    found = store.document(SAMPLES)
    if found is None and store.finished():
        # Imported statistics bring their samples along.
        found = store.latest().about.get("manifest")
    return None if found is None else SampleManifest.from_json(found)


def measured(
    context: Context[Any],
    job: CalibrationJob,
    source: DataSource,
    store: ZarrStore,
    cluster: schema.ClusterConfig,
    early_stop: Convergence | None = None,
) -> Merged:
    """Calibrate over the pool, with a bar."""
    from actors.calibrate import calibrate as run_pool

    with bar(context.console, "calibrating", "samples") as measuring:
        started = False

        def show(progress: CalibrationProgress) -> None:
            nonlocal started
            if progress.n_workers and not started:
                started = True
                measuring.start_clock()
            note = _workers(progress) if started else "starting workers"
            if progress.n_records:
                note = f"merging {progress.n_merged} of {progress.n_records} records"
            if progress.n_retried:
                note += f", {progress.n_retried} retried"
            if progress.message:
                measuring.say(progress.message)
            measuring.update(progress.done, progress.total, note)

        merged = run_pool(
            job,
            source,
            store,
            domain.cluster(cluster),
            early_stop=early_stop,
            on_progress=show,
        )
        n = merged.record.n_samples
        measuring.close(n, n)
    return merged


def _workers(progress: CalibrationProgress) -> str:
    """How many workers, and with several nodes what each of them has done."""
    text = f"{progress.n_workers} workers"
    if len(progress.nodes) > 1:
        done = (f"{node.node_ip}: {node.n_completed} shards" for node in progress.nodes)
        text += f" ({', '.join(done)})"
    return text


def _size_notes(job: CalibrationJob, source: DataSource) -> list[str]:
    """What histograms per channel will take, before anything is measured."""
    if not job.settings.statistics.groups:
        return []
    sizes = group_sizes(job, source)
    found = sizes.estimate
    notes = [
        f"{found.n_groups:,} histograms per channel or group, of {sizes.n_tensors} tensors: about "
        f"{size_text(found.memory_bytes)} in each worker, {size_text(found.most_bytes)} at most, "
        f"and {size_text(found.stored_bytes)} a record before compression"
        + (f"; {found.largest} takes the most" if found.largest else "")
    ]
    for names, reason in (
        (sizes.unknown, "the shape is known only when the model runs, so the estimate lacks it"),
        (sizes.without_axis, "the tensor has no such axis, so it gets no histograms per channel"),
    ):
        if names:
            notes.append(f"{', '.join(names[:3])}{' and others' if names[3:] else ''}: {reason}")
    return notes


def check_freezing(
    frozen: FrozenModel,
    job: CalibrationJob,
    source: DataSource,
    context: Context[Any],
) -> dict[str, Any]:
    """Prove on the first micro-batch that freezing, and raising the opset, keep the float result.

    The document of what was found, which is kept beside the statistics, so that it is not looked
    for twice. Raises QD207 when freezing itself changed the result.
    """
    budget = job.settings.memory_budget_bytes
    with context.working("checking the simplified model against the given one"):
        feeds = load_phases(job.grid[0], source, job.inputs, job.decoder)[0]
        notes = []
        difference = frozen_difference(frozen, feeds, context.execution, budget_bytes=budget)
        if difference:
            notes.append(f"the simplified model differs from the given one by {difference:.2g}")
        refusal = None
        try:
            raised = opset_difference(
                frozen, HIGH_OPSET, feeds, context.execution, budget_bytes=budget
            )
        except ModelError as error:
            # Models of 8-bit layers need no higher opset, so this only rules the others out.
            refusal = f"{error.code}: {error.got}"
            notes.append(f"no 4- or 16-bit layers: opset {HIGH_OPSET} fails ({refusal})")
        else:
            if raised:
                notes.append(f"at opset {HIGH_OPSET} the float result moves by {raised:.2g}")
    return {"notes": notes, "high_opset_refusal": refusal}


def high_opset_refusal(store: ZarrStore) -> str | None:
    """Why the model cannot have 4- or 16-bit layers, as calibration found out; None if it can."""
    found = store.document(CHECKS) or {}
    refusal = found.get("high_opset_refusal")
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


def open_statistics(frozen: FrozenModel, location: str) -> tuple[ZarrStore, FinishedMerge]:
    """The finished calibration of this model. Raises QD401, QD402, QD403."""
    store = open_store(location)
    if store.identity.model_digest != frozen.digest:
        raise StoreError(
            "QD401",
            where=store.location,
            got=f"statistics of model {store.identity.model_digest[:12]}",
            expected=f"statistics of model {frozen.digest[:12]} ({frozen.source.name})",
            mend="give the store of this model with store.path=FOLDER, or run qdist calibrate",
        )
    return store, store.latest()


def load_plan_for(
    frozen: FrozenModel, path: Path, execution: Execution
) -> tuple[FrozenModel, QuantizationPlan]:
    """A plan, and the model that it is for: ``frozen``, or that with the plan's factors of
    smoothing, where it has not got them yet. Raises QD504, QD505."""
    plan = load_plan(path)
    if plan.smoothing is not None and plan.model_digest != frozen.digest:
        try:
            frozen = smoothed_model(Graph(frozen, execution), plan.smoothing)
        except ModelError as error:
            if error.code != "QD212":
                raise
    check_model(plan, path, frozen.digest)
    return frozen, plan


def random_notes(store: ZarrStore) -> list[str]:
    """The warning that the statistics are of random samples, however those were wrapped."""
    preparation: Any = store.identity.preprocessing
    while isinstance(preparation, dict):
        if preparation.get("kind") == "random":
            return [RANDOM_WARNING]
        preparation = preparation.get("source")
    return []


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """A planner that knows what rules say about tensors; the choice of every layer, and where it
    comes from; and what the user should know about files of rules."""

    planner: Planner
    choices: dict[str, LayerChoice]
    why: dict[str, str]
    notes: tuple[str, ...]


def make_choices(planner: Planner, config: schema.QuantizationConfig) -> Chosen:
    """What the configuration and vendors' files choose. Raises QD503 and QD506 to QD509."""
    assignment, rules, notes = apply_all_rules(planner.index, config)
    planner.check_rules(rules)
    planner = planner.with_rules(assignment.tensors, assignment.why)
    return Chosen(
        planner=planner, choices=assignment.choices, why=assignment.why, notes=tuple(notes)
    )


def apply_all_rules(
    index: LayerIndex, config: schema.QuantizationConfig
) -> tuple[Assignment, list[Rule], list[str]]:
    """What rules come to, all of them in order, and notes: vendors' files first, so that rules of
    the configuration go before them."""
    default = domain.default_choice(config)
    rules: list[Rule] = []
    notes: list[str] = []
    for path in domain.rules_files(config):
        before = Before(index=index, choices=apply_rules(index, default, rules).choices)
        found = read_file(path, config.rules_form, before)
        rules += found.rules
        notes += found.notes
        if not found.rules:
            notes.append(f"{path.name} says of every layer what holds anyway")
    rules += domain.rules(config)
    return apply_rules(index, default, rules), rules, notes


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


def deployment(plan: QuantizationPlan, execution: Execution) -> list[str]:
    """Where ONNX Runtime's defaults on this processor would not compute what is scored."""
    found = fingerprint(execution)
    return deployment_notes(plan, str(found["machine"]), list(found["cpu_flags"]))


def artifact_deployment(path: Path, execution: Execution) -> list[str]:
    """The same of a model file whose plan is not known."""
    found = fingerprint(execution)
    return artifact_notes(path, str(found["machine"]), list(found["cpu_flags"]))


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
