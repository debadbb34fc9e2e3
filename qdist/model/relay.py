"""What waits between the segments of a model and between its phases, for some micro-batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from qdist.model.segments import Segment
from qdist.model.spool import Spool


class Relay:
    """Hands tensors on, each kept until its last segment has read it. One thread at a time.

    A tensor belongs to a micro-batch and a phase, by number. ``carry``: pairs of an input of the
    model and the output of the phase before that fills it. ``asides``: inputs that every segment
    reads although its graph does not.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        spool: Spool,
        carry: Sequence[tuple[str, str]] = (),
        asides: Iterable[str] = (),
    ) -> None:
        self._segments = segments
        self._spool = spool
        self._carry = carry
        self._n_phases: dict[int, int] = {}
        # A segment may measure an input of the model that its graph does not read.
        self._reads = [
            tuple(dict.fromkeys((*s.feeds, *s.receives, *s.tensors, *asides))) for s in segments
        ]
        self._last = {name: i for i, reads in enumerate(self._reads) for name in reads}

    def rounds(self) -> Iterator[tuple[int, int | None]]:
        """Pairs of a segment and a phase; None: all phases.

        All phases go through a segment before the next one's turn, unless something is carried
        into it that is made behind it. The number of phases has to be known by the end of the
        first round.
        """
        first = {name: i for i, reads in reversed(list(enumerate(self._reads))) for name in reads}
        made = {name: i for i, segment in enumerate(self._segments) for name in segment.hands}
        numbers = range(len(self._segments))
        if all(made[output] <= first.get(name, len(numbers)) for name, output in self._carry):
            yield from ((index, None) for index in numbers)
            return
        phase = 0
        while phase == 0 or phase < max(self._n_phases.values(), default=0):
            yield from ((index, phase) for index in numbers)
            phase += 1

    def phases(self, batch: int, phase: int | None) -> range:
        """The phases of a micro-batch that belong to a round."""
        n = self._n_phases[batch]
        return range(n) if phase is None else range(phase, min(phase + 1, n))

    def start(self, batch: int, feeds: Sequence[Mapping[str, NDArray[Any]]]) -> None:
        """Take in a micro-batch: its feeds, one for each phase. What nothing reads is left out."""
        self._n_phases[batch] = len(feeds)
        for phase, arrays in enumerate(feeds):
            for name, array in arrays.items():
                if name in self._last:
                    self._spool.put((batch, phase, name), array)

    def __contains__(self, batch: int) -> bool:
        return batch in self._n_phases

    def take(self, batch: int, phase: int, index: int) -> dict[str, NDArray[Any]]:
        """All that a segment reads and that is there; what no later one reads is forgotten."""
        found = {}
        for name in self._reads[index]:
            key = (batch, phase, name)
            if key in self._spool:
                found[name] = self._spool.get(key)
                if self._last[name] == index:
                    self._spool.drop(key)
        return found

    def hand_on(self, batch: int, phase: int, index: int, made: Mapping[str, NDArray[Any]]) -> None:
        """Keep what later segments and the next phase read of a segment's outputs."""
        for name in self._segments[index].sends:
            self._spool.put((batch, phase, name), made[name])
        if phase + 1 < self._n_phases[batch]:
            for name, output in self._carry:
                key = (batch, phase + 1, name)
                # An input that the feeds of the next phase hold is not filled.
                if output in made and name in self._last and key not in self._spool:
                    self._spool.put(key, made[output])

    def wanted(self, index: int) -> tuple[str, ...]:
        """The outputs of a segment that have to be handed on."""
        segment = self._segments[index]
        carried = (output for _, output in self._carry if output in segment.hands)
        return tuple(dict.fromkeys((*segment.sends, *carried)))
