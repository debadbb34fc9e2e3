"""Many records merged into one, each read and let go before the next."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from qdist.stats.counters import ROW_SLOTS, PagedCounters
from qdist.stats.entries import Entries
from qdist.stats.record import CalibrationRecord


class Merger:
    """The merge of the records that are added, all of the same tensors.

    Law (tested in ``tests/laws``): `record` is the `CalibrationRecord.merge` of all of them, in any
    order; none gives the empty record. Linear in the entries of all: their counts go into counters,
    which take memory for the bins that are hit, however many records there are.
    """

    def __init__(self, tensors: Iterable[str]) -> None:
        self._tensors = tuple(tensors)
        self._rest = CalibrationRecord.empty(self._tensors)
        # A single record is its own merge, and needs no counters.
        self._single: CalibrationRecord | None = self._rest
        self._counters = PagedCounters(len(self._tensors))
        self._n_added = 0

    def add(self, record: CalibrationRecord) -> None:
        """Merge one more. Raises `ValueError` as `CalibrationRecord.merge` does."""
        rest = self._rest.merge(replace(record, histograms=Entries.empty()))
        self._n_added += 1
        if self._n_added == 1:
            self._rest, self._single = rest, record
            return
        if self._single is not None:
            counted = self._single.histograms
            self._counters.add(counted.keys, counted.counts)
            self._single = None
        self._rest = rest
        self._counters.add(record.histograms.keys, record.histograms.counts)

    def record(self) -> CalibrationRecord:
        """The merge of all that was added so far."""
        if self._single is not None:
            return self._single
        n_slots = len(self._tensors) * ROW_SLOTS
        return replace(self._rest, histograms=self._counters.entries(0, n_slots))


def merge_all(records: Iterable[CalibrationRecord], tensors: Iterable[str]) -> CalibrationRecord:
    """Merge any number of records, holding two at most; none gives the empty record.

    Raises `ValueError` as `CalibrationRecord.merge` does.
    """
    merger = Merger(tensors)
    for record in records:
        merger.add(record)
    return merger.record()
