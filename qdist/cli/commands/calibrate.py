"""``qdist calibrate``."""

from __future__ import annotations

from qdist.cli.commands import steps
from qdist.cli.context import Context
from qdist.cli.schema import CalibrateSettings
from qdist.model.graph import Graph


def run(context: Context[CalibrateSettings]) -> None:
    """Measure, merge, and say what was measured."""
    context.make_folder()
    settings = context.settings
    frozen = context.frozen_model()
    graph = Graph(frozen, context.execution)
    # MLflow comes first: that it cannot be reached is better known before the work than after it.
    with context.tracked(
        params={
            "shard_samples": settings.calibration.shard_samples,
            "taps": settings.calibration.taps,
            "workers": settings.cluster.workers,
        },
        model_digest=frozen.digest,
    ) as tracked:
        job, store, merged = steps.calibrate(context, frozen, graph, settings)
        steps.save_config(context, context.config)
        n_values = int(merged.record.counts.sum())
        tracked.set_tags({"qdist.data_digest": job.manifest.digest})
        tracked.log_params({"micro_batch": job.identity.micro_batch})
        tracked.log_metrics(
            {
                "samples": len(job.manifest),
                "tensors": len(job.taps.points),
                "values": n_values,
                "shards": merged.n_shards,
                "seconds": context.seconds,
            }
        )
        tracked.log_json(list(merged.notes), "notes.json")
    facts = (
        ("samples", f"{len(job.manifest)}"),
        ("tensors measured", f"{len(job.taps.points)} ({len(job.taps.aliases)} more share them)"),
        ("values counted", f"{n_values:,}"),
        ("statistics", merged.record.digest[:16]),
        ("store", str(store.path)),
        ("seconds", f"{context.seconds:.1f}"),
    )
    context.console.print(steps.facts_table(f"Calibration of {settings.model.name}", facts))
    if job.taps.untapped:
        context.notes([f"{len(job.taps.untapped)} tensors in bodies of If or Loop not measured"])
    context.say(f"next: qdist quantize model.path={frozen.source} store.path={store.path}")
