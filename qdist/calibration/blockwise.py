"""Statistics of equal blocks of the samples, beside those of all of them (Icraft's ``batch``)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from qdist.calibration.job import CalibrationJob
from qdist.calibration.merge import merge_name, recall
from qdist.calibration.reading import Spread
from qdist.calibration.run import complete
from qdist.calibration.work import Work, blocks, open_work
from qdist.errors import StoreError
from qdist.stats.record import CalibrationRecord
from qdist.store.coverage import cover
from qdist.store.gathering import gather
from qdist.store.protocol import CalibrationStore, FinishedMerge
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


def sample_blocks(
    store: CalibrationStore, merge: FinishedMerge, n_blocks: int = 16
) -> tuple[tuple[CalibrationRecord, ...], str]:
    """Records of disjoint sets of the samples that together are all of ``merge``, in the order of
    its micro-batches, and in words what they are.

    The blocks of ``calibration.blocks`` where it was made with some. Else its shards, neighbours
    merged to at most ``n_blocks``: how the samples were cut into shards then has a part in them,
    and their sizes may differ. Raises QD402 where there is but one, QD403 for a damaged record.
    """
    if store.document(_document(merge.name)) is not None:
        records = block_records(store, merge.name)
        if len(records) > 1:
            return records, f"{len(records)} blocks of calibration.blocks"
    tensors = merge.record.tensors
    covered = cover(merge.batches, tensors, store.receipts())
    place = {batch: i for i, batch in enumerate(merge.batches)}
    parts: dict[int, list[tuple[ShardReceipt, tuple[str, ...]]]] = defaultdict(list)
    starts = sorted({place[receipt.batches[0]] for receipt, _ in covered.parts})
    if covered.missing or len(starts) < 2:
        raise _no_blocks("one shard" if starts and not covered.missing else "shards missing")
    n = min(n_blocks, len(starts))
    block_of = {start: i * n // len(starts) for i, start in enumerate(starts)}
    for receipt, own in covered.parts:
        parts[block_of[place[receipt.batches[0]]]].append((receipt, own))
    try:
        found = [gather(parts[i], tensors, store.read) for i in sorted(parts)]
    except (KeyError, ValueError) as error:
        # Tensors that were measured in another run have shards of their own.
        raise _no_blocks("tensors with shards of different samples") from error
    records = tuple(record for record in found if record is not None)
    return records, f"{len(records)} blocks of neighbouring shards"


def _no_blocks(got: str) -> StoreError:
    return StoreError(
        "QD402",
        where="the calibration store",
        got=got,
        expected="at least two blocks of samples to compare",
        mend="run qdist calibrate with calibration.blocks=N",
    )


def _document(merge: str) -> str:
    return f"blocks-{merge}"
