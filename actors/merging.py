"""When there is so much to merge that it is worth starting workers for it alone."""

from __future__ import annotations

from collections.abc import Sequence

from qdist.calibration import MergeNode
from qdist.calibration.reading import n_read

_ROW_S = 40e-6
"""Seconds to read and merge one tensor of one record, about."""
_START_S = 20.0
"""Seconds that a pool has to save, which takes some time to start itself."""


def is_worth_a_pool(nodes: Sequence[MergeNode], n_workers: int) -> bool:
    """Whether making ``nodes`` is so much work that workers should be started for it alone."""
    rows = sum(n_read(node) * len(node.tensors) for node in nodes)
    return rows * _ROW_S * (1 - 1 / n_workers) > _START_S
