"""End-to-end sensitivities over a pool: each worker walks through one stretch of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from actors.pool import Completed, Failed, Retried, WorkerLost, WorkerPool
from actors.session import ClusterSpec, ray_session
from qdist.data.source import DataSource
from qdist.evaluate.end_to_end import DivergenceTask, divergences, in_order
from qdist.model.freeze import FrozenModel
from qdist.model.session import Execution, fingerprint

_STRETCHES_PER_WORKER = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeSetup:
    """What a worker needs besides its tasks. Picklable; see `divergences`."""

    frozen: FrozenModel
    source: DataSource
    execution: Execution
    measure: str = "relative"
    batch: int = 8
    n_samples: int | None = None


class ProbeWorker:
    """Measures stretches of tasks. A plain class: one process, one thread."""

    def __init__(self, setup: ProbeSetup) -> None:
        self._setup = setup

    def setup(self) -> dict[str, Any]:
        """Says under which fingerprint it runs."""
        return {"fingerprint": fingerprint(self._setup.execution)}

    def run(self, tasks: tuple[DivergenceTask, ...]) -> dict[str, float]:
        """Task key -> divergence. Writes nothing, so it is safe to run twice."""
        s = self._setup
        return divergences(
            s.frozen,
            tasks,
            s.source,
            s.execution,
            measure=s.measure,
            batch=s.batch,
            n_samples=s.n_samples,
        )


def probe(
    setup: ProbeSetup,
    tasks: Sequence[DivergenceTask],
    cluster: ClusterSpec,
    *,
    on_done: Callable[[Mapping[str, float]], None] | None = None,
    on_message: Callable[[str], None] | None = None,
) -> dict[str, float]:
    """Task key -> divergence, by all workers of a pool. The result does not depend on how many
    there are. ``on_done`` hears of every stretch. Raises what a worker raises, QD801 to QD804."""
    if not tasks:
        return {}
    tell = on_message or (lambda text: None)
    found: dict[str, float] = {}
    make_worker = partial(ProbeWorker, setup)
    with (
        ray_session(cluster),
        WorkerPool[tuple[DivergenceTask, ...], dict[str, float]](
            cluster, make_worker, name="probe", prefetch=0
        ) as pool,
    ):
        for stretch in _stretches(in_order(setup.frozen, tasks), cluster.n_workers):
            pool.submit(stretch)
        while pool.n_pending:
            match pool.next_event(0.5):
                case Completed(result=result):
                    found |= result
                    if on_done is not None:
                        on_done(result)
                case Failed(error=error):
                    raise error
                case Retried(reason=reason):
                    tell(f"a stretch of layers is measured again: {reason}")
                case WorkerLost(worker=worker, reason=reason):
                    tell(f"worker {worker} is gone: {reason}")
                case _:
                    pass
    return {task.key: found[task.key] for task in tasks}


def _stretches(
    tasks: tuple[DivergenceTask, ...], n_workers: int
) -> list[tuple[DivergenceTask, ...]]:
    """Neighbours together, a few stretches for each worker."""
    size = max(1, -(-len(tasks) // (n_workers * _STRETCHES_PER_WORKER)))
    return [tasks[i : i + size] for i in range(0, len(tasks), size)]
