"""What was committed, as one record; what was merged before, recalled."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qdist.calibration.job import CalibrationJob
from qdist.calibration.notes import record_notes, refuse_nan
from qdist.calibration.reading import NodeAnswer, Spread, merge_node, n_read, read_source
from qdist.calibration.tree import MergeNode, Part, Source, missing, nodes_of, plan, receipts_of
from qdist.digest import digest_json
from qdist.errors import StoreError
from qdist.stats.record import CalibrationRecord
from qdist.store.coverage import Tensors, cover
from qdist.store.gathering import gather
from qdist.store.layout import nodes_document
from qdist.store.protocol import CalibrationStore

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """A finished calibration: the record, and how many shards it was merged from."""

    record: CalibrationRecord
    n_shards: int
    notes: tuple[str, ...]


def finish(
    job: CalibrationJob,
    store: CalibrationStore,
    about: dict[str, Any] | None = None,
    *,
    among: Collection[str] | None = None,
    spread: Spread | None = None,
    on_progress: OnProgress | None = None,
    make_latest: bool = True,
) -> Merged:
    """Merge everything that covers the job's grid and make it the store's latest: without
    ``make_latest`` only where there is none.

    ``among``: ids of the only receipts to use. Many records are merged as a tree, whose inner nodes
    the store keeps for later merges: ``spread`` makes those that it lacks, None in this process.
    ``on_progress(done, total)`` counts records read, and those that a node stood for.
    Raises QD402 when something is missing, QD403 when records are damaged, with all of those
    discarded so that `open_work` names them, QD309 for NaN unless ``on_nan`` is ``report``.
    """
    receipts = [r for r in store.receipts() if among is None or r.id in among]
    covered = cover([batch.ids for batch in job.grid], job.taps.tensors, receipts)
    if covered.missing:
        raise StoreError(
            "QD402",
            where="the calibration store",
            got=f"{covered.n_missing_batches} of {len(job.grid)} micro-batches missing",
            expected="all of them",
            mend="run qdist calibrate again; it goes on where it stopped",
        )
    places = {id: place for place, id in enumerate(job.manifest.ids)}
    parts = plan(covered.parts, places)
    record = read_and_merge(parts, store, job.taps.tensors, spread, on_progress)
    merged = _merged(job, record, len(covered.parts))
    details = {
        "manifest": job.manifest.to_json(),
        "manifest_digest": job.manifest.digest,
        "n_samples": record.n_samples,
        "n_shards": merged.n_shards,
        "notes": list(merged.notes),
        **(about or {}),
    }
    batches = [batch.ids for batch in job.grid]
    name = merge_name(job)
    if nodes := nodes_of(parts):
        store.put_document(nodes_document(name), {"nodes": nodes})
    store.finish(name, record, details, job.taps, batches, make_latest=make_latest)
    return merged


def recall(
    job: CalibrationJob, store: CalibrationStore, *, make_latest: bool = True
) -> Merged | None:
    """The merge of exactly this job's micro-batches and taps, where the store has it undamaged.

    With ``make_latest`` it becomes the latest. Reads no shard's record. Raises QD309 as `finish`
    does.
    """
    name = merge_name(job)
    found = store.find(name)
    if found is None:
        return None
    merged = _merged(job, found.record, int(found.about.get("n_shards", 0)))
    if make_latest:
        store.make_latest(name)
    return merged


def merge_name(job: CalibrationJob) -> str:
    """Hex SHA-256 of the grid and the taps: what a merge is filed under."""
    return merge_name_of((batch.ids for batch in job.grid), job.taps.tensors)


def merge_name_of(batches: Iterable[Sequence[str]], tensors: Sequence[str]) -> str:
    """`merge_name`, of the sample ids of the micro-batches and the measured tensors."""
    return digest_json([[list(ids) for ids in batches], list(tensors)])


def read_and_merge(
    parts: Sequence[Part],
    store: CalibrationStore,
    tensors: tuple[str, ...],
    spread: Spread | None = None,
    on_progress: OnProgress | None = None,
) -> CalibrationRecord:
    """The merged record of all parts, ``spread`` and ``on_progress`` as in `finish`.

    Damaged records are discarded; raises QD403 after all are read.
    """
    levels = missing(parts, store.nodes() if nodes_of(parts) else ())
    count = _Count(parts, levels, on_progress)
    damaged: list[StoreError] = []
    for nodes in levels:
        answers = spread(nodes) if spread is not None else _here(nodes, store)
        for answer in answers:
            damaged.extend(answer.damaged)
            count.add(answer.n_records)
        if damaged:
            break

    def read(source: Source, taken: Tensors) -> CalibrationRecord | None:
        if isinstance(source, MergeNode):
            # A node whose records are lost would only be tried again.
            return None if damaged else read_source(source, taken, store, damaged)
        try:
            return read_source(source, taken, store, damaged)
        finally:
            count.add(1)

    record = gather(parts, tensors, read)
    if record is None:
        raise damaged[0]
    return record


def _here(nodes: Sequence[MergeNode], store: CalibrationStore) -> Iterator[NodeAnswer]:
    """Make nodes in this process, one after the other."""
    return (merge_node(node, store) for node in nodes)


class _Count:
    """Counts the records of a merge that are read, or that a kept node stands for."""

    def __init__(
        self,
        parts: Sequence[Part],
        levels: Sequence[Sequence[MergeNode]],
        on_progress: OnProgress | None,
    ) -> None:
        self._tell = on_progress
        self._total = sum(1 for source, _ in parts for _ in receipts_of(source))
        to_read = sum(n_read(node) for nodes in levels for node in nodes)
        to_read += sum(not isinstance(source, MergeNode) for source, _ in parts)
        self._done = 0
        self.add(self._total - to_read)

    def add(self, n: int) -> None:
        """``n`` more are done."""
        self._done += n
        if n and self._tell is not None:
            self._tell(self._done, self._total)


def _merged(job: CalibrationJob, record: CalibrationRecord, n_shards: int) -> Merged:
    """With the notes. Raises QD309."""
    if job.observer.on_nan == "error":
        refuse_nan(record)
    return Merged(record=record, n_shards=n_shards, notes=(*job.notes, *record_notes(job, record)))
