"""Measures and merges until nothing is missing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from qdist.calibration.job import CalibrationJob
from qdist.calibration.merge import Merged, OnProgress, finish
from qdist.calibration.reading import Spread
from qdist.calibration.work import Work, open_work
from qdist.errors import StoreError
from qdist.store.protocol import CalibrationStore
from qdist.store.receipt import ShardReceipt

_ROUNDS = 3
"""How often `complete` measures. Two do, unless the disk keeps losing what it is given."""


def complete(
    job: CalibrationJob,
    store: CalibrationStore,
    measure: Callable[[Work], list[ShardReceipt]],
    *,
    spread: Spread | None = None,
    on_merge: OnProgress | None = None,
    make_latest: bool = True,
) -> Merged:
    """``measure`` what the store lacks and merge; again where something was lost on the way.

    A second round has to measure what turned out damaged, here or to another driver. ``spread`` and
    ``make_latest`` as in `finish`. Raises what ``measure`` and `finish` raise.
    """
    n_rounds = 0
    while True:
        n_rounds += 1
        work = replace(open_work(job, store), is_again=n_rounds > 1)
        measured = measure(work) if work.tasks else []
        # These fit together. Another driver's, of another size, may not fit with all of them.
        ours = work.receipt_ids | {receipt.id for receipt in measured}
        try:
            return finish(
                job,
                store,
                among=ours,
                spread=spread,
                on_progress=on_merge,
                make_latest=make_latest,
            )
        except StoreError as error:
            if error.code not in ("QD402", "QD403") or n_rounds == _ROUNDS:
                raise
