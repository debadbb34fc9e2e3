"""``qdist calibrate``."""

from __future__ import annotations

from collections.abc import Mapping

from qdist.cli.commands import smoothing, steps
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
        done = steps.calibrate(context, frozen, graph, settings)
        job, store, merged = done.job, done.store, done.merged
        alphas = smoothing.strengths(settings.calibration.smoothing)
        n_smoothed = smoothing.measure_all(context, graph, done, settings, alphas)
        steps.save_config(context, context.config)
        n_values = sum(merged.record.histogram(tensor).n_values for tensor in merged.record.tensors)
        tracked.set_tags({"qdist.data_digest": job.manifest.digest})
        tracked.log_params({"micro_batch": job.identity.micro_batch})
        tracked.log_metrics(
            {
                "samples": merged.record.n_samples,
                "tensors": len(job.taps.points),
                "values": n_values,
                "shards": merged.n_shards,
                "seconds": context.seconds,
            }
        )
        tracked.log_json(list(merged.notes), "notes.json")
    facts = (
        ("samples", f"{merged.record.n_samples}"),
        ("tensors measured", f"{len(job.taps.points)} ({len(job.taps.aliases)} more share them)"),
        *((("tensors smoothed", f"{n_smoothed}"),) if alphas else ()),
        ("values counted", f"{n_values:,}"),
        ("statistics", merged.record.digest[:16]),
        ("store", store.location),
        ("seconds", f"{context.seconds:.1f}"),
    )
    context.console.print(steps.facts_table(f"Calibration of {settings.model.name}", facts))
    context.notes(_untapped_notes(job.taps.untapped))
    context.say(f"next: qdist quantize model.path={frozen.source} store.path={store.location}")


def _untapped_notes(untapped: Mapping[str, str]) -> list[str]:
    """What was not measured, by reason; the names of a few."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in untapped.items():
        by_reason.setdefault(reason, []).append(name)
    return [
        f"not measured, {reason}: {', '.join(names[:3])}"
        + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        for reason, names in by_reason.items()
    ]
