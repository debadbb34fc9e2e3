"""Statistics of equal blocks of the samples, beside those of all of them (Icraft's ``batch``)."""

from __future__ import annotations

from collections.abc import Callable

from qdist.calibration.job import CalibrationJob
from qdist.calibration.merge import merge_name, recall
from qdist.calibration.reading import Spread
from qdist.calibration.run import complete
from qdist.calibration.work import Work, blocks, open_work
from qdist.errors import StoreError
from qdist.stats.record import CalibrationRecord
from qdist.store.protocol import CalibrationStore
from qdist.store.receipt import ShardReceipt


def merge_blocks(
    job: CalibrationJob,
    store: CalibrationStore,
    measure: Callable[[Work], list[ShardReceipt]],
    *,
    spread: Spread | None = None,
) -> None:
    """Merge every block of the job's samples, measuring what lacks, and note which they are.

    Comes before the merge of the whole, which is to be the latest. ``spread`` as in `finish`.
    Raises QD311 where the samples do not divide, and as `complete`.
    """
    names = []
    parts = blocks(job)
    # All of it in one go, so that no worker waits at the end of a block.
    if (work := open_work(job, store)).tasks:
        measure(work)
    for block in parts:
        part = job.part(block)
        if recall(part, store) is None:
            complete(part, store, measure, spread=spread)
        names.append(merge_name(part))
    store.put_document(_document(merge_name(job)), {"merges": names})


def block_records(store: CalibrationStore, merge: str) -> tuple[CalibrationRecord, ...]:
    """The records of the blocks of a merge. Raises QD402 where it was made without blocks."""
    found = store.document(_document(merge))
    records = [] if found is None else [store.find(name) for name in found["merges"]]
    if not records or None in records:
        raise StoreError(
            "QD402",
            where="the calibration store",
            got="no statistics of blocks" if not records else "a block's statistics missing",
            expected="a calibration with calibration.blocks=N",
            mend="run qdist calibrate with calibration.blocks=N, or leave out "
            "quantization.average_blocks",
        )
    return tuple(merge.record for merge in records if merge is not None)


def _document(merge: str) -> str:
    return f"blocks-{merge}"
