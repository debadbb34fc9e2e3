"""The errors of a store, each made in one place: what happened, and how the user mends it."""

from __future__ import annotations

from collections.abc import Sequence

from qdist.errors import StoreError


def unreachable(where: str, got: str) -> StoreError:
    """QD408: it was there, or its server should be; waiting may mend it."""
    return StoreError(
        "QD408",
        where=where,
        got=got,
        expected="the store as it was when it was opened, on a disk or server that answers",
        mend="bring the disk or server back and run the same command again: it goes on from there",
    )


def unwritable(where: str, got: str) -> StoreError:
    """QD404: waiting does not mend it."""
    return StoreError(
        "QD404",
        where=where,
        got=got,
        expected="a place that every worker can read and write",
        mend="free some space, change its permissions or credentials, or choose another store.path",
    )


def damaged(where: str, reason: str) -> StoreError:
    """QD403: what is stored is not what was written."""
    return StoreError(
        "QD403",
        where=where,
        got=reason,
        expected="the record as it was written",
        mend="run qdist calibrate again; it measures damaged shards anew",
    )


def other_schema(where: str, got: str, schema: int) -> StoreError:
    """QD405: not a store that this version reads."""
    return StoreError(
        "QD405",
        where=where,
        got=got,
        expected=f"a qdist calibration store of schema {schema}",
        mend="choose another store.path, or calibrate again with this version",
    )


def foreign(where: str, got: str) -> StoreError:
    """QD405: somebody else's, which is not to be written over."""
    return StoreError(
        "QD405",
        where=where,
        got=got,
        expected="a qdist calibration store, or a place that is empty or not there yet",
        mend="choose another store.path",
    )


def other_identity(where: str, differences: Sequence[str], mend: str) -> StoreError:
    """QD401: statistics of another calibration."""
    return StoreError(
        "QD401",
        where=where,
        got="statistics that differ in " + "; ".join(differences),
        expected="statistics of the same model, preprocessing, processor and settings",
        mend=mend,
    )


def no_store(where: str) -> StoreError:
    """QD402: nothing there."""
    return StoreError(
        "QD402",
        where=where,
        got="no store",
        expected="a store that qdist calibrate has written",
        mend="run qdist calibrate with the same model and store.path first",
    )


def unfinished(where: str, got: str) -> StoreError:
    """QD402: a store without a finished calibration."""
    return StoreError(
        "QD402",
        where=where,
        got=got,
        expected="a calibration that ran to its end",
        mend="run qdist calibrate again; it goes on where it stopped",
    )


def unusable_file(where: str, got: str) -> StoreError:
    """QD409: not a statistics file, or a damaged one."""
    return StoreError(
        "QD409",
        where=where,
        got=got,
        expected="an undamaged file that this version of qdist has exported",
        mend="copy or export the statistics again",
    )
