"""How far a tensor is from its float self: running sums, and what they come to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Deviation:
    """How far a tensor is from its float self, over all its values in all samples.

    ``cosine`` in -1..1; ``relative_l2`` = ||q - f|| / ||f||; ``sqnr_db`` = -20 log10 of that,
    infinite when equal; ``mse`` and ``mae`` in units of the tensor.
    """

    cosine: float
    relative_l2: float
    mse: float
    mae: float
    sqnr_db: float

    def to_json(self) -> dict[str, float | str]:
        """As a JSON object; an infinite SQNR is the string ``inf``."""
        values = {"cosine": self.cosine, "relative_l2": self.relative_l2, "mse": self.mse}
        rest = {"mae": self.mae, "sqnr_db": self.sqnr_db}
        return {k: v if np.isfinite(v) else str(v) for k, v in {**values, **rest}.items()}

    @classmethod
    def from_json(cls, value: Mapping[str, float | str]) -> Self:
        """From `to_json`. Raises `KeyError`, `TypeError` or `ValueError` on anything else."""
        names = ("cosine", "relative_l2", "mse", "mae", "sqnr_db")
        return cls(**{name: float(value[name]) for name in names})


class Sums:
    """Running sums of one tensor pair, in float64. Adding batches in one order gives one result.

    Values that are infinite or NaN in the float model are left out; one that is so only in the
    quantized model makes the deviation infinite.
    """

    def __init__(self) -> None:
        self._ff = self._qq = self._fq = self._square = self._absolute = 0.0
        self._n = 0
        self._is_broken = False

    def add(self, expected: NDArray[Any], found: NDArray[Any]) -> None:
        """Add the float tensor and the quantized one, of equal shape."""
        f = expected.astype(np.float64, copy=False).ravel()
        q = found.astype(np.float64, copy=False).ravel()
        finite = np.isfinite(f)
        if not finite.all():
            f, q = f[finite], q[finite]
        if not np.isfinite(q).all():
            self._is_broken = True
            return
        self._ff += float(f @ f)
        self._qq += float(q @ q)
        self._fq += float(f @ q)
        d = q - f
        self._square += float(d @ d)
        self._absolute += float(np.abs(d).sum())
        self._n += f.size

    def deviation(self) -> Deviation:
        """What the sums come to; perfect agreement when nothing was added."""
        square = float("inf") if self._is_broken else self._square
        return deviation_of(self._ff, self._qq, self._fq, square, self._absolute, self._n)


def deviation_of(
    ff: float, qq: float, fq: float, square: float, absolute: float, n: int
) -> Deviation:
    """From sums over ``n`` values of f*f, q*q, f*q, (q-f)^2 and abs(q-f); an infinite ``square``
    says that values are infinite or NaN in the quantized model alone."""
    inf = float("inf")
    if not np.isfinite(square):
        return Deviation(cosine=0.0, relative_l2=inf, mse=inf, mae=inf, sqnr_db=-inf)
    if n == 0 or square == 0.0:
        return Deviation(cosine=1.0, relative_l2=0.0, mse=0.0, mae=0.0, sqnr_db=inf)
    norms = np.sqrt(ff) * np.sqrt(qq)
    relative = float(np.sqrt(square / ff)) if ff else inf
    return Deviation(
        cosine=fq / float(norms) if norms else 0.0,
        relative_l2=relative,
        mse=square / n,
        mae=absolute / n,
        sqnr_db=float(-20 * np.log10(relative)) if np.isfinite(relative) else -inf,
    )
