"""Statistics of a smoothed model: the rows that the factors change are measured, all others stay.

The smoothed model (`qdist.model.smoothed`) computes every other tensor to the last bit as before,
so it runs over the same micro-batches with those few taps alone. It has an identity of its own, and
so a store of its own, below that of the model that it was made of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from qdist.calibration.blockwise import block_records
from qdist.calibration.job import CalibrationJob, only
from qdist.calibration.merge import merge_name_of
from qdist.errors import StoreError
from qdist.model.freeze import FrozenModel
from qdist.model.graph import Graph
from qdist.model.masks import sentinel_paths
from qdist.model.smoothed import changed_tensors
from qdist.model.smoothing import Smoothing
from qdist.model.taps import TapTable
from qdist.stats.record import CalibrationRecord
from qdist.store.protocol import CalibrationStore, FinishedMerge
from qdist.store.receipt import Batch
from qdist.store.zarr_store import open_store


def channels_location(location: str) -> str:
    """Where extrema of channels along other axes are, for the store at ``location``."""
    return f"{location.rstrip('/')}/smoothed/channels"


def channels_job(job: CalibrationJob, axes: Mapping[str, int]) -> CalibrationJob:
    """What measures some tensors of the model as it is again, with their channels along these axes:
    shape inference does not find every rank, and images have theirs along the second axis."""
    taps = only(job.taps, tuple(tensor for tensor in job.taps.tensors if tensor in axes))
    measuring = replace(job.measuring, axes=axes)
    return replace(job, taps=taps, observer=measuring.observer(taps), measuring=measuring, notes=())


def smoothed_location(location: str, smoothed: FrozenModel) -> str:
    """Where the statistics of the smoothed model are, for the store at ``location``."""
    return f"{location.rstrip('/')}/smoothed/{smoothed.digest[:32]}"


def smoothed_rows(graph: Graph, taps: TapTable, smoothing: Smoothing) -> tuple[str, ...]:
    """The measured tensors of ``taps`` that the factors change, in their order. ``graph``: of the
    model before."""
    changed = {taps.row_of(name) for name in changed_tensors(graph, smoothing)}
    return tuple(tensor for tensor in taps.tensors if tensor in changed)


def smoothed_job(job: CalibrationJob, smoothed: Graph, rows: tuple[str, ...]) -> CalibrationJob:
    """What measures ``rows`` of the smoothed model on all samples of ``job``."""
    taps = only(job.taps, rows)
    measuring = replace(job.measuring, graph=smoothed, masked=sentinel_paths(smoothed))
    return replace(
        job,
        identity=replace(job.identity, model_digest=smoothed.model.digest),
        taps=taps,
        observer=measuring.observer(taps),
        measuring=measuring,
        notes=(),
    )


def on_batches(job: CalibrationJob, batches: Sequence[Batch]) -> CalibrationJob:
    """The job on the micro-batches of a merge, which may be fewer: early stopping measures a part.

    Raises `ValueError` for micro-batches that are not the job's.
    """
    wanted = set(batches)
    grid = tuple(batch for batch in job.grid if batch.ids in wanted)
    if tuple(batch.ids for batch in grid) != tuple(batches):
        raise ValueError("micro-batches of another job")
    return job if len(grid) == len(job.grid) else job.part(grid)


def joined(record: CalibrationRecord, smoothed: CalibrationRecord) -> CalibrationRecord:
    """``record`` with the rows that ``smoothed`` has in place of its own. Raises `ValueError` for
    records of different numbers of samples."""
    return CalibrationRecord.join([smoothed, record], record.tensors)


def stored_rows(
    location: str, smoothed: FrozenModel, merge: FinishedMerge, rows: Sequence[str]
) -> tuple[CalibrationStore, FinishedMerge]:
    """The store of the smoothed model below that at ``location``, and its merge of ``rows`` over
    the samples of ``merge``. Raises QD402 where there is none."""
    place = smoothed_location(location, smoothed)
    found = None
    try:
        store = open_store(place)
        found = store.find(merge_name_of(merge.batches, rows))
    except StoreError as error:
        if error.code != "QD402":
            raise
    if found is None:
        alpha = 0.0 if smoothed.smoothing is None else smoothed.smoothing.alpha
        raise StoreError(
            "QD402",
            where=place,
            got=f"no statistics of the model smoothed with alpha {alpha:g}",
            expected=f"{len(rows)} tensors of it, measured on the samples of the calibration",
            mend=f"run the same qdist calibrate again with calibration.smoothing={alpha:g}; "
            "nothing else is measured again",
        )
    return store, found


def stored_channels(
    location: str, merge: FinishedMerge, axes: Mapping[str, int]
) -> CalibrationRecord:
    """The record of ``merge``, with the rows of `channels_job` where there are such."""
    tensors = [tensor for tensor in merge.taps.tensors if tensor in axes]
    try:
        store = open_store(channels_location(location))
        found = store.find(merge_name_of(merge.batches, tensors)) if tensors else None
    except StoreError as error:
        if error.code != "QD402":
            raise
        found = None
    return merge.record if found is None else joined(merge.record, found.record)


def joined_blocks(
    blocks: Sequence[CalibrationRecord], store: CalibrationStore, merge: FinishedMerge
) -> tuple[CalibrationRecord, ...]:
    """Blocks of the samples with the rows of the smoothed model. Raises QD402 where its statistics
    were made without blocks."""
    own = block_records(store, merge.name)
    return tuple(joined(one, other) for one, other in zip(blocks, own, strict=True))
