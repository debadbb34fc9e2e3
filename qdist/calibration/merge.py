"""What was committed, as one record; what was merged before, recalled."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from qdist.calibration.job import CalibrationJob
from qdist.calibration.notes import record_notes, refuse_nan
from qdist.digest import digest_json
from qdist.errors import StoreError
from qdist.stats.record import CalibrationRecord
from qdist.store.coverage import cover
from qdist.store.gathering import gather
from qdist.store.protocol import CalibrationStore
from qdist.store.receipt import ShardReceipt

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
    on_progress: OnProgress | None = None,
) -> Merged:
    """Merge everything that covers the job's grid and make it the store's latest.

    ``among``: ids of the only receipts to use. ``on_progress(done, total)`` counts records read.
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
    record = _joined(covered.parts, store, job.taps.tensors, on_progress)
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
    store.finish(merge_name(job), record, details, job.taps, batches)
    return merged


def recall(job: CalibrationJob, store: CalibrationStore) -> Merged | None:
    """The merge of exactly this job's micro-batches and taps, where the store has it undamaged.

    Makes it the latest and reads no shard's record. Raises QD309 as `finish` does.
    """
    name = merge_name(job)
    found = store.find(name)
    if found is None:
        return None
    merged = _merged(job, found.record, int(found.about.get("n_shards", 0)))
    store.make_latest(name)
    return merged


def merge_name(job: CalibrationJob) -> str:
    """Hex SHA-256 of the grid and the taps: what a merge is filed under."""
    return digest_json([[list(batch.ids) for batch in job.grid], list(job.taps.tensors)])


def _joined(
    parts: Sequence[tuple[ShardReceipt, tuple[str, ...]]],
    store: CalibrationStore,
    tensors: tuple[str, ...],
    on_progress: OnProgress | None,
) -> CalibrationRecord:
    """The merged record of all parts. Damaged ones are discarded; QD403 after all are read."""
    damaged: list[StoreError] = []
    done = 0

    def read(receipt: ShardReceipt, taken: tuple[str, ...]) -> CalibrationRecord | None:
        nonlocal done
        try:
            return store.read(receipt, taken)
        except StoreError as error:
            if error.code != "QD403":
                raise
            store.discard(receipt)
            damaged.append(error)
            return None
        finally:
            done += 1
            if on_progress is not None:
                on_progress(done, len(parts))

    record = gather(parts, tensors, read)
    if record is None:
        raise damaged[0]
    return record


def _merged(job: CalibrationJob, record: CalibrationRecord, n_shards: int) -> Merged:
    """With the notes. Raises QD309."""
    if job.observer.on_nan == "error":
        refuse_nan(record)
    return Merged(record=record, n_shards=n_shards, notes=(*job.notes, *record_notes(job, record)))
