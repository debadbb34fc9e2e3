"""A user's latency table: microseconds of a layer, or of an operator type, in a number type.

A CSV file with the columns ``operator``, ``dtype`` and ``us``, and optionally
``us_per_million``::

    operator,dtype,us,us_per_million
    Conv,int8,4.0,0.8
    Conv,int16,4.0,1.7
    head,int8,55,
    convert,int8>int16,1.5,0.02

``operator`` is a layer's name, which goes first, or an operator type, or ``convert`` for a change
of the number type between two layers. ``dtype`` is a precision as in the configuration, for
``convert`` the number types of both sides. ``us_per_million`` comes on top for every million
multiply-accumulates of one sample, or elements where there are none.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qdist.errors import PlanError
from qdist.numbers.dtype import DTYPES
from qdist.plan.precision import PRECISIONS

CONVERT = "convert"
_COLUMNS = ("operator", "dtype", "us")
_PER_MILLION = "us_per_million"


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Microseconds: ``fixed_us``, and ``us_per_million`` multiplies or elements."""

    fixed_us: float
    us_per_million: float = 0.0

    def of(self, n: int) -> float:
        """For so many multiply-accumulates, or elements."""
        return self.fixed_us + self.us_per_million * n / 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyTable:
    """``rows``: (operator, dtype) -> latency. ``path``: where it comes from."""

    path: Path
    rows: Mapping[tuple[str, str], Latency]

    def of_layer(self, name: str, op_type: str, dtype: str, n: int) -> float | None:
        """Microseconds of a layer in a precision; None where the table has neither name nor
        type."""
        found = self.rows.get((name, dtype)) or self.rows.get((op_type, dtype))
        return None if found is None else found.of(n)

    def conversions(self, n_elements: int) -> dict[tuple[str, str], float]:
        """(number type, other number type) -> microseconds for so many elements."""
        pairs = {
            tuple(dtype.split(">")): row.of(n_elements)
            for (operator, dtype), row in self.rows.items()
            if operator == CONVERT
        }
        return {(pair[0], pair[1]): us for pair, us in pairs.items()}


def read_latency_table(path: Path) -> LatencyTable:
    """Read a table. Raises QD511 for a file that cannot be read or holds something else."""
    rows: dict[tuple[str, str], Latency] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            names = tuple(reader.fieldnames or ())
            missing = [name for name in _COLUMNS if name not in names]
            if missing:
                raise _bad(path, 1, f"no column {', '.join(missing)}", ", ".join(_COLUMNS))
            for row in reader:
                key = _key(path, reader.line_num, row)
                if key in rows:
                    got = f"{key[0]}, {key[1]} a second time"
                    raise _bad(path, reader.line_num, got, "each operator and dtype once")
                rows[key] = Latency(
                    fixed_us=_number(path, reader.line_num, "us", row["us"]),
                    us_per_million=_number(
                        path, reader.line_num, _PER_MILLION, row.get(_PER_MILLION) or "0"
                    ),
                )
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise _bad(path, 0, f"{type(error).__name__}: {error}", "a CSV file") from error
    if not rows:
        raise _bad(path, 0, "no rows", "a row for each operator and dtype")
    return LatencyTable(path=path, rows=rows)


def missing_latency(table: LatencyTable, layer: str, op_type: str, dtype: str) -> PlanError:
    """QD512: the table does not say how long a layer takes."""
    return PlanError(
        "QD512",
        where=f"{table.path}: layer {layer} ({op_type})",
        got=f"no row for {dtype}",
        expected=f"a row {op_type},{dtype},US or {layer},{dtype},US",
        mend="add the row, or leave the precision out of search.precisions",
    )


def _key(path: Path, line: int, row: Mapping[str, str | None]) -> tuple[str, str]:
    operator, dtype = (str(row[name] or "").strip() for name in ("operator", "dtype"))
    kinds = dtype.split(">")
    known = (*DTYPES, "float32")
    if operator == CONVERT:
        if len(kinds) != 2 or any(kind not in known for kind in kinds):
            raise _bad(path, line, f"dtype {dtype!r}", f"TYPE>TYPE, each of {', '.join(known)}")
    elif not operator or dtype not in PRECISIONS:
        expected = f"an operator and one of {', '.join(PRECISIONS)}"
        raise _bad(path, line, f"operator {operator!r}, dtype {dtype!r}", expected)
    return operator, dtype


def _number(path: Path, line: int, name: str, text: str | None) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise _bad(path, line, f"{name} {text!r}", "a number that is not negative")
    return value


def _bad(path: Path, line: int, got: str, expected: str) -> PlanError:
    return PlanError(
        "QD511",
        where=f"{path}, line {line}" if line else str(path),
        got=got,
        expected=expected,
        mend="mend the table given by search.latency; docs/search.md shows one",
    )
