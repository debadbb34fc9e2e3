"""``qdist compare``."""

from __future__ import annotations

from qdist.cli import domain
from qdist.cli.commands import steps
from qdist.cli.context import Context
from qdist.cli.schema import CompareSettings
from qdist.emit.qdq import emit_qdq
from qdist.evaluate.compare import compare_layers
from qdist.evaluate.dump import dump_comparison
from qdist.evaluate.modes import compare_modes
from qdist.files import write_json
from qdist.report.modes import modes_table
from qdist.report.tables import layer_table
from qdist.report.text import db_text


def run(context: Context[CompareSettings]) -> None:
    """Compare, print the worst layers, and write the files that were asked for."""
    settings = context.settings
    target = domain.target(settings.target)
    source = domain.evaluation_source(settings.data)
    folder = context.make_folder()
    frozen, plan = steps.load_plan_for(
        context.frozen_model(), domain.absolute(settings.plan), context.execution
    )
    projected = target.project(plan)
    with context.tracked(
        params={"plan": settings.plan, "samples": settings.compare.samples},
        model_digest=frozen.digest,
    ) as tracked:
        with context.working("comparing layers"):
            rows = compare_layers(
                frozen,
                projected,
                source,
                context.execution,
                batch=settings.compare.batch,
                n_samples=settings.compare.samples,
            )
        path = write_json(folder / "layers.json", [row.to_json() for row in rows])
        steps.save_config(context, context.config)
        context.console.print(layer_table(rows, settings.compare.limit))
        context.say(f"all {len(rows)} layers: {path}")
        if settings.compare.target_exact:
            with context.working("comparing with the chip's whole numbers"):
                modes = compare_modes(
                    frozen,
                    projected,
                    source,
                    context.execution,
                    batch=settings.compare.batch,
                    n_samples=settings.compare.samples,
                )
            place = write_json(folder / "modes.json", modes.to_json())
            context.console.print(modes_table(modes, settings.compare.limit))
            context.notes(modes.notes)
            for name, deviation in modes.outputs.items():
                context.say(f"output {name}: {db_text(deviation.sqnr_db)} dB between the modes")
            context.say(f"target-exact ({modes.reading}): {place}")
        if settings.compare.dump:
            name = settings.model.name
            dumps = folder / "dump"
            artifact = emit_qdq(frozen, projected, dumps / f"{name}.onnx", check=False)
            written = dump_comparison(
                frozen,
                projected,
                artifact.path,
                source,
                context.execution,
                dumps,
                settings.compare.dump,
                model_name=name,
                tag=projected.plan.digest[:8],
                max_samples=settings.compare.dump_samples,
            )
            context.say(f"{len(written)} files of dump level {settings.compare.dump}: {dumps}")
        tracked.log_table([row.to_json() for row in rows], "layers.csv")
        if rows:
            tracked.log_metrics({"worst_sqnr_db": rows[0].in_place.sqnr_db})
