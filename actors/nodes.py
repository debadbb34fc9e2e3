"""How much the nodes of a cluster have done for a pool."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFigures:
    """One node: ``n_workers`` alive now, the tasks that count as completed there so far, and
    ``busy_s``, the seconds that its workers, lost ones too, spent in tasks that they finished."""

    node_id: str
    node_ip: str
    n_workers: int
    n_completed: int
    busy_s: float


class NodeLedger:
    """Adds up what the workers of every node do. Used by one thread, the pool's."""

    def __init__(self) -> None:
        self._ips: dict[str, str] = {}
        self._n_completed: Counter[str] = Counter()
        self._busy_s: dict[str, float] = {}

    def joined(self, facts: Mapping[str, Any]) -> None:
        """A worker came up; ``facts`` as `actors.host.Host` gives them."""
        self._ips[str(facts["node_id"])] = str(facts["node_ip"])

    def answered(self, node_id: str, seconds: float, *, counts: bool) -> None:
        """A task took ``seconds`` on the node; ``counts``: its answer was the first."""
        self._n_completed[node_id] += counts
        self._busy_s[node_id] = self._busy_s.get(node_id, 0.0) + seconds

    def figures(self, alive: Iterable[str]) -> list[NodeFigures]:
        """Every node that ever had a worker, in the order in which they came; ``alive``: the node
        of every worker that is alive."""
        n_workers = Counter(alive)
        return [
            NodeFigures(
                node_id=node_id,
                node_ip=node_ip,
                n_workers=n_workers[node_id],
                n_completed=self._n_completed[node_id],
                busy_s=self._busy_s.get(node_id, 0.0),
            )
            for node_id, node_ip in self._ips.items()
        ]
