"""Measures no more samples than the thresholds need: early stopping on complete prefixes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from qdist.calibration.job import CalibrationJob
from qdist.calibration.merge import Merged, OnProgress, recall
from qdist.calibration.reading import Spread
from qdist.calibration.run import complete
from qdist.calibration.work import Work
from qdist.errors import ConfigError
from qdist.store.protocol import CalibrationStore
from qdist.store.receipt import ShardReceipt
from qdist.threshold.convergence import Convergence, Prefix, prefix_sizes


def converge(
    job: CalibrationJob,
    store: CalibrationStore,
    measure: Callable[[Work], list[ShardReceipt]],
    policy: Convergence,
    *,
    spread: Spread | None = None,
    on_merge: OnProgress | None = None,
    on_decision: Callable[[str], None] | None = None,
) -> Merged:
    """Calibrate growing prefixes of the grid until ``policy`` stops, or all of it.

    A prefix is measured and merged whole before it is judged, so the answer depends on the manifest
    and the policy alone (law 1). ``spread`` as in `finish`; what one prefix has merged serves the
    next. ``on_decision`` hears of every judgement. Raises as `complete`, and QD107 for a job of
    several blocks: a prefix has none.
    """
    refuse_blocks(job.settings.n_blocks)
    history: list[Prefix] = []
    for size in (sizes := prefix_sizes(len(job.grid))):
        part = job.prefix(size)
        merged = recall(part, store) or complete(
            part, store, measure, spread=spread, on_merge=on_merge
        )
        record = merged.record
        history.append(policy.measured(size, {t: record.histogram(t) for t in record.tensors}))
        decision = policy.decide(history)
        if on_decision is not None:
            on_decision(decision.reason)
        if decision.stop or size == sizes[-1]:
            break
    note = f"{_ending(decision.stop, part.n_samples, job.n_samples)}: {decision.reason}"
    return replace(merged, notes=(*merged.notes, note))


def _ending(has_converged: bool, n_used: int, n_samples: int) -> str:
    if not has_converged:
        return f"did not converge before the {n_samples} samples ended"
    if n_used == n_samples:
        return f"converged with all {n_samples} samples"
    return f"stopped early after {n_used} of {n_samples} samples"


def refuse_blocks(n_blocks: int) -> None:
    """Raise QD107 for more than one block: which samples they hold is not known in advance."""
    if n_blocks > 1:
        raise ConfigError(
            "QD107",
            where="calibration.early_stop",
            got=f"calibration.blocks={n_blocks} beside it",
            expected="one of the two: equal blocks are of all samples",
            mend="leave out calibration.early_stop, or set calibration.blocks=1",
        )
