"""Statistics of the first samples alone, from the same store: Knight's ``iteration``."""

from __future__ import annotations

from collections.abc import Callable

from qdist.calibration.job import CalibrationJob
from qdist.calibration.merge import Merged, recall
from qdist.calibration.run import complete
from qdist.calibration.work import Work
from qdist.errors import DataError
from qdist.store.protocol import CalibrationStore
from qdist.store.receipt import ShardReceipt


def prefix_of(job: CalibrationJob, n_samples: int) -> CalibrationJob:
    """The job on its shortest prefix, in whole micro-batches, of at least ``n_samples``.

    Raises QD311 for less than one sample, or more than the job has.
    """
    if not 1 <= n_samples <= job.n_samples:
        raise DataError(
            "QD311",
            where="the calibration samples",
            got=f"{n_samples} asked for",
            expected=f"1 to {job.n_samples}, as many as the calibration has",
            mend="ask for fewer, or calibrate with more samples",
        )
    n_batches = n_found = 0
    while n_found < n_samples:
        n_found += len(job.grid[n_batches])
        n_batches += 1
    return job.prefix(n_batches)


def merge_first(
    job: CalibrationJob,
    store: CalibrationStore,
    measure: Callable[[Work], list[ShardReceipt]],
    n_samples: int,
) -> Merged:
    """The statistics of `prefix_of`: recalled, or merged from what was measured, or measured.

    The store's latest merge stays what it is, at every moment, where it has one: others may read it
    meanwhile, and this may be killed. Raises as `prefix_of` and `complete`.
    """
    part = prefix_of(job, n_samples)
    return recall(part, store, make_latest=False) or complete(
        part, store, measure, make_latest=False
    )
