"""Several threads gather statistics side by side, each of tensors of its own.

Rows of different tensors have nothing in common but free memory, so every thread has a whole
`Accumulator`, and the record joins what each has of its own tensors: bit for bit what one thread
gathers. Who counts a tensor is settled when it is first seen, so that threads have as many elements
each as the tensors that come together allow.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdist.stats.accumulator import Accumulator
from qdist.stats.record import CalibrationRecord
from qdist.stats.spec import StatisticsSpec

MOST_THREADS = 16
"""More do not help: counting is bound by memory by then."""
LEAST_ELEMENTS = 1 << 17
"""Fewer are counted at once sooner (some 0.1 ms) than another thread begins."""
_NOBODY = -1


class SideBySide:
    """As `Accumulator`, in up to ``n_threads`` threads. Itself to be used by one thread at a
    time."""

    def __init__(
        self,
        tensors: Iterable[str],
        spec: StatisticsSpec | None = None,
        channel_axes: Mapping[str, int] | None = None,
        *,
        n_threads: int = 1,
    ) -> None:
        self._tensors = tuple(tensors)
        n = max(1, min(n_threads, MOST_THREADS, len(self._tensors)))
        self._parts = [Accumulator(self._tensors, spec, channel_axes) for _ in range(n)]
        self._owner = [_NOBODY if n > 1 else 0] * len(self._tensors)
        self._others = ThreadPoolExecutor(n - 1, "counting") if n > 1 else None

    def reset(self) -> None:
        """Forget all that was added."""
        for part in self._parts:
            part.reset()

    def add_samples(self, n: int) -> None:
        """Say that ``n`` more samples were measured."""
        for part in self._parts:
            part.add_samples(n)

    def n_nan(self, index: int) -> int:
        """How many NaNs were counted in a tensor."""
        return self._parts[max(self._owner[index], 0)].n_nan(index)

    @property
    def has_nan(self) -> bool:
        """Whether a NaN was counted in any tensor."""
        return any(part.has_nan for part in self._parts)

    def add(self, index: int, array: NDArray[Any], keep: NDArray[np.bool_] | None = None) -> None:
        """As `Accumulator.add`, in this thread."""
        if self._owner[index] == _NOBODY:
            self._settle([index], [array])
        self._parts[self._owner[index]].add(index, array, keep)

    def add_again(self, source: object) -> bool:
        """As `Accumulator.add_again`; of several threads, none does."""
        return self._others is None and self._parts[0].add_again(source)

    def add_all(
        self,
        indices: Sequence[int],
        arrays: Sequence[NDArray[Any]],
        source: object | None = None,
    ) -> None:
        """As `Accumulator.add_all`. Raises what that raises, once all threads are done."""
        if self._others is None:
            self._parts[0].add_all(indices, arrays, source)
            return
        self._settle(indices, arrays)
        shares: list[tuple[list[int], list[NDArray[Any]]]] = [([], []) for _ in self._parts]
        for index, array in zip(indices, arrays, strict=True):
            own, values = shares[self._owner[index]]
            own.append(index)
            values.append(array)
        mine, *others = sorted(
            zip(self._parts, shares, strict=True),
            key=lambda one: -sum(array.size for array in one[1][1]),
        )
        running = [
            self._others.submit(part.add_all, *share)
            for part, share in others
            if sum(array.size for array in share[1]) >= LEAST_ELEMENTS
        ]
        try:
            for part, share in (mine, *others[len(running) :]):
                part.add_all(*share)
        finally:
            # Arrays are the caller's again when this returns, whatever happened.
            failed = [error for one in running if (error := one.exception()) is not None]
        if failed:
            raise failed[0]

    def record(self) -> CalibrationRecord:
        """All that was added so far, as a value of its own."""
        if len(self._parts) == 1:
            return self._parts[0].record()
        records = [
            part.record().select(
                name
                for name, owner in zip(self._tensors, self._owner, strict=True)
                if max(owner, 0) == place
            )
            for place, part in enumerate(self._parts)
        ]
        return CalibrationRecord.join(records, self._tensors)

    def _settle(self, indices: Sequence[int], arrays: Sequence[NDArray[Any]]) -> None:
        """Give tensors that nobody counts to whoever has the fewest elements of these, the largest
        tensors first."""
        loads = [0] * len(self._parts)
        new = []
        for index, array in zip(indices, arrays, strict=True):
            owner = self._owner[index]
            if owner == _NOBODY:
                new.append((array.size, index))
            else:
                loads[owner] += array.size
        for size, index in sorted(new, reverse=True):
            if self._owner[index] == _NOBODY:
                owner = loads.index(min(loads))
                self._owner[index] = owner
                loads[owner] += size
