"""A selection of samples, in one process: what the Ray actors run is made of the same parts.

``plan_selection`` names the samples and fixes the taps; ``sketch_samples`` sketches some of them;
``pick`` chooses once all are sketched; ``select_here`` does all of it without Ray.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from qdist.data.checks import InputSpec, check_sample, fixed_batch, stackable
from qdist.data.decoder import Decoder
from qdist.data.manifest import check_unchanged, sample_id
from qdist.data.selection import choose, features_of, mismatch, random_mismatch
from qdist.data.source import DataSource, Feeds
from qdist.digest import digest_json
from qdist.errors import ConfigError
from qdist.model.graph import Graph
from qdist.model.half import carried
from qdist.model.session import Execution, fingerprint
from qdist.model.taps import find_taps, tapped_graph
from qdist.stats.sketch import VERSION, Sketcher, SketchSpec, SketchTable, lower_edges
from qdist.store.sketches import SketchStore

SAMPLES_PER_TASK = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class SketchTask:
    """Some samples to sketch: ids and keys, in the set's order."""

    ids: tuple[str, ...]
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionJob:
    """Everything that is fixed before the first sample runs.

    ``n_wanted``: how many samples. ``samples``: (id, key) of every distinct sample, in the set's
    order. ``identity``: JSON, of the sketches. ``decoder``: how samples become phases.
    """

    n_wanted: int
    samples: tuple[tuple[str, str], ...]
    identity: dict[str, Any]
    sketch: SketchSpec
    inputs: tuple[InputSpec, ...]
    decoder: Decoder | None
    notes: tuple[str, ...]

    @property
    def takes_all(self) -> bool:
        """Whether there is nothing to choose, so that nothing has to run."""
        return self.n_wanted >= len(self.samples)


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The chosen samples' keys, in the set's order, of ``n_samples`` distinct ones.

    ``mismatch``: `qdist.data.selection.mismatch` of the choice; ``random_mismatch``: the mean of
    random picks of the same size. Both 0 where all were taken.
    """

    keys: tuple[str, ...]
    n_samples: int
    mismatch: float
    random_mismatch: float
    notes: tuple[str, ...]


def plan_selection(
    graph: Graph,
    source: DataSource,
    inputs: tuple[InputSpec, ...],
    n_wanted: int,
    execution: Execution,
    *,
    decoder: Decoder | None = None,
    on_nan: str = "error",
    on_progress: Callable[[int, int], None] | None = None,
) -> SelectionJob:
    """Name the samples by content and fix the taps: what ``compute`` layers read.

    Loads no sample. ``on_progress(done, total)`` counts samples named. Raises QD104 for a number
    below 1, `ModelError` QD209, and what the source raises.
    """
    if n_wanted < 1:
        raise ConfigError(
            "QD104",
            where="data.select_num",
            got=str(n_wanted),
            expected="at least 1; better 10 or more",
            mend="raise it, or leave it out to calibrate with all samples",
        )
    taps = find_taps(graph, "compute")
    carry = () if decoder is None else decoder.carry
    samples, duplicates = _named(source, on_progress)
    notes = [f"sample {key} repeats another and is no candidate" for key in duplicates]
    if n_wanted >= len(samples):
        notes.append(f"data.select_num={n_wanted}: all {len(samples)} samples are taken")
    return SelectionJob(
        n_wanted=n_wanted,
        samples=samples,
        identity={
            "kind": "qdist.sketches",
            "version": VERSION,
            "model_digest": graph.model.digest,
            "preprocessing": source.preprocessing(),
            "fingerprint": fingerprint(execution),
            "taps": list(taps.tensors),
            "phases": None if decoder is None else decoder.settings,
        },
        sketch=SketchSpec(
            tapped_bytes=_carrying(tapped_graph(graph, taps), graph, carry),
            data_folder=graph.model.data_folder,
            taps=taps,
            execution=execution,
            carry=carry,
            on_nan=on_nan,
        ),
        inputs=inputs,
        decoder=decoder,
        notes=tuple(notes),
    )


def open_tasks(job: SelectionJob, store: SketchStore) -> tuple[SketchTask, ...]:
    """What is still to be sketched; nothing where all samples are taken anyway."""
    if job.takes_all:
        return ()
    held = store.held(len(job.sketch.taps.points))
    left = [(id, key) for id, key in job.samples if id not in held]
    return tuple(
        SketchTask(ids=tuple(id for id, _ in part), keys=tuple(key for _, key in part))
        for part in (left[i : i + SAMPLES_PER_TASK] for i in range(0, len(left), SAMPLES_PER_TASK))
    )


def sketch_samples(
    task: SketchTask, sketcher: Sketcher, source: DataSource, job: SelectionJob
) -> SketchTable:
    """Sketch the samples of one task, each in a run of its own. Raises `DataError`, `ModelError`;
    QD306 where a sample changed since it was named."""
    tables = []
    for id, key in zip(task.ids, task.keys, strict=True):
        check_unchanged(source, id=id, key=key)
        tables.append(sketcher.sketch(id, key, _phases(key, source.load(key), job)))
    return SketchTable.concatenate(tables)


def pick(job: SelectionJob, store: SketchStore) -> Selection:
    """Choose. Raises `ValueError` while sketches are missing."""
    keys = dict(job.samples)
    if job.takes_all:
        return Selection(
            keys=tuple(keys.values()),
            n_samples=len(keys),
            mismatch=0.0,
            random_mismatch=0.0,
            notes=job.notes,
        )
    features = features_of(lambda: store.tables(keys), keys, lower_edges())
    chosen = set(choose(features, job.n_wanted))
    return Selection(
        keys=tuple(key for id, key in keys.items() if id in chosen),
        n_samples=len(keys),
        mismatch=mismatch(features, chosen),
        random_mismatch=random_mismatch(features, job.n_wanted),
        notes=job.notes,
    )


def select_here(job: SelectionJob, source: DataSource, store: SketchStore) -> Selection:
    """The whole selection in this process, without Ray."""
    tasks = open_tasks(job, store)
    if tasks:
        sketcher = Sketcher(job.sketch)
        for task in tasks:
            store.put(sketch_samples(task, sketcher, source, job))
    return pick(job, store)


def _named(
    source: DataSource, on_progress: Callable[[int, int], None] | None
) -> tuple[tuple[tuple[str, str], ...], list[str]]:
    """Every distinct sample under its first key, and the keys that repeat one."""
    preprocessing = digest_json(source.preprocessing())
    all_keys = source.keys()
    found: dict[str, str] = {}
    duplicates = []
    for done, key in enumerate(all_keys, start=1):
        id = sample_id(source.content_digest(key), preprocessing)
        if id in found:
            duplicates.append(key)
        found.setdefault(id, key)
        if on_progress is not None:
            on_progress(done, len(all_keys))
    return tuple(found.items()), duplicates


def _carrying(tapped: bytes, graph: Graph, carry: tuple[tuple[str, str], ...]) -> bytes:
    """The tapped graph with what is carried among its outputs: a carried tensor that is the view
    of another has no tap of its own."""
    proto = onnx.ModelProto.FromString(tapped)
    there = {output.name for output in proto.graph.output}
    missing = [name for name in dict.fromkeys(output for _, output in carry) if name not in there]
    for name in missing:
        found = graph.type_of(name)
        element = found.element if found is not None else onnx.TensorProto.FLOAT
        proto.graph.output.append(onnx.helper.make_tensor_value_info(name, carried(element), None))
    return proto.SerializeToString() if missing else tapped


def _phases(key: str, sample: Feeds, job: SelectionJob) -> list[Feeds]:
    """Feeds of the sample alone, or repeated as often as the model's fixed batch wants."""
    specs = job.inputs if job.decoder is None else job.decoder.sample_specs(sample)
    check_sample(key, sample, specs)
    feeds = sample
    if stackable(sample, specs):
        n = fixed_batch(specs) or 1
        feeds = {name: np.repeat(array[np.newaxis], n, axis=0) for name, array in sample.items()}
    return [feeds] if job.decoder is None else job.decoder.phases(feeds)
