"""What a record shows that a user should hear of."""

from __future__ import annotations

from qdist.calibration.job import CalibrationJob
from qdist.errors import DataError
from qdist.model.experts import expert_notes
from qdist.stats.record import CalibrationRecord
from qdist.threshold.sentinel import split_sentinels


def refuse_nan(record: CalibrationRecord) -> None:
    """Raise QD309: shards measured under ``report`` may hold what ``error`` must not pass over."""
    n_nans, _ = record.specials
    for tensor, n_nan in zip(record.tensors, n_nans.tolist(), strict=True):
        if n_nan:
            raise DataError(
                "QD309",
                where=f"tensor {tensor}, in samples measured before",
                got=f"{n_nan} NaN",
                expected="finite activations from the float model",
                mend="set calibration.on_nan=report again, or calibrate into another store",
            )


def record_notes(job: CalibrationJob, record: CalibrationRecord) -> list[str]:
    """What the record shows: NaNs, infinities and masks by tensor, tokens by expert."""
    graph, masked = job.measuring.graph, job.measuring.masked
    notes = []
    for tensor, n_nan, n_infinite in zip(record.tensors, *record.specials, strict=True):
        if n_nan:
            notes.append(f"tensor {tensor} held {n_nan} NaN, which count for nothing")
        if tensor not in masked and n_infinite:
            notes.append(f"tensor {tensor} held {n_infinite} infinities")
    counted = {
        tensor: n for tensor in masked if tensor in record if (n := _n_masked(record, tensor))
    }
    if counted:
        most = max(counted, key=lambda tensor: counted[tensor])
        notes.append(
            f"{len(counted)} tensors on the way into {masked[most]} or others hold values that "
            f"mean masked, which set no range: {counted[most]:,} in {most}"
        )
    notes += expert_notes(
        graph,
        job.taps,
        lambda tensor: record.histogram(tensor).n_values if tensor in record else None,
    )
    return notes


def _n_masked(record: CalibrationRecord, tensor: str) -> int:
    """Infinities and large negatives."""
    histogram = record.histogram(tensor)
    return histogram.n_infinite + int(split_sentinels(histogram.finite).n_sentinels)
