"""Representative samples instead of all: ``data.select_num`` (Icraft's autoqset)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from qdist.calibration import input_specs
from qdist.cli import domain, schema
from qdist.cli.context import Context
from qdist.cli.progress import bar
from qdist.cli.samples import Samples
from qdist.data.decoder import Phased
from qdist.data.selection import auto_name, write_list
from qdist.data.subset import Listed
from qdist.model.graph import Graph
from qdist.selection import Selection, plan_selection
from qdist.store.sketches import SketchStore

SKETCHES = "sketches"
"""Folder of what the samples' activations look like, in the output folder."""


def selected(
    wanted: Samples,
    config: schema.CalibrateSettings | schema.TuneSettings,
    graph: Graph,
    context: Context[Any],
) -> Samples:
    """Those of the samples that stand for all of them; their list is left in the output folder."""
    from actors.select import SelectionProgress, select

    decoder = wanted.source.decoder if isinstance(wanted.source, Phased) else None
    with bar(context.console, "naming candidates", "samples") as naming:
        job = plan_selection(
            graph,
            wanted.source,
            input_specs(graph),
            config.data.select_num or 0,
            context.execution,
            decoder=decoder,
            on_nan=config.calibration.on_nan,
            on_progress=lambda done, total: naming.update(done, total),
        )
    store = SketchStore(context.folder / SKETCHES, job.identity)
    with bar(context.console, "comparing samples", "samples") as comparing:

        def show(progress: SelectionProgress) -> None:
            if progress.message:
                comparing.say(progress.message)
            note = f"{progress.n_workers} workers" if progress.n_workers else "starting workers"
            comparing.update(progress.done, progress.total, note)

        found = select(job, wanted.source, store, domain.cluster(config.cluster), on_progress=show)
        comparing.close(found.n_samples, found.n_samples)
    path = write_list(context.folder / auto_name(_origin(config.data)), found.keys)
    context.notes(_notes(found, path))
    if isinstance(wanted.source, Phased):
        inner = Listed(source=wanted.source.source, list_file=path)
        return replace(wanted, source=replace(wanted.source, source=inner))
    return replace(wanted, source=Listed(source=wanted.source, list_file=path))


def _notes(found: Selection, path: Path) -> list[str]:
    notes = [*found.notes, f"{len(found.keys)} of {found.n_samples} samples chosen: {path}"]
    if found.random_mismatch:
        notes.append(
            f"they miss the whole set's activations by {found.mismatch:.4f}, "
            f"random samples by {found.random_mismatch:.4f}"
        )
    return notes


def _origin(data: schema.DataConfig) -> Path:
    """What the list is named after."""
    config = data.calibration
    listed = config.listed or getattr(config, "list_file", None)
    given = listed or getattr(config, "folder", None) or getattr(config, "path", None)
    return Path(given or data.path or getattr(config, "target", "").partition(":")[0] or "samples")
