"""Are the samples that a model is scored on among those that it was calibrated on?"""

from __future__ import annotations

from qdist.data.source import DataSource

MOST_SAMPLES = 10_000
"""Of either set: beyond it the digests take too long for what is only a hint."""


def overlap(evaluation: DataSource, calibration: DataSource) -> tuple[int, int] | None:
    """How many of the evaluation samples have the content of a calibration sample, and how many
    evaluation samples there are.

    None where that is not cheap to tell: sources of different kinds, or too many samples. Raises
    `qdist.errors.DataError`.
    """
    if type(evaluation) is not type(calibration):
        return None
    keys, known = evaluation.keys(), calibration.keys()
    if max(len(keys), len(known)) > MOST_SAMPLES:
        return None
    if evaluation == calibration:
        return len(keys), len(keys)
    digests = {calibration.content_digest(key) for key in known}
    return sum(evaluation.content_digest(key) in digests for key in keys), len(keys)


def overlap_text(evaluation: DataSource, calibration: DataSource) -> str | None:
    """``3 of 100``, or None where no sample, as far as can be told, is in both sets."""
    found = overlap(evaluation, calibration)
    return f"{found[0]} of {found[1]}" if found and found[0] else None
