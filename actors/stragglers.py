"""When a task that takes too long is started a second time: a pure policy that knows no Ray.

The last tasks of a run decide when it ends, and one slow node can hold up all the others. When
nothing is left to hand out and a worker is idle, a task that has run much longer than tasks do is
therefore given to that worker as well; the first answer counts. (J. Dean and S. Ghemawat,
"MapReduce: Simplified Data Processing on Large Clusters", OSDI 2004, section 3.6.)
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StragglerPolicy:
    """A task is late once it has run for more than ``factor`` medians, and ``min_s`` at least.

    The median is over tasks that have completed, of which there must be ``min_completed``: one
    that hangs does not move it. ``factor`` > 1, ``min_s`` >= 0 seconds, ``min_completed`` >= 1.

    Raises `ValueError` on limits out of range.
    """

    factor: float = 2.0
    min_s: float = 5.0
    min_completed: int = 3

    def __post_init__(self) -> None:
        if not (math.isfinite(self.factor) and self.factor > 1):
            raise ValueError(f"factor: got {self.factor}, expected more than 1")
        if not (math.isfinite(self.min_s) and self.min_s >= 0):
            raise ValueError(f"min_s: got {self.min_s}, expected 0 or more")
        if self.min_completed < 1:
            raise ValueError(f"min_completed: got {self.min_completed}, expected 1 or more")

    def limit_s(self, completed_s: Collection[float]) -> float | None:
        """Seconds after which a task is late; None while too few tasks have completed.

        ``completed_s`` are the seconds that completed tasks took, in any order.

        >>> StragglerPolicy(min_s=1.0).limit_s([2.0, 3.0, 90.0])
        6.0
        """
        if len(completed_s) < self.min_completed:
            return None
        return max(self.min_s, self.factor * statistics.median(completed_s))
