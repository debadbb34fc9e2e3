"""The whole calibration in one process, without Ray."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from qdist.calibration.blockwise import merge_blocks
from qdist.calibration.converge import converge
from qdist.calibration.job import CalibrationJob
from qdist.calibration.measure import run_shard
from qdist.calibration.merge import Merged, recall
from qdist.calibration.prefix import merge_first
from qdist.calibration.run import complete
from qdist.calibration.work import Work, open_work
from qdist.data.source import DataSource
from qdist.stats.observer import Observer
from qdist.store.protocol import CalibrationStore
from qdist.store.receipt import ShardReceipt
from qdist.threshold.convergence import Convergence


def calibrate_here(
    job: CalibrationJob,
    source: DataSource,
    store: CalibrationStore,
    *,
    early_stop: Convergence | None = None,
    on_decision: Callable[[str], None] | None = None,
) -> Merged:
    """Measure what the store lacks, one shard after the other, and merge.

    With ``early_stop`` it ends at the first complete prefix of the samples at which the thresholds
    have converged; ``on_decision`` hears of every judgement. Raises as `complete`, `merge_blocks`
    and `converge`.
    """

    measure = partial(_measure, job, source, store)
    if early_stop is not None:
        return converge(job, store, measure, early_stop, on_decision=on_decision)
    if job.settings.n_blocks > 1:
        merge_blocks(job, store, measure)
    return recall(job, store) or complete(job, store, measure)


def measure_here(job: CalibrationJob, source: DataSource, store: CalibrationStore) -> None:
    """Measure what the store lacks, one shard after the other, without merging. Raises what a shard
    raises."""
    _measure(job, source, store, open_work(job, store))


def statistics_here(
    job: CalibrationJob, source: DataSource, store: CalibrationStore, n_samples: int
) -> Merged:
    """The statistics of the first ``n_samples``, in whole micro-batches; what the store lacks of
    them is measured. Raises as `merge_first`."""
    return merge_first(job, store, partial(_measure, job, source, store), n_samples)


def _measure(
    job: CalibrationJob, source: DataSource, store: CalibrationStore, work: Work
) -> list[ShardReceipt]:
    receipts = []
    for tap_set, spec in enumerate(work.observers):
        observer = Observer(spec)
        receipts += [
            run_shard(task.shard, observer, source, job.inputs, store, job.decoder)
            for task in work.tasks
            if task.tap_set == tap_set
        ]
    return receipts
