"""``qdist quantize``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from qdist.calibration.blockwise import block_records
from qdist.cli import domain
from qdist.cli.commands import smoothing, steps
from qdist.cli.commands.mixing import check_data, mix_of, mixed
from qdist.cli.context import Context
from qdist.cli.schema import QuantizeSettings
from qdist.emit.qdq import emit_qdq, refuse_overwriting
from qdist.errors import ArtifactError, ConfigError
from qdist.files import write_text
from qdist.model.freeze import FrozenModel
from qdist.model.graph import Graph
from qdist.plan.choice import LayerChoice
from qdist.plan.dialects.forms import TEMPLATES, unknown_form, write_into
from qdist.plan.dialects.reading import Before
from qdist.plan.layer_index import find_index
from qdist.plan.planner import Planner
from qdist.plan.target import Target
from qdist.store.zarr_store import ZarrStore

ARTIFACT = "model.onnx"
PLAN = "plan.json"


def run(context: Context[QuantizeSettings]) -> None:
    """Plan from the stored statistics, and write the artifact. The float model does not run."""
    settings = context.settings
    # Refuse wrong settings before anything slow.
    target: Target = domain.target(settings.target)
    domain.default_choice(settings.quantization)
    mix = mix_of(settings.quantization)
    if mix is not None:
        check_data(mix[0], settings.data)
    if settings.template is not None:
        _write_template(context, settings.template, target)
        return
    if settings.template_into is not None:
        raise ConfigError(
            "QD105",
            where="template_into",
            got="no template",
            expected="the form that is written into the file",
            mend="add --template sophgo, or --template slimai_profile",
        )
    folder = context.make_folder()
    frozen = context.frozen_model()
    refuse_overwriting(frozen, folder / ARTIFACT)
    planner, store, notes = _planner(context, frozen)
    frozen, record = planner.graph.model, planner.record
    chosen = _chosen(context, planner, target)
    projected = target.project(chosen.planner.plan(chosen.choices, chosen.why, chosen.notes))
    steps.check_opset(projected.plan, store)
    with context.tracked(
        params={
            "precision": settings.quantization.precision,
            "saturation": settings.quantization.saturation,
            "granularity": settings.quantization.granularity,
            "symmetric": settings.quantization.symmetric,
            "smoothing": settings.quantization.smoothing,
            "target": target.name,
        },
        model_digest=frozen.digest,
    ) as tracked:
        with context.working("writing the quantized model"):
            artifact = emit_qdq(frozen, projected, folder / ARTIFACT, execution=context.execution)
        plan_path = projected.plan.save(folder / PLAN)
        steps.save_config(context, context.config)
        counts = projected.plan.counts()
        tracked.log_metrics({"artifact_bytes": artifact.n_bytes, "seconds": context.seconds})
        tracked.set_tags(
            {"qdist.plan_digest": projected.plan.digest, "qdist.statistics_digest": record.digest}
        )
        tracked.log_artifact(plan_path)
        tracked.log_artifact(artifact.path, best=True)
        if artifact.data_path is not None:
            tracked.log_artifact(artifact.data_path, best=True)
    share = artifact.n_bytes / max(1, frozen.n_source_bytes)
    facts = (
        ("layers", ", ".join(f"{n} {name}" for name, n in counts.most_common())),
        ("quantized", str(projected.plan.coverage())),
        ("size", f"{artifact.n_bytes / 1e6:.2f} MB, {share:.0%} of the float model"),
        ("opset", str(artifact.opset)),
        ("statistics", f"of {record.n_samples} samples, {record.digest[:16]}"),
        ("artifact", str(artifact.path)),
        ("plan", str(plan_path)),
        ("seconds", f"{context.seconds:.1f}"),
    )
    context.console.print(steps.facts_table(f"Quantized {settings.model.name}", facts))
    context.notes(
        [
            *steps.random_notes(store),
            *notes,
            *projected.plan.notes,
            *steps.plan_notes(projected.plan),
            *steps.deployment(projected.plan, context.execution),
        ]
    )


def _planner(
    context: Context[QuantizeSettings], frozen: FrozenModel
) -> tuple[Planner, ZarrStore, tuple[str, ...]]:
    """A planner on the stored statistics, of the model smoothed if that is wanted; the store; and
    what the user should know."""
    settings = context.settings
    alpha = settings.quantization.smoothing
    store, merge = steps.open_statistics(frozen, domain.location(settings.store.path))
    blocks = block_records(store, merge.name) if settings.quantization.average_blocks else ()
    graph, record = Graph(frozen, context.execution), merge.record
    notes: tuple[str, ...] = ()
    if alpha is not None:
        found = smoothing.stored(graph, store, merge, alpha, blocks)
        graph, record, blocks, notes = found.graph, found.record, found.blocks, found.notes
    plan_settings = domain.plan_settings(settings.quantization)
    return Planner(graph, record, merge.taps, plan_settings, blocks), store, notes


def _chosen(context: Context[QuantizeSettings], planner: Planner, target: Target) -> steps.Chosen:
    """What rules, files and pickers choose."""
    settings = context.settings
    chosen = steps.make_choices(planner, settings.quantization)
    mix = mix_of(settings.quantization)
    source = None
    if mix is not None and mix[0].runs_model and settings.data is not None:
        source = domain.calibration_source(settings.data)
    return mixed(context, chosen, settings.quantization, target, source)


def _write_template(context: Context[QuantizeSettings], name: str, target: Target) -> None:
    """A vendor's file of rules that says what every layer has, to be edited; needs no statistics.

    Raises QD507 for choices that the file has no word for, QD508 for an unknown form.
    """
    if name not in TEMPLATES:
        raise unknown_form(name, "template", tuple(TEMPLATES))
    form = TEMPLATES[name]
    given = context.settings.template_into
    settings = context.settings
    folder = context.make_folder()
    frozen = context.frozen_model()
    if settings.quantization.mix is None and form.template is not None:
        # Choices alone need no statistics.
        index = find_index(Graph(frozen, context.execution), settings.quantization.scope)
        assignment, _, notes = steps.apply_all_rules(index, settings.quantization)
        choices, said = _worded(assignment.choices)
        notes = [*notes, *said]
        before = Before(index=index, choices=choices)
        if given is None:
            text = form.template(before)
        else:
            text, more = write_into(domain.absolute(given), name, before, None)
            notes = [*notes, *more]
    else:
        planner, _, _ = _planner(context, frozen)
        chosen = _chosen(context, planner, target)
        notes = list(chosen.notes)
        choices, said = _worded(chosen.choices)
        notes += said
        before = Before(index=planner.index, choices=choices)
        if given is not None:
            plan = chosen.planner.plan(chosen.choices, chosen.why)
            text, more = write_into(domain.absolute(given), name, before, plan)
            notes += more
        elif form.template is not None:
            text = form.template(before)
        elif form.plan_template is not None:
            text = form.plan_template(chosen.planner.plan(chosen.choices, chosen.why))
        else:
            raise unknown_form(name, "template", tuple(TEMPLATES))
    path = _keep_edits(folder / f"{settings.model.name}{form.suffix}", text)
    facts = (
        ("form", name),
        ("template", str(path)),
    )
    context.console.print(steps.facts_table(f"Template for {settings.model.name}", facts))
    context.notes(notes)
    # What is to be copied stands below the table, where nothing wraps it.
    context.say(f"when edited: qdist quantize ... quantization.rules_file={path}")


def _worded(choices: Mapping[str, LayerChoice]) -> tuple[dict[str, LayerChoice], list[str]]:
    """The choices as vendors have words for them, and a note: none has one for ``auto``, which goes
    by what only qdist's statistics tell, so ``mse`` stands there, the first that it considers."""
    changed = {
        name: replace(choice, saturation="mse")
        for name, choice in choices.items()
        if choice.saturation.lower() == "auto"
    }
    n = f"{len(changed)} layer{'s' if len(changed) > 1 else ''}"
    note = f"no vendor has a word for the threshold method auto: mse is written for {n}"
    return {**choices, **changed}, [note] if changed else []


def _keep_edits(path: Path, text: str) -> Path:
    """Write a template. Raises QD603 over a file of other content, which may have been edited."""
    if path.exists() and path.read_bytes() != text.encode():
        raise ArtifactError(
            "QD603",
            where=str(path),
            got="a file of other content, perhaps an edited template",
            expected="no such file",
            mend="move it, or choose another place with output.folder=PATH",
        )
    return write_text(path, text)
